"""What `penstock up`, `down` and `status` do."""

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from penstock.transport import DEFAULT_ENDPOINT
from penstock_kit.errors import PenstockError
from penstock_kit.threads import in_thread
from penstock_local.embedded.process import private_directory
from penstock_local.errors import AlreadyRunning, LocalError, NotRunning, ServerFailed
from penstock_local.health import Health, probe
from penstock_local.mesh import LocalMesh, ServicePlan, services
from penstock_local.options import MeshOptions, default_data_dir
from penstock_local.orphans import end_orphans, marked_processes
from penstock_local.state import DataDirectory, MeshRecord, UnitRecord
from penstock_local.supervisor import rotate
from penstock_local.units import UnitState

_POLL_SECONDS = 0.1
_WIDTH_FOR_METRICS = 105


@dataclass(frozen=True)
class UnitStatus:
    """One process, and whether it answers now."""

    name: str
    state: str
    healthy: bool
    detail: str
    address: str
    pid: int | None
    restarts: int
    since: float
    log: str
    metrics: str


@dataclass(frozen=True)
class MeshStatus:
    """A mesh, asked now.

    Attributes:
        running: Whether its supervisor lives.
        state: starting, running, stopping or stopped.
        url: Base URL of the gateway; empty if stopped.
        data_dir: Its data directory.
        pid: Its supervisor; None if stopped.
        units: Its processes.
    """

    running: bool
    state: str
    url: str
    data_dir: str
    pid: int | None
    units: tuple[UnitStatus, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether it runs and every process of it answers."""
        return self.running and all(unit.healthy for unit in self.units)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "healthy": self.healthy}

    def table(self, width: int) -> Table:
        """What runs where, for people; where the metrics are only if `width` columns have room for it."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = ["NAME", "STATE", "WHERE", "PROCESS", "RESTARTS", "UP FOR", "METRICS"]
        for column in columns if width >= _WIDTH_FOR_METRICS else columns[:-1]:
            table.add_column(
                column,
                justify="right" if column in ("PROCESS", "RESTARTS") else "left",
                no_wrap=column not in ("STATE", "WHERE"),
                overflow="fold",
            )
        for unit in self.units:
            state = "[green]healthy[/]" if unit.healthy else f"[yellow]{unit.state}[/] {unit.detail}"
            up_for = "" if unit.pid is None else duration(time.time() - unit.since)
            pid = "" if unit.pid is None else str(unit.pid)
            where = unit.address.removeprefix("unix:").removeprefix(f"{self.data_dir}/")
            cells = (unit.name, state, where, pid, str(unit.restarts), up_for, unit.metrics)
            table.add_row(*cells[: len(table.columns)])
        return table


def duration(seconds: float) -> str:
    """Seconds as people say them: 41s, 12m, 5h 3m, 2d 4h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 1:
        return f"{int(seconds)}s"
    if hours < 1:
        return f"{minutes}m"
    return f"{hours}h {minutes % 60}m" if days < 1 else f"{days}d {hours % 24}h"


async def up(
    options: MeshOptions | None = None,
    *,
    detach: bool = False,
    console: Console | None = None,
    plan: ServicePlan = services,
) -> None:
    """Start a mesh, say what runs where, and stay until SIGINT, SIGTERM or SIGHUP; then stop it.

    Args:
        options: How it is made.
        detach: Leave it running in the background and return as soon as it is healthy.
        console: Where to say it; stderr by default.
        plan: Which services it has; not used with `detach`.

    Raises:
        LocalError: As `LocalMesh.start`.
    """
    options = options or MeshOptions()
    console = console or Console(stderr=True)
    if detach:
        with console.status("Starting the mesh…"):
            await _start_detached(options)
        _announce(console, await status(options.data_dir), f"`{_down_command(options)}` stops it.")
        return
    mesh = LocalMesh(options, plan)
    with _signals(options.data_dir) as stopping:
        with console.status("Starting the mesh…"):
            await _unless(stopping, mesh)
        try:
            if not stopping.is_set():
                _announce(console, await status(options.data_dir), "Ctrl-C stops it.")
                await stopping.wait()
        finally:
            with console.status("Stopping the mesh…"):
                await mesh.stop()
        console.print("Stopped.")


async def down(data_dir: Path | None = None, *, seconds: float = 90.0) -> MeshRecord:
    """Stop the mesh of a data directory and wait until all of it has ended.

    Returns:
        The mesh as it was.

    Raises:
        NotRunning: There is none. What a killed one left behind is ended all the same.
        ServerFailed: It did not end within `seconds`.
    """
    data_dir = (data_dir or default_data_dir()).expanduser().absolute()
    record = MeshRecord.read(data_dir)
    if record is None or not record.is_alive():
        ended = await in_thread(lambda: _sweep(data_dir))
        also = f" {ended} processes of an earlier one were ended." if ended else ""
        raise NotRunning(f"No mesh runs on {data_dir}.{also} `penstock up` starts one.")
    try:
        os.kill(record.pid, signal.SIGTERM)
    except PermissionError as error:
        raise LocalError(
            f"Process {record.pid} belongs to another user; run `penstock down` as that user."
        ) from error
    except ProcessLookupError:
        return record
    deadline = time.monotonic() + seconds
    while record.is_alive():
        if time.monotonic() > deadline:
            raise ServerFailed(
                f"Process {record.pid} did not end within {seconds:g} s. `kill -9 {record.pid}` ends "
                "it, and everything that it runs."
            )
        await asyncio.sleep(_POLL_SECONDS)
    return record


async def status(data_dir: Path | None = None) -> MeshStatus:
    """Ask every process of the mesh of a data directory whether it answers now."""
    data_dir = (data_dir or default_data_dir()).expanduser().absolute()
    record = MeshRecord.read(data_dir)
    if record is None or not record.is_alive():
        return MeshStatus(False, "stopped", "", str(data_dir), None)
    details = await asyncio.gather(*(_ask(unit) for unit in record.units))
    units = tuple(
        UnitStatus(
            unit.name,
            unit.state,
            not detail,
            detail,
            unit.address,
            unit.pid,
            unit.restarts,
            unit.since,
            unit.log,
            unit.metrics,
        )
        for unit, detail in zip(record.units, details, strict=True)
    )
    return MeshStatus(True, record.state, record.url, str(data_dir), record.pid, units)


async def _ask(unit: UnitRecord) -> str:
    """Why a unit is not healthy; empty if it is."""
    if unit.state in (UnitState.WAITING, UnitState.STOPPED):
        return "not running"
    health = unit.health if isinstance(unit.health, Health) else Health()
    return await probe(health)


def _announce(console: Console, mesh: MeshStatus, last: str) -> None:
    console.print(mesh.table(console.width))
    console.print(f"\nData and logs: {mesh.data_dir}", soft_wrap=True)
    console.print(f"The mesh serves on [bold]{mesh.url}[/]. {last}", soft_wrap=True)
    endpoint = mesh.url.removeprefix("http://")
    if endpoint != os.environ.get("PENSTOCK_ENDPOINT", DEFAULT_ENDPOINT):
        console.print(f"Commands find it with PENSTOCK_ENDPOINT={endpoint}.", soft_wrap=True)


def _down_command(options: MeshOptions) -> str:
    words = ["penstock", "down"]
    if options.data_dir != default_data_dir().expanduser().absolute():
        words += ["--data-dir", str(options.data_dir)]
    return shlex.join(words)


@contextlib.contextmanager
def _signals(data_dir: Path) -> Iterator[asyncio.Event]:
    """An event that the first signal to stop sets. The second one kills the services."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle() -> None:
        if stopping.is_set():
            for process in marked_processes(data_dir):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        stopping.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handle)
    try:
        yield stopping
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _unless(stopping: asyncio.Event, mesh: LocalMesh) -> None:
    """Start the mesh, unless it is told to stop before it is healthy."""

    async def start() -> PenstockError | None:
        try:
            await mesh.start()
        except PenstockError as error:
            return error
        return None

    async with asyncio.TaskGroup() as group:
        starting = group.create_task(start())
        told = group.create_task(stopping.wait())
        await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        told.cancel()
    if not starting.cancelled() and (error := starting.result()) is not None:
        raise error


def _spawn_supervisor(options: MeshOptions, log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m penstock_local up`, which outlives us, with its output in `log`."""
    command = [sys.executable, "-m", "penstock_local", "up", *arguments(options)]
    env = {**os.environ, **options.env}
    if options.database_url:
        env["PENSTOCK_DATABASE_URL"] = options.database_url  # not an argument: it may hold a password
    if options.redis_url:
        env["PENSTOCK_REDIS_URL"] = options.redis_url
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - this interpreter and our own module
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )


async def _start_detached(options: MeshOptions) -> None:
    log = private_directory(private_directory(options.data_dir) / "logs") / "mesh.log"
    rotate(log)
    begin = log.stat().st_size if log.exists() else 0
    process = _spawn_supervisor(options, log)
    deadline = time.monotonic() + options.ready_seconds + 30.0
    while True:
        if process.poll() is not None:
            said = log.read_bytes()[begin:].decode(errors="replace").strip()
            raise _said(said.rpartition("error: ")[2] or f"It ended with status {process.returncode}.")
        record = MeshRecord.read(options.data_dir)
        if record is not None and record.pid == process.pid and record.state == "running":
            return
        if time.monotonic() > deadline:
            process.terminate()
            raise ServerFailed(f"The mesh was not ready in time; its log is {log}.")
        await asyncio.sleep(_POLL_SECONDS)


def _said(message: str) -> LocalError:
    return AlreadyRunning(message) if "already runs" in message else ServerFailed(message)


def arguments(options: MeshOptions) -> list[str]:
    """The options as arguments of `penstock_local up`; what may be secret goes by the environment."""
    words = ["--data-dir", str(options.data_dir), "--host", options.host, "--port", str(options.port)]
    words += ["--gateways", str(options.gateways), "--workers", str(options.workers)]
    words += ["--schedulers", str(options.schedulers)]
    words += ["--ready-seconds", str(options.ready_seconds)]
    return words if options.durable else [*words, "--not-durable"]


def _sweep(data_dir: Path) -> int:
    """End what a killed mesh left in `data_dir`, unless somebody holds it by now."""
    if not data_dir.is_dir():
        return 0
    directory = DataDirectory(data_dir)
    try:
        directory.acquire()
    except LocalError:
        return 0
    try:
        return end_orphans(data_dir)
    finally:
        directory.release()
