"""What becomes of a server that is asked for more than it can: goodput by offered load, and the time after.

The model sleeps 20 ms for up to eight rows, so every server's model can do 400 rows a second by design and
the rest of the machine is free: for the front of the server, and for a generator that is never the limit.
Each call has 250 ms. What counts is answers within that time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from performance import load
from performance.doors import Door, WrongAnswer
from performance.environments import CannotInstall
from performance.results import Results
from performance.servers.base import CannotStart, Running, Server
from performance.workloads import SLEEP_SECONDS, WORKLOADS
from support.open_loop import Phase, Summary, Target, Trace, grpc_target, http_target, run

DEADLINE_SECONDS = 0.250
FACTORS = (0.5, 1.0, 1.5, 2.0)
NAME = "overload"
# Enough open calls to keep every batch full, few enough that each is answered in time.
_CAPACITY_CONCURRENCY = 64
_CALM = 0.5
_CALM_SECONDS = 2.0
_AFTER_SECONDS = 5.0
_DRAIN_SECONDS = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One offered load.

    Attributes:
        factor: Times the capacity.
        during: While it lasted.
        back_after: Seconds from its end, when half the capacity is offered again, until calls are answered
            in time again; infinite if they are not within the five seconds that are looked at.
        late_ms: By how much the generator itself was late (p99).
    """

    factor: float
    during: Summary
    back_after: float
    late_ms: float


def measure(
    servers: Sequence[Server], results: Results, seconds: float, seed: int, keep: Callable[[], None], say: Say
) -> None:
    """Load each server with 0.5, 1, 1.5 and 2 times what it can, and write down what it made of it."""
    found: dict[str, Any] = results.experiments.setdefault(NAME, {})
    for server in servers:
        if "sleep" not in server.workloads or server.name in results.absent:
            continue
        try:
            server.install()
            with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
                found[server.name] = _measure(server, Path(folder), seconds, seed, say)
        except (CannotInstall, CannotStart, WrongAnswer, load.LoadFailed) as error:
            results.absent[server.name] = f"overload: {error}"
            say(f"{server.name} {results.absent[server.name]}")
        keep()


def _measure(server: Server, folder: Path, seconds: float, seed: int, say: Say) -> dict[str, Any]:
    workload = WORKLOADS["sleep"]
    with server.serve(workload, folder) as running:
        door = running.doors[0]
        try:
            capacity = load.closed_loop(door, workload, _CAPACITY_CONCURRENCY, max(2.0, seconds), folder).rate
        except load.LoadFailed as error:
            # A server that refuses what waited too long ends the generator's run.
            say(f"{server.name}: {error}; its capacity is taken to be that of the model")
            capacity = workload.max_batch / SLEEP_SECONDS
        say(f"{server.name}: {capacity:.0f}/s is its capacity")
        steps: list[Step] = []
        note = ""
        for number, factor in enumerate(FACTORS):
            phases = [
                Phase(capacity * _CALM, _CALM_SECONDS),
                Phase(capacity * factor, seconds),
                Phase(capacity * _CALM, _AFTER_SECONDS),
            ]
            trace = run(target(door, workload.model), phases, deadline=DEADLINE_SECONDS, seed=seed + number)
            steps.append(_step(factor, trace))
            say(f"{server.name}: {_describe(steps[-1])}")
            note = _drained(running, door)
            if note:
                say(f"{server.name}: {note}")
                break
    return {"capacity": capacity, "seed": seed, "note": note, "steps": [asdict(step) for step in steps]}


def target(door: Door, model: str) -> Target:
    """The door as the open loop calls it."""
    if door.name == "wrk":
        return http_target(door.address, door.path, door.body, door.headers)
    return grpc_target(door.address, model, WORKLOADS["sleep"].width)


def _step(factor: float, trace: Trace) -> Step:
    return Step(
        factor, trace.phase(1), trace.recovered_after(_CALM_SECONDS + trace.phases[1].seconds), trace.lag
    )


def _drained(running: Running, door: Door) -> str:
    """Wait until a lone call is answered; say why not if that never comes."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while time.monotonic() < deadline:
        if not running.tree.pids():
            return "it died of it"
        with suppress(OSError, grpc.RpcError, WrongAnswer):
            door.ask(WORKLOADS["sleep"], timeout=1.0)
            return ""
        time.sleep(0.2)
    return f"it answers nothing {_DRAIN_SECONDS:.0f} s later: dead, or at work on what nobody waits for"


def _describe(step: Step) -> str:
    s = step.during
    refused = f"refused {s.refused:.0f}/s in {s.refusal_p50:.1f} ms, " if s.refused else ""
    return (
        f"{step.factor:g} × capacity: offered {s.offered:.0f}/s, goodput {s.goodput:.0f}/s, {refused}"
        f"back after {step.back_after:.2f} s; {s.outcomes}; generator late {step.late_ms:.1f} ms"
    )
