"""What the use cases need from the outside; the adapters provide it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from penstock_worker.domain.node import CachedBundle
from penstock_worker.domain.replica import ProcessStatus, ReplicaConfig
from penstock_worker.domain.supervision import Fetchable, ProcessExit
from penstock_worker.domain.task import DesiredTask, End


class ReplicaProcess(Protocol):
    """A running replica process, or what is left of one."""

    @property
    def pid(self) -> int:
        """Process id."""

    @property
    def status(self) -> ProcessStatus | None:
        """The last state the process told; none before its first."""

    @property
    def exit(self) -> ProcessExit | None:
        """How it ended; none while it runs."""

    async def signal(self, number: int) -> None:
        """Send a signal; SIGKILL goes to all that the process started. Nothing happens if it has ended."""


class ProcessHost(Protocol):
    """Starts replica processes."""

    async def start_process(
        self,
        config: ReplicaConfig,
        *,
        title: str,
        environment: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> ReplicaProcess:
        """Start a process; call `on_change` whenever its status or exit changes.

        Raises:
            Unavailable: it cannot be started now; trying again later may help.
        """


class BundleStore(Protocol):
    """Bundles on this node."""

    def lease(
        self, replica: Fetchable, progress: Callable[[str], None]
    ) -> contextlib.AbstractAsyncContextManager[Path]:
        """Provide files, checked, and keep them for as long as the context lasts.

        Args:
            replica: Says which version or artifact, and its files and digest.
            progress: Called with words for people while the bundle is fetched.

        Raises:
            PenstockError: the bundle cannot be had; the message says why.
        """

    def cached(self) -> tuple[CachedBundle, ...]:
        """Return what is complete in the cache."""


class Reclaimer(Protocol):
    """Hands a dead process's requests to the others that read its queue."""

    async def reclaim(self, queue: str, consumer: str) -> None:
        """Hand over all that the consumer had taken and not answered.

        Raises:
            Unavailable: Redis cannot be reached.
        """


class ReplicaLogs(Protocol):
    """What replica processes wrote to their standard output and error."""

    def tail(self, replica: str, lines: int) -> list[str]:
        """Return the last lines; none if there is no log."""


class TaskRun(Protocol):
    """A task on this node: its launcher, if it runs, and what that has said."""

    @property
    def pid(self) -> int:
        """Process id of the launcher; 0 while there is none."""

    @property
    def exit(self) -> ProcessExit | None:
        """How the launcher ended; none while it runs."""

    @property
    def end(self) -> End | None:
        """What the launcher said the end of the task to be."""

    @property
    def resumed(self) -> bool:
        """Whether an agent before this one has run it here."""

    @property
    def running(self) -> bool:
        """Whether ranks have started."""

    @property
    def rendezvous(self) -> str:
        """host:port of the store where the ranks meet; of task 0."""

    @property
    def memory_bytes(self) -> int:
        """What its processes have for themselves."""

    @property
    def results(self) -> tuple[str, ...]:
        """What it has published."""

    @property
    def report(self) -> bytes:
        """What it has found, a serialized google.protobuf.Struct."""

    @property
    def last_event(self) -> int:
        """Number of its last event."""

    def note_stored(self, number: int) -> None:
        """Take up which events the scheduler has stored."""

    def say(self, text: str) -> None:
        """Put a line into the job's log."""

    async def start(self, desired: DesiredTask) -> None:
        """Start a launcher; again after the end of the one before.

        Raises:
            PenstockError: It cannot be started.
        """

    async def signal(self, number: int) -> None:
        """Send a signal to the launcher; SIGKILL goes to all of its group."""

    async def sweep(self) -> None:
        """After the end of the launcher: kill what it may have left behind."""

    async def settle(self, seconds: float) -> None:
        """Wait, within bounds, until the last checkpoint is in the registry."""

    async def release(self) -> None:
        """Let go of what was fetched; events are sent on until `forget`."""

    async def forget(self) -> None:
        """The scheduler wants nothing of it any more."""


class TaskHost(Protocol):
    """Runs tasks of jobs."""

    def check(self, desired: DesiredTask) -> None:
        """Raise FailedPrecondition unless this node runs such work."""

    async def admit(self, desired: DesiredTask, changed: Callable[[], None]) -> TaskRun:
        """Provide what a task needs before its processes can start; `changed` is called when it says more.

        Raises:
            Unavailable: The disk cannot be used.
        """


class Devices(Protocol):
    """The devices of this node."""

    def confine(self, devices: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return (environment variables that confine a process to these devices, what it calls its GPUs).

        Raises:
            FailedPrecondition: the node has no such device.
        """
