"""What is done to a mesh. A fault knows nothing of traffic: it is injected, lasts, and heals.

`explains` are the codes that callers may be told because of it. `heal` returns when the mesh says that all
is well again, so that a strike lasts from the first moment of the fault to its last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import psutil
import redis

import penstock
from penstock.errors import PenstockError
from penstock.scheduler.v1 import replica_pb2
from support.chaos.history import History, Strike
from support.chaos.wire import Wire
from support.mesh_process import Mesh

_HEAL_SECONDS = 40.0


class Fault(ABC):
    """Something that goes wrong, and right again."""

    explains: frozenset[str] = frozenset()

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def inject(self) -> None:
        """Let it go wrong."""

    @abstractmethod
    def heal(self) -> None:
        """Let it go right, and wait until the mesh says so. Harmless if it was never injected."""


async def strike(fault: Fault, history: History, seconds: float = 0.0) -> Strike:
    """Let a fault last for some seconds; return when it has healed."""
    struck = Strike(fault.name, sorted(fault.explains), time.monotonic())
    try:
        await asyncio.to_thread(fault.inject)
        struck.done = time.monotonic()
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(fault.heal)
        struck.ended = time.monotonic()
        history.struck(struck)
    return struck


async def schedule(
    faults: Sequence[Fault],
    history: History,
    draw: random.Random,
    seconds: float,
    *,
    longest: float = 5.0,
    say: Callable[[str], None] = print,
) -> None:
    """Let faults come by chance, one or two at a time, for some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        chosen = draw.sample(faults, draw.choice([1, 1, 2]))
        lasting = [draw.uniform(0.0, longest) for _ in chosen]
        said = " and ".join(f"{fault.name} for {s:.1f} s" for fault, s in zip(chosen, lasting, strict=True))
        say(f"  {end - time.monotonic():5.1f} s left: {said}")
        async with asyncio.TaskGroup() as group:
            for fault, s in zip(chosen, lasting, strict=True):
                group.create_task(strike(fault, history, s))
        await asyncio.sleep(draw.uniform(0.0, 1.5))


class KillUnit(Fault):
    """kill -9, or another signal, to a process of the mesh that its supervisor starts again."""

    def __init__(self, mesh: Mesh, unit: str, number: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(f"{number.name} to {unit}")
        self._mesh = mesh
        self._unit = unit
        self._number = number
        self._pid: int | None = None
        if unit.startswith("gateway"):
            # Its calls end with their connections; who calls while it is away is not answered either.
            self.explains = frozenset({"UNAVAILABLE"})

    def inject(self) -> None:
        self._mesh.wait(self._find, f"{self._unit} runs", _HEAL_SECONDS)
        assert self._pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, self._number)

    def _find(self) -> bool:
        self._pid = self._mesh.unit(self._unit).pid
        return self._pid is not None

    def heal(self) -> None:
        if self._pid is not None:
            self._mesh.wait_restarted(self._unit, self._pid, _HEAL_SECONDS)
            self._pid = None


class KillReplica(Fault):
    """kill -9 to one replica of a deployment, which its agent starts again."""

    def __init__(self, mesh: Mesh, deployment: str, number: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(f"{number.name} to a replica of {deployment}")
        self._mesh = mesh
        self._deployment = deployment
        self._number = number
        self._pid = 0

    def inject(self) -> None:
        with penstock.Client(self._mesh.address) as client:
            self._mesh.wait(lambda: ready_replicas(client, self._deployment), "a replica", _HEAL_SECONDS)
            self._pid = ready_replicas(client, self._deployment)[0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, self._number)

    def heal(self) -> None:
        if not self._pid:
            return
        with penstock.Client(self._mesh.address) as client:
            self._mesh.wait(
                lambda: self._pid not in ready_replicas(client, self._deployment, default=[self._pid]),
                "the replica is replaced",
                _HEAL_SECONDS,
            )
            self._mesh.wait(lambda: ready_replicas(client, self._deployment), "a replica", _HEAL_SECONDS)
        self._pid = 0


class Pause(Fault):
    """SIGSTOP to processes, with their children if they have the same fate, and SIGCONT."""

    def __init__(self, name: str, pids: Callable[[], Sequence[int]], *, whole_trees: bool = False) -> None:
        super().__init__(f"SIGSTOP to {name}")
        self._find = pids
        self._whole_trees = whole_trees
        self._pids: list[int] = []

    def inject(self) -> None:
        for pid in self._find():
            self._pids.append(pid)
            if self._whole_trees:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._pids += [child.pid for child in psutil.Process(pid).children(recursive=True)]
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def heal(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._pids = []


def pause_unit(mesh: Mesh, unit: str) -> Pause:
    """SIGSTOP to a process of the mesh.

    A gateway and PostgreSQL stop with their children: they are one service. A worker agent does not: its
    replicas go on without it.
    """

    def find() -> list[int]:
        mesh.wait(lambda: mesh.unit(unit).pid, f"{unit} runs", _HEAL_SECONDS)
        return [pid for pid in [mesh.unit(unit).pid] if pid]

    return Pause(unit, find, whole_trees=unit.startswith(("gateway", "postgres")))


def pause_replica(mesh: Mesh, deployment: str) -> Pause:
    """SIGSTOP to one replica of a deployment."""

    def find() -> list[int]:
        with penstock.Client(mesh.address) as client:
            mesh.wait(lambda: ready_replicas(client, deployment), "a replica", _HEAL_SECONDS)
            return ready_replicas(client, deployment)[:1]

    return Pause(f"a replica of {deployment}", find)


class PauseRedis(Fault):
    """Redis answers nobody for a while (CLIENT PAUSE), and keeps its data."""

    def __init__(self, client: redis.Redis, seconds: float) -> None:
        super().__init__(f"Redis pauses for {seconds:g} s")
        self._client = client
        self._seconds = seconds

    def inject(self) -> None:
        self._client.client_pause(int(self._seconds * 1000))

    def heal(self) -> None:
        # UNPAUSE would have to wait for the pause itself.
        self._client.ping()


class ForgetAll(Fault):
    """Redis loses its data, and goes on."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__("FLUSHALL")
        self._client = client

    def inject(self) -> None:
        self._client.flushall()

    def heal(self) -> None:
        """Whoever still waits for what was lost sends it again; there is nothing to wait for."""


class CutWire(Fault):
    """All connections end in the middle of a command, or of a reply."""

    def __init__(self, wire: Wire, *, replies: bool) -> None:
        super().__init__(f"all connections cut in the middle of a {'reply' if replies else 'command'}")
        self._wire = wire
        self._replies = replies

    def inject(self) -> None:
        self._wire.cut(replies=self._replies)

    def heal(self) -> None:
        """Who was cut connects again by itself."""


class SilenceWire(Fault):
    """A partition: what is sent vanishes, and neither side learns of it, also when it is over."""

    def __init__(self, wire: Wire) -> None:
        super().__init__("a partition that leaves connections half-open")
        self._wire = wire

    def inject(self) -> None:
        self._wire.silence()

    def heal(self) -> None:
        self._wire.speak()


class Redeploy(Fault):
    """A deployment gets another version while it serves."""

    def __init__(self, mesh: Mesh, deployment: str, version: int) -> None:
        super().__init__(f"{deployment} gets version {version}")
        self._mesh = mesh
        self._deployment = deployment
        self._version = version

    def inject(self) -> None:
        with penstock.Client(
            self._mesh.address, retry_seconds=_HEAL_SECONDS, timeout=_HEAL_SECONDS
        ) as client:
            client.deploy(self._deployment, f"{self._deployment}:{self._version}")

    def heal(self) -> None:
        """It goes on by itself, and another fault may come meanwhile."""


class Again(Fault):
    """A fault, again and again.

    Args:
        fault: Which.
        times: How often.
        every: Seconds between.
    """

    def __init__(self, fault: Fault, times: int, every: float) -> None:
        super().__init__(f"{times} times {fault.name}")
        self.explains = fault.explains
        self._fault = fault
        self._times = times
        self._every = every

    def inject(self) -> None:
        for number in range(self._times):
            if number:
                time.sleep(self._every)
            self._fault.inject()
            self._fault.heal()

    def heal(self) -> None:
        """Each time has healed."""


def ready_replicas(client: penstock.Client, deployment: str, default: Sequence[int] = ()) -> list[int]:
    """The processes of a deployment's replicas that would answer now; `default` if nobody can say."""
    try:
        found = client.list_replicas(deployment=deployment)
    except PenstockError:
        return list(default)
    return [r.pid for r in found if r.pid and r.state == replica_pb2.REPLICA_STATE_READY]
