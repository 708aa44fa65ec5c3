"""`python -m penstock_local up|down|restart|status`: the same as the `penstock` command, without it."""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from penstock_kit.errors import PenstockError
from penstock_local.commands import down, status, up
from penstock_local.options import MeshOptions, default_data_dir
from penstock_local.restart import restart


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m penstock_local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start a mesh and stay with it")
    start.add_argument("--host", default="127.0.0.1")
    start.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    start.add_argument("--gateways", type=int, default=1)
    start.add_argument("--workers", type=int, default=1)
    start.add_argument("--schedulers", type=int, default=1)
    start.add_argument("--detach", action="store_true", help="leave it running in the background")
    start.add_argument("--ready-seconds", type=float, default=120.0)
    start.add_argument("--not-durable", action="store_true", help="for tests: flush nothing to disk")
    commands.add_parser("down", help="stop the mesh")
    again = commands.add_parser("restart", help="restart its services one after another")
    again.add_argument("names", nargs="*", help="which; default is all")
    commands.add_parser("status", help="ask every process whether it answers").add_argument(
        "--json", action="store_true"
    )
    for command in commands.choices.values():
        command.add_argument("--data-dir", type=Path, default=default_data_dir())
    return parser


async def _run(arguments: argparse.Namespace) -> int:
    console = Console()
    match arguments.command:
        case "up":
            options = MeshOptions(
                data_dir=arguments.data_dir,
                host=arguments.host,
                port=arguments.port,
                gateways=arguments.gateways,
                workers=arguments.workers,
                schedulers=arguments.schedulers,
                durable=not arguments.not_durable,
                ready_seconds=arguments.ready_seconds,
            )
            await up(options, detach=arguments.detach, console=console)
        case "down":
            record = await down(arguments.data_dir)
            console.print(f"Stopped the mesh on {record.url}.")
        case "restart":
            await restart(arguments.data_dir, arguments.names, say=console.print)
        case _:
            found = await status(arguments.data_dir)
            if arguments.json:
                print(json.dumps(found.to_json(), indent=1))
            elif found.running:
                console.print(found.table(console.width))
            else:
                console.print(f"No mesh runs on {found.data_dir}.")
            return 0 if found.healthy else 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        return asyncio.run(_run(_parser().parse_args(arguments)))
    except PenstockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
