"""Starts launchers of tasks, and knows of each what its keeper asks."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from penstock_kit.errors import FailedPrecondition, Reason
from penstock_kit.threads import in_thread
from penstock_worker.adapters.forkserver.client import ForkServer
from penstock_worker.adapters.forkserver.process import ForkedProcess
from penstock_worker.adapters.jobs import limits
from penstock_worker.adapters.jobs.config import LauncherConfig
from penstock_worker.adapters.jobs.desk import Desk
from penstock_worker.adapters.jobs.events import SPOOL_SUFFIX, EventSender
from penstock_worker.adapters.jobs.registry import JobRegistry
from penstock_worker.adapters.jobs.rooms import JobRoom, JobRooms
from penstock_worker.adapters.jobs.services import TaskClerk
from penstock_worker.adapters.jobs.spool import EventSpool
from penstock_worker.domain.supervision import ProcessExit
from penstock_worker.domain.task import DesiredTask, End
from penstock_worker.usecases.ports import BundleStore, Devices

log = logging.getLogger(__name__)

# The kind of work that calls deployments; it runs no code of users, from whom addresses are kept.
CALLING_KIND = "batch_predict"
LAUNCHER_ENTRY = "penstock_worker.adapters.jobs.launcher:run_launcher"


@dataclasses.dataclass(frozen=True, slots=True)
class HostPolicy:
    """What holds for all tasks of a node.

    Attributes:
        host: Address of this node as ranks on other nodes see it.
        grace_seconds: Between being asked to stop and being killed.
        max_regroups: Times that ranks start again in place after one was killed.
        log_bytes: The log of a task is rotated at this size.
        allow_user_code: Programs of users may run here.
        allow_python_runtime: Versions with code of their own may be opened, to be measured, say.
        allow_compiled_models: Versions with compiled code may be opened likewise.
        processor: The maker's name of the processor.
        nice: How much the processes of jobs step back behind replicas.
        redis_url: Where the queues of deployments are, for batch predictions.
        scheduler_address: Who knows the routes, likewise.
    """

    host: str = "127.0.0.1"
    grace_seconds: float = 10.0
    max_regroups: int = 5
    log_bytes: int = 8 * 1024**2
    allow_user_code: bool = False
    allow_python_runtime: bool = False
    allow_compiled_models: bool = False
    processor: str = ""
    nice: int = 10
    redis_url: str = ""
    scheduler_address: str = ""


class TaskRoom:
    """A task from the moment that it is wanted until it is forgotten; see `usecases.ports.TaskRun`."""

    def __init__(
        self,
        desired: DesiredTask,
        room: JobRoom,
        clerk: TaskClerk,
        host: TaskHost,
        changed: Callable[[], None],
        *,
        resumed: bool,
    ) -> None:
        self.resumed = resumed
        """Whether an agent before this one has started it here."""
        self._desired = desired
        self._room = room
        self._clerk = clerk
        self._host = host
        self._changed = changed
        self._process: ForkedProcess | None = None
        self._token = ""

    @property
    def pid(self) -> int:
        """Process id of the launcher; 0 while there is none."""
        return self._process.pid if self._process is not None and self._process.exit is None else 0

    @property
    def exit(self) -> ProcessExit | None:
        """How the launcher ended; none while it runs."""
        return self._process.exit if self._process is not None else None

    @property
    def end(self) -> End | None:
        """What the launcher said the end of the task to be."""
        return self._clerk.end

    @property
    def running(self) -> bool:
        """Whether ranks have started."""
        return self._clerk.running

    @property
    def rendezvous(self) -> str:
        """host:port of the store where the ranks meet; of task 0."""
        return self._clerk.rendezvous

    @property
    def memory_bytes(self) -> int:
        """What its processes have for themselves."""
        return self._clerk.memory_bytes if self.pid else 0

    @property
    def results(self) -> tuple[str, ...]:
        """What it has published."""
        return tuple(self._clerk.results)

    @property
    def report(self) -> bytes:
        """What it has found, a serialized Struct."""
        return self._clerk.report

    @property
    def last_event(self) -> int:
        """Number of its last event."""
        return self._clerk.spool.last

    def note_stored(self, number: int) -> None:
        """Take up which events the scheduler has stored."""
        self._clerk.spool.note_stored(number)

    def say(self, text: str) -> None:
        """Put a line into the job's log."""
        self._clerk.say(text, error=True)

    async def start(self, desired: DesiredTask) -> None:
        """Start a launcher; after the end of the one before, if there was one.

        Raises:
            PenstockError: It cannot be started.
        """
        self._desired = desired
        self._clerk.begin()
        self._token = self._host.desk.open(self._clerk)
        self._process = await self._host.launch(desired, self._room.directory, self._token, self._changed)

    async def signal(self, number: int) -> None:
        """Send a signal to the launcher; SIGKILL goes to all of its group."""
        if self._process is not None:
            await self._process.signal(number)

    async def sweep(self) -> None:
        """After the end of the launcher: kill what it may have left, and serve it no more."""
        if not self._token:
            return
        left = await asyncio.to_thread(limits.kill_marked, limits.mark_of(self._token))
        if left:
            log.warning(
                "processes of a job were left behind", extra={"task": self._desired.name, "count": left}
            )
        self._host.desk.close(self._token)
        self._token = ""

    async def settle(self, seconds: float) -> None:
        """Wait, within bounds, until the last checkpoint is in the registry."""
        await self._room.uploads.settle(seconds)

    async def release(self) -> None:
        """Let go of what was fetched, and of what was made of it; events are sent on until `forget`."""
        await self._clerk.close()
        if self._room.users == 1:
            await in_thread(self._room.tidy)

    async def forget(self) -> None:
        """The scheduler wants nothing of it any more."""
        self._host.sender.remove(self._clerk.spool)
        await in_thread(self._clerk.spool.close, remove=True)
        self._host.rooms.leave(self._room)


class TaskHost:
    """See the module.

    Args:
        forks: Where processes come from.
        desk: Where they ask for things.
        rooms: The jobs of this node.
        sender: Sends events.
        registry: For jobs.
        bundles: The cache.
        devices: The devices of this node.
        entries: What a rank runs, "package.module:function" by kind of work.
        policy: What holds for all.
    """

    def __init__(
        self,
        *,
        forks: ForkServer,
        desk: Desk,
        rooms: JobRooms,
        sender: EventSender,
        registry: JobRegistry,
        bundles: BundleStore,
        devices: Devices,
        entries: Mapping[str, str],
        policy: HostPolicy,
    ) -> None:
        self.desk = desk
        self.rooms = rooms
        self.sender = sender
        self._forks = forks
        self._registry = registry
        self._bundles = bundles
        self._devices = devices
        self._entries = entries
        self._policy = policy

    async def admit(self, desired: DesiredTask, changed: Callable[[], None]) -> TaskRoom:
        """Provide what a task needs before its processes can start.

        Raises:
            FailedPrecondition: This node does not run such work.
            Unavailable: The disk cannot be used.
        """
        room = await self.rooms.enter(desired.job, desired.index, desired.made)
        resumed = await in_thread(_launcher_log(room.directory, desired).exists)
        path = room.directory / "events" / f"{desired.number}{SPOOL_SUFFIX}"
        spool = await in_thread(EventSpool, path, desired.name, desired.stored_event)
        self.sender.add(spool)
        clerk = TaskClerk(
            desired,
            room,
            spool,
            sender=self.sender,
            registry=self._registry,
            bundles=self._bundles,
            processor=self._policy.processor,
            changed=changed,
        )
        return TaskRoom(desired, room, clerk, self, changed, resumed=resumed)

    def check(self, desired: DesiredTask) -> None:
        """Raise FailedPrecondition unless this node runs such work."""
        if desired.kind not in self._entries:
            raise FailedPrecondition(
                f"This node's release of Penstock does not know jobs of the kind {desired.kind!r}; it knows "
                f"{', '.join(sorted(self._entries))}.",
                reason=Reason.UNSUPPORTED,
            )
        if desired.user_code and not self._policy.allow_user_code:
            raise FailedPrecondition(
                "This node runs no programs of users. Its operator allows them with "
                "PENSTOCK_ALLOW_USER_CODE=true; a recipe needs none.",
                reason=Reason.UNSUPPORTED,
            )

    async def launch(
        self, desired: DesiredTask, directory: Path, token: str, changed: Callable[[], None]
    ) -> ForkedProcess:
        """Start the launcher of a task.

        Raises:
            PenstockError: It cannot be started.
        """
        environment, gpus = self._devices.confine(desired.devices)
        logs = directory / "logs"
        config = LauncherConfig(
            task=desired.name,
            index=desired.index,
            tasks=desired.tasks,
            least_tasks=desired.least_tasks,
            ranks=desired.ranks,
            attempt=desired.attempt,
            entry=self._entries[desired.kind],
            spec=base64.b64encode(desired.spec).decode(),
            desk=self.desk.path,
            token=token,
            directory=str(directory),
            log_path=str(logs / f"{desired.number}.log"),
            log_bytes=self._policy.log_bytes,
            memory_bytes=desired.memory_bytes,
            threads=desired.threads,
            devices=tuple(f"cuda:{gpu.removeprefix('gpu')}" for gpu in gpus) or ("cpu",),
            host=self._policy.host,
            rendezvous=desired.rendezvous,
            grace_seconds=self._policy.grace_seconds,
            max_regroups=self._policy.max_regroups,
            user_code=desired.user_code,
            max_output_bytes=desired.max_output_bytes,
            max_processes=desired.max_processes,
            allow_python_runtime=self._policy.allow_python_runtime,
            allow_compiled_models=self._policy.allow_compiled_models,
            nice=self._policy.nice,
            redis_url=self._policy.redis_url if desired.kind == CALLING_KIND else "",
            scheduler_address=self._policy.scheduler_address if desired.kind == CALLING_KIND else "",
        )
        return await self._forks.start_program(
            f"{desired.name}.{secrets.token_hex(4)}",
            LAUNCHER_ENTRY,
            config.to_json(),
            log=_launcher_log(directory, desired),
            title=limits.mark_of(token),
            environment=environment,
            on_change=changed,
        )


def _launcher_log(directory: Path, desired: DesiredTask) -> Path:
    """Return what is there from the first start of a task on."""
    return directory / "logs" / f"{desired.number}.launcher.log"
