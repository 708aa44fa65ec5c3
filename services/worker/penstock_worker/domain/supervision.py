"""What should run on a node, what does, and when what ended is started again.

The states of a replica as its agent sees it (PENDING is the scheduler's alone):

    STARTING ──▶ READY ──┐
      │  ▲  └──────┬─────┤
      │  └─ BACKOFF◀┘    │
      │        │         │
      └────────┴─────────┴──▶ DRAINING ──▶ STOPPED
"""

from __future__ import annotations

import dataclasses
import enum
import signal
from typing import Protocol

from penstock_worker.domain.replica import BatchingPolicy, Curve

FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A process that was READY for so long is sound: its next end is treated as a first one."""


class ReplicaState(enum.Enum):
    """Where a replica is in its life; the names are those of `penstock.scheduler.v1.ReplicaState`."""

    STARTING = "STARTING"
    READY = "READY"
    BACKOFF = "BACKOFF"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


NEXT_STATES: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.STARTING: frozenset(
        {ReplicaState.READY, ReplicaState.BACKOFF, ReplicaState.DRAINING, ReplicaState.STOPPED}
    ),
    ReplicaState.READY: frozenset({ReplicaState.BACKOFF, ReplicaState.DRAINING, ReplicaState.STOPPED}),
    ReplicaState.BACKOFF: frozenset({ReplicaState.STARTING, ReplicaState.DRAINING, ReplicaState.STOPPED}),
    ReplicaState.DRAINING: frozenset({ReplicaState.STOPPED}),
    ReplicaState.STOPPED: frozenset(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class BundleFile:
    """One file of a bundle."""

    path: str
    """Relative, with '/' separators."""
    size_bytes: int
    sha256: str
    """64 lower-case hexadecimal digits."""


class Fetchable(Protocol):
    """What the cache of bundles can fetch: a version of a model, or an artifact of another kind."""

    @property
    def version_name(self) -> str:
        """models/{model}/versions/{version} or artifacts/{artifact}/versions/{version}."""

    @property
    def digest(self) -> str:
        """Tree digest of the files, of a version with its manifest."""

    @property
    def manifest(self) -> bytes:
        """Serialized `penstock.registry.v1.Manifest`; empty for an artifact."""

    @property
    def files(self) -> tuple[BundleFile, ...]:
        """Every file."""


@dataclasses.dataclass(frozen=True, slots=True)
class WantedFiles:
    """What a job wants fetched; see `Fetchable`."""

    version_name: str
    digest: str
    manifest: bytes
    files: tuple[BundleFile, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class DesiredReplica:
    """One replica that the scheduler wants on this node."""

    replica: str
    """Id, without `replicas/`."""
    deployment: str
    """Id, without `deployments/`."""
    version_name: str
    """models/{model}/versions/{version}."""
    model: str
    version: int
    digest: str
    """Tree digest of the bundle."""
    manifest: bytes
    """Serialized `penstock.registry.v1.Manifest`."""
    manifest_json: str
    """The same in the JSON mapping of protobuf."""
    files: tuple[BundleFile, ...]
    batching: BatchingPolicy
    cpu_millis: int
    memory_bytes: int
    devices: tuple[str, ...]
    queue: str
    draining: bool = False
    """Finish what is queued, take nothing new, then end."""
    handed_over: bool = False
    """With `draining`: others read the same queue, so finish only what was begun."""
    curves: tuple[tuple[str, Curve], ...] = ()
    """What was measured of the version, by the maker's name of the device."""

    def same_process(self, other: DesiredReplica) -> bool:
        """Tell whether a process started for the one serves the other.

        Only how it ends, and what it would start from, may differ.
        """
        return self._process() == other._process()

    def _process(self) -> DesiredReplica:
        return dataclasses.replace(self, draining=False, handed_over=False, curves=())

    def curve_on(self, device: str) -> Curve:
        """Return what was measured on a kind of device; empty if nothing was."""
        return dict(self.curves).get(device, ())


@dataclasses.dataclass(frozen=True, slots=True)
class ObservedReplica:
    """What the agent sees of one replica."""

    replica: str
    state: ReplicaState
    message: str
    pid: int
    """0 while no process runs."""
    restarts: int
    """Times its process ended by itself."""
    memory_bytes: int
    """Bytes that its process has for itself; 0 until measured."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended."""

    status: int | None
    """Exit status; none if a signal ended it."""
    signal: int | None
    """The signal that ended it."""
    peak_memory_bytes: int = 0
    lost: bool = False
    """It died with the fork server; how is not known."""

    def __str__(self) -> str:
        if self.lost:
            return "ended together with the agent's fork server, which starts again"
        if self.signal is not None:
            try:
                name = signal.Signals(self.signal).name
            except ValueError:
                name = f"signal {self.signal}"
            if self.signal != signal.SIGKILL:
                return f"was ended by {name}"
            megabytes = self.peak_memory_bytes / 1e6
            return (
                f"was killed, by an operator or for lack of memory (it had used {megabytes:.0f} MB at most)"
            )
        return f"ended with status {self.status}"


class Backoff:
    """How long to wait before starting again what ended by itself.

    The first time not at all, then 0.1 s, doubling up to 30 s; after 60 s of health from the beginning again.
    """

    def __init__(
        self,
        first_seconds: float = FIRST_PAUSE_SECONDS,
        last_seconds: float = LAST_PAUSE_SECONDS,
        healthy_seconds: float = HEALTHY_SECONDS,
    ) -> None:
        self._first = first_seconds
        self._last = last_seconds
        self._healthy = healthy_seconds
        self._failures = 0

    def pause(self, ready_seconds: float) -> float:
        """Return the seconds to wait now.

        Args:
            ready_seconds: For how long what just ended had been READY.
        """
        if ready_seconds >= self._healthy:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        # The exponent is bounded: 2.0**2000 does not fit a float.
        return min(self._last, self._first * 2.0 ** min(self._failures - 2, 60))
