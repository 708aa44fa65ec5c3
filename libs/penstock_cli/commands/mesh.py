"""The mesh on this machine: up, down, restart, status, logs."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from penstock.errors import FailedPrecondition, InvalidArgument, NotFound, PenstockError, Reason
from penstock_cli.output import console, print_json, say
from penstock_cli.session import EXIT_FAILED, Json, nearest

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar="PENSTOCK_DATA_DIR", help="Where the mesh keeps everything (~/.penstock)."
    ),
]
_FOLLOW_PAUSE_SECONDS = 0.25


def up(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the gateway; 0 takes a free one.")
    ] = 8080,
    host: Annotated[str, typer.Option(help="Address of the gateway.")] = "127.0.0.1",
    gateways: Annotated[int, typer.Option(min=1, help="Gateway processes; they share the port.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Worker agents, each a node.")] = 1,
    schedulers: Annotated[int, typer.Option(min=1, help="Scheduler processes; one of them leads.")] = 1,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it running in the background.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Start a mesh on this machine."""
    require_local()
    from penstock_local import commands
    from penstock_local.options import MeshOptions, default_data_dir

    options = MeshOptions(
        data_dir=data_dir or default_data_dir(),
        host=host,
        port=port,
        gateways=gateways,
        workers=workers,
        schedulers=schedulers,
    )
    if json and not detach:
        raise InvalidArgument("--json goes with --detach: otherwise the mesh runs until Ctrl-C.")
    asyncio.run(commands.up(options, detach=detach, console=console(stderr=json)))
    if json:
        print_json(asyncio.run(commands.status(options.data_dir)).to_json())


def down(data_dir: DataDir = None, json: Json = False) -> None:
    """Stop the mesh on this machine."""
    require_local()
    from penstock_local import commands

    record = asyncio.run(commands.down(data_dir))
    if json:
        print_json({"stopped": record.url})
    else:
        say(f"Stopped the mesh on {record.url}.")


def restart(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="Processes as `penstock status` names them.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Restart the services of the mesh on this machine, one after another; it serves meanwhile."""
    require_local()
    from penstock_local import restart as rolling

    asyncio.run(rolling.restart(data_dir, names or (), say=say))


def status(data_dir: DataDir = None, json: Json = False) -> None:
    """Say what of the mesh runs where, and if it answers."""
    require_local()
    from penstock_local import commands

    found = asyncio.run(commands.status(data_dir))
    if json:
        print_json(found.to_json())
    elif found.running:
        out = console()
        out.print(found.table(out.width))
        say(f"\n{found.url}, data and logs in {found.data_dir}")
    else:
        say(f"No mesh runs on {found.data_dir}; `penstock up` starts one.")
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)


def logs(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="A process as `penstock status` names it.")
    ] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Print the logs of the mesh on this machine."""
    require_local()
    from penstock_local import commands

    found = asyncio.run(commands.status(data_dir))
    paths = {unit.name: Path(unit.log) for unit in found.units if unit.log}
    if not paths:
        directory = Path(found.data_dir) / "logs"
        paths = {path.stem: path for path in sorted(directory.glob("*.log"))} if directory.is_dir() else {}
    if name:
        if name not in paths:
            hint = nearest(name, list(paths)) or f"There are: {', '.join(paths) or 'none yet'}."
            raise NotFound(f"There is no log of {name}. {hint}", reason=Reason.RESOURCE_NOT_FOUND)
        paths = {name: paths[name]}
    if not paths:
        raise NotFound(f"There are no logs in {found.data_dir}; `penstock up` starts a mesh.")
    _print_logs(paths, lines, follow=follow)


def _print_logs(paths: dict[str, Path], lines: int, *, follow: bool) -> None:
    width = max(len(name) for name in paths)
    prefix = {name: f"{name:{width}}  " if len(paths) > 1 else "" for name in paths}
    offsets = {}
    for name, path in paths.items():
        if not path.exists():
            continue
        with path.open("rb") as stream:
            for line in deque(stream, maxlen=lines):
                say(prefix[name] + line.decode(errors="replace").rstrip("\n"))
            offsets[name] = stream.tell()
    while follow:
        time.sleep(_FOLLOW_PAUSE_SECONDS)
        for name, path in paths.items():
            offsets[name] = _print_added(path, offsets.get(name, 0), prefix[name])


def _print_added(path: Path, offset: int, prefix: str) -> int:
    """Print the whole lines after `offset`; return where to go on. A file that shrank begins anew."""
    if not path.exists():
        return offset
    start = offset if path.stat().st_size >= offset else 0
    with path.open("rb") as stream:
        stream.seek(start)
        for line in stream:
            if not line.endswith(b"\n"):
                break
            say(prefix + line.decode(errors="replace").rstrip("\n"))
            start += len(line)
    return start


def require_local() -> None:
    """Refuse, with the remedy, where only the client is installed."""
    try:
        import penstock_local.commands  # noqa: F401
    except ImportError as error:
        raise _missing_local(error) from error


def _missing_local(error: ImportError) -> PenstockError:
    """Return the error for an installation that holds the client only."""
    return FailedPrecondition(
        f"A mesh on this machine needs more than the client ({error.name} is missing). Install it with "
        "`pip install 'penstock[local]'`."
    )
