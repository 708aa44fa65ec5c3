"""Restart the services of a mesh one after another, while it serves.

Each gets SIGTERM, drains by its own rules, ends, and is started again by its supervisor; the next one
follows when it is healthy. Those that wait for nobody come first, and gateways last, so that what they pass
calls to is there when they are new. PostgreSQL and Redis stay as they are.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock_kit.errors import NotFound, Reason
from penstock_local.errors import NotRunning, ServerFailed
from penstock_local.health import probe
from penstock_local.options import default_data_dir
from penstock_local.state import MeshRecord, UnitRecord
from penstock_local.units import UnitState

SERVERS = ("postgres", "redis")
_ORDER = ("registry", "scheduler", "worker", "gateway")
_POLL_SECONDS = 0.05
UNIT_SECONDS = 90.0
"""For one of them: a worker may drain for 30 s, and its libraries take some to load."""


async def restart(
    data_dir: Path | None = None,
    names: Sequence[str] = (),
    *,
    seconds: float = UNIT_SECONDS,
    say: Callable[[str], object] = print,
) -> None:
    """Restart services in turn, each after the one before is healthy again.

    Args:
        data_dir: The mesh's.
        names: Which, in this order; none means all but PostgreSQL and Redis.
        seconds: What each may take.
        say: Takes a line for each.

    Raises:
        NotRunning: No mesh runs there.
        NotFound: It has no process of such a name, or it is not the mesh's to restart.
        ServerFailed: One did not come back in time; those after it were left alone.
    """
    data_dir = (data_dir or default_data_dir()).expanduser().absolute()
    for name in names or [unit.name for unit in sorted(_services(data_dir), key=_place)]:
        began = time.monotonic()
        await _restart(data_dir, name, seconds)
        say(f"{name} is back after {time.monotonic() - began:.1f} s")


async def _restart(data_dir: Path, name: str, seconds: float) -> None:
    old = _unit(data_dir, name)
    if old.pid is not None:
        os.kill(old.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while True:
        unit = _unit(data_dir, name)
        if (
            unit.pid not in (None, old.pid)
            and unit.state == UnitState.HEALTHY
            and not await probe(unit.health)
        ):
            return
        if time.monotonic() > deadline:
            raise ServerFailed(
                f"{name} is not back after {seconds:g} s ({unit.state}); the others were left as they are. "
                f"Its log is {unit.log}."
            )
        await asyncio.sleep(_POLL_SECONDS)


def _services(data_dir: Path) -> list[UnitRecord]:
    record = MeshRecord.read(data_dir)
    if record is None or not record.is_alive():
        raise NotRunning(f"No mesh runs on {data_dir}. `penstock up` starts one.")
    return [unit for unit in record.units if unit.name not in SERVERS]


def _unit(data_dir: Path, name: str) -> UnitRecord:
    units = _services(data_dir)
    for unit in units:
        if unit.name == name:
            return unit
    known = ", ".join(unit.name for unit in units)
    raise NotFound(f"The mesh has no service {name} to restart: {known}.", reason=Reason.RESOURCE_NOT_FOUND)


def _place(unit: UnitRecord) -> tuple[int, str]:
    kind = unit.name.partition("-")[0]
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), unit.name)
