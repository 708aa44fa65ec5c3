"""Every server under every load, in rounds, so that a machine that drifts does so for all alike."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from performance import direct, load
from performance.doors import Door, WrongAnswer
from performance.environments import CannotInstall
from performance.processes import CpuMeter
from performance.results import CLOSED, OPEN, Record, Results, Start
from performance.servers.base import CannotStart, Running, Server
from performance.workloads import WORKLOADS, Workload

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        workloads: Keys of the workloads.
        concurrencies: Levels of the closed loop.
        rates: Levels of the open loop, requests per second: the workload's own if None; none leaves it out.
        doors: Names of the doors; a server without any of them is tried on its first.
        seconds: Of each point.
        warm_up: Seconds of load before each point.
        rounds: Starts of each server.
    """

    workloads: Sequence[str]
    concurrencies: Sequence[int]
    rates: Sequence[float] | None
    doors: Sequence[str]
    seconds: float
    warm_up: float
    rounds: int


def run(plan: Plan, servers: Sequence[Server], results: Results, keep: Callable[[], None], say: Say) -> None:
    """Measure; `keep` is called after each server, `say` with each point."""
    for server in servers:
        if server.name not in results.absent:
            try:
                server.install()
            except CannotInstall as error:
                results.absent[server.name] = f"cannot be installed: {error}"
                say(f"{server.name} {results.absent[server.name]}")
    for key in plan.workloads:
        workload = WORKLOADS[key]
        for number in range(1, plan.rounds + 1):
            if key == "w2":
                _ideal(plan, results, say)
            for server in servers:
                if key in server.workloads and server.name not in results.absent:
                    _serve(plan, server, workload, number, results, say)
                    keep()


def _ideal(plan: Plan, results: Results, say: Say) -> None:
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        results.ideal.append(direct.measure(Path(folder), min(plan.seconds, 5)))
    say(
        "torch direct: " + ", ".join(f"batch {rows} {rate:.0f}/s" for rows, rate in results.ideal[-1].items())
    )


def _serve(plan: Plan, server: Server, workload: Workload, number: int, results: Results, say: Say) -> None:
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        try:
            with server.serve(workload, folder) as running:
                idle = running.tree.pss_mib()
                results.starts.append(Start(workload.key, server.name, number, running.start_seconds, idle))
                for door in choose(running.doors, plan.doors):
                    for record in _points(plan, server, workload, number, running, door, folder):
                        results.records.append(record)
                        say(describe(record))
        except (CannotStart, WrongAnswer) as error:
            results.absent[server.name] = f"cannot serve {workload.key}: {error}"
            say(f"{server.name} {results.absent[server.name]}")


def choose(doors: Sequence[Door], names: Sequence[str]) -> list[Door]:
    """The wanted doors; the preferred one of a server that has none of them."""
    return [door for door in doors if door.name in names] or list(doors[:1])


def _points(
    plan: Plan, server: Server, workload: Workload, number: int, running: Running, door: Door, folder: Path
) -> list[Record]:
    levels = [(CLOSED, float(level)) for level in plan.concurrencies]
    if door.name in ("grpc", "http"):
        rates = workload.rates if plan.rates is None else plan.rates
        levels += [(OPEN, float(rate)) for rate in rates]
    return [
        _point(plan, server, workload, number, running, door, folder, mode, level) for mode, level in levels
    ]


def _point(
    plan: Plan,
    server: Server,
    workload: Workload,
    number: int,
    running: Running,
    door: Door,
    folder: Path,
    mode: str,
    level: float,
) -> Record:
    def drive(seconds: float) -> load.Load:
        if mode == OPEN:
            return load.open_loop(door, workload, level, seconds, folder)
        return load.closed_loop(door, workload, int(level), seconds, folder)

    point = Record(workload.key, server.name, door.name, mode, level, number)
    try:
        # Shorter than some generators' least time: what they say of it does not matter.
        with suppress(load.LoadFailed):
            drive(plan.warm_up)
        with CpuMeter(running.tree).running() as meter:
            seen = drive(plan.seconds)
    except (load.LoadFailed, CannotInstall) as error:
        return replace(point, failure=str(error))
    cost = float("nan")
    if seen.requests:
        cost = meter.total() / seen.requests * 1000
    elif seen.rate:
        cost = meter.cores() / seen.rate * 1000
    return replace(
        point,
        rate=seen.rate,
        p50=seen.p50,
        p99=seen.p99,
        errors=seen.errors,
        cpu_per_1k=cost,
        pss_mib=running.tree.pss_mib(),
    )


def describe(record: Record) -> str:
    """One line."""
    where = f"{record.workload} {record.server:12} {record.door:6}"
    what = f"c={record.level:g}" if record.mode == CLOSED else f"{record.level:g}/s"
    if record.failure:
        return f"{where} {what:8} {record.failure}"
    return (
        f"{where} {what:8} {record.rate:8.0f}/s  p50 {record.p50:7.2f} ms  p99 {record.p99:7.2f} ms  "
        f"{record.cpu_per_1k:5.2f} CPU-s/1k  {record.pss_mib:5.0f} MiB"
        + (f"  {record.errors} errors" if record.errors else "")
    )
