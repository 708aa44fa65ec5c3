"""Keeps one replica running for as long as it is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import secrets
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from penstock_kit.errors import PenstockError, Reason
from penstock_worker.domain.replica import ProcessState, ReplicaConfig
from penstock_worker.domain.supervision import (
    NEXT_STATES,
    Backoff,
    DesiredReplica,
    ObservedReplica,
    ProcessExit,
    ReplicaState,
)
from penstock_worker.usecases.ports import (
    BundleStore,
    Devices,
    ProcessHost,
    Reclaimer,
    ReplicaLogs,
    ReplicaProcess,
)

log = logging.getLogger(__name__)

KILL_SECONDS = 10.0
"""How long the end of a killed process may take; a process in an uninterruptible read takes its time."""
DRAIN_MARGIN_SECONDS = 1.0
"""The process knows how long it may drain; so long after that it is killed."""
RECLAIM_SECONDS = 60.0
"""Longer than a lease: by then the other replicas have taken the entries over by themselves."""
FIRST_RECLAIM_PAUSE_SECONDS = 0.1
LAST_RECLAIM_PAUSE_SECONDS = 2.0
LOG_LINES = 8
LOG_CHARACTERS = 800

# The device of replicas that were given none.
_CPU = "cpu"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaPolicy:
    """What holds for all replicas of a node."""

    redis_url: str
    start_seconds: float
    drain_seconds: float
    allow_python_runtime: bool = False
    allow_compiled_models: bool = False
    log_level: str = "info"
    otlp_endpoint: str = ""
    scheduler_address: str = ""
    device_models: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Maker's names of the node's devices."""


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """The outside of a keeper."""

    host: ProcessHost
    bundles: BundleStore
    reclaimer: Reclaimer
    logs: ReplicaLogs
    devices: Devices
    spawn: Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]
    """Runs something in the background that outlives the process it is about, but not the agent."""
    changed: Callable[[], None]
    """Called when something that the scheduler should know has changed."""


class _Failed(Exception):
    """A life of the replica ended by itself; the words are for people."""

    def __init__(self, message: str, ready_seconds: float = 0.0, *, process_ended: bool = True) -> None:
        super().__init__(message)
        self.ready_seconds = ready_seconds
        self.process_ended = process_ended


class ReplicaKeeper:
    """Fetches, starts, watches, restarts and ends one replica.

    `run` is its one task. `end` may be called at any time and makes `run` drain the process and return;
    a keeper that has ended stays STOPPED.
    """

    def __init__(self, desired: DesiredReplica, policy: ReplicaPolicy, around: Surroundings) -> None:
        self.desired = desired
        self.state = ReplicaState.STARTING
        self.memory_bytes = 0
        self._handed_over = False
        self.stopped_at = math.inf
        self._message = ""
        self._restarts = 0
        self._process: ReplicaProcess | None = None
        self._policy = policy
        self._around = around
        self._backoff = Backoff()
        self._ending = asyncio.Event()
        self._wake = asyncio.Event()

    @property
    def pid(self) -> int:
        """Process id; 0 while no process runs."""
        return self._process.pid if self._process is not None and self._process.exit is None else 0

    @property
    def ending(self) -> bool:
        """Whether it has been told to end."""
        return self._ending.is_set()

    def observed(self) -> ObservedReplica:
        """Return what the scheduler should know."""
        return ObservedReplica(
            replica=self.desired.replica,
            state=self.state,
            message=self._message,
            pid=self.pid,
            restarts=self._restarts,
            memory_bytes=self.memory_bytes if self.pid else 0,
        )

    def end(self, *, handed_over: bool = False) -> None:
        """Make `run` drain the process and return; of a queue that others read, only what it has begun."""
        if not self._ending.is_set():
            self._handed_over = handed_over
            self._ending.set()
            self._wake.set()

    async def run(self) -> None:
        """Keep the replica running until `end`; never raises but when cancelled."""
        try:
            while not self._ending.is_set():
                try:
                    await self._live()
                except (_Failed, PenstockError) as error:
                    await self._after_failure(error)
                except Exception as error:
                    # A fault of ours must not end the replica for good: it is tried again like any other.
                    log.exception("keeping a replica failed")
                    await self._after_failure(_Failed(f"{type(error).__name__}: {error}"))
        finally:
            self.memory_bytes = 0
            self.stopped_at = time.monotonic()
            self._advance(ReplicaState.STOPPED, "" if self.state is ReplicaState.DRAINING else self._message)

    async def _after_failure(self, error: _Failed | PenstockError) -> None:
        if self._ending.is_set():
            return
        ready_seconds = 0.0
        if isinstance(error, _Failed):
            ready_seconds = error.ready_seconds
            self._restarts += error.process_ended
        pause = self._backoff.pause(ready_seconds)
        log.warning(
            "replica ended by itself",
            extra={"replica": self.desired.replica, "why": str(error), "again_in_seconds": pause},
        )
        self._advance(ReplicaState.BACKOFF, str(error))
        if pause:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ending.wait()
        if not self._ending.is_set():
            self._advance(ReplicaState.STARTING, f"Starting again after: {error}")

    async def _live(self) -> None:
        """One life of the replica: from its bundle to the end of its process.

        Raises:
            _Failed: The process ended by itself, or did not become ready.
            PenstockError: There is no bundle, or no process can be started.
        """
        desired = self.desired
        async with contextlib.AsyncExitStack() as stack:
            lease = self._around.bundles.lease(desired, self._say)
            bundle_dir = await self._unless_ending(stack.enter_async_context(lease))
            if bundle_dir is None:
                return
            environment, devices = self._around.devices.confine(desired.devices)
            config = self._config(desired, bundle_dir, devices)
            self._say("Starting its process.")
            process = await self._unless_ending(
                self._around.host.start_process(
                    config,
                    title=f"ps:{desired.replica}",
                    environment=environment,
                    on_change=self._wake.set,
                )
            )
            if process is None:
                return
            self._process = process
            try:
                self._say("Loading the model.")
                await self._watch(process)
            finally:
                try:
                    if process.exit is None:
                        await self._kill(process)
                finally:
                    self._process = None
                    self._around.spawn(
                        f"reclaim {config.consumer}", self._reclaim(desired.queue, config.consumer)
                    )

    async def _watch(self, process: ReplicaProcess) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        ready_at: float | None = None
        while process.exit is None:
            self._wake.clear()
            if self._ending.is_set():
                await self._drain(process)
                return
            if ready_at is None and process.status and process.status.state is ProcessState.READY:
                ready_at = loop.time()
                log.info(
                    "replica is ready",
                    extra={
                        "replica": self.desired.replica,
                        "pid": process.pid,
                        "load_ms": round((ready_at - began) * 1000),
                    },
                )
                self._advance(ReplicaState.READY, process.status.message)
            left = None if ready_at is not None else self._policy.start_seconds - (loop.time() - began)
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                raise _Failed(
                    f"LOAD_FAILED: it was not ready within {self._policy.start_seconds:g} s."
                ) from None
        if self._ending.is_set():
            return
        ready_seconds = loop.time() - ready_at if ready_at is not None else 0.0
        raise _Failed(
            await asyncio.to_thread(self._why, process, process.exit, ready_at is not None), ready_seconds
        )

    def _why(self, process: ReplicaProcess, how: ProcessExit, was_ready: bool) -> str:
        """Return in words why a process ended: its own if it had any, else its last output."""
        status = process.status
        if status is not None and status.state is ProcessState.FAILED:
            return status.message if was_ready else f"{Reason.LOAD_FAILED.name}: {status.message}"
        what = "The process" if was_ready else "While loading, the process"
        message = f"{what} {how}."
        lines = (
            self._around.logs.tail(self.desired.replica, LOG_LINES) if how.signal != signal.SIGKILL else []
        )
        output = "\n".join(lines)[-LOG_CHARACTERS:]
        return f"{message} Its last output:\n{output}" if output else message

    async def _drain(self, process: ReplicaProcess) -> None:
        """Let the process finish what it has begun; end it when that takes too long."""
        self._advance(ReplicaState.DRAINING, "Finishing what it has begun.")
        await process.signal(signal.SIGUSR1 if self._handed_over else signal.SIGTERM)
        if not await self._ended_within(process, self._policy.drain_seconds + DRAIN_MARGIN_SECONDS):
            log.warning(
                "replica did not drain in time and is killed",
                extra={"replica": self.desired.replica, "pid": process.pid},
            )
            await self._kill(process)

    async def _kill(self, process: ReplicaProcess) -> None:
        await process.signal(signal.SIGKILL)
        if not await self._ended_within(process, KILL_SECONDS):
            log.error(
                "replica process does not die", extra={"replica": self.desired.replica, "pid": process.pid}
            )

    async def _ended_within(self, process: ReplicaProcess, seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while process.exit is None:
            self._wake.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._wake.wait()
            except TimeoutError:
                return False
        return True

    async def _reclaim(self, queue: str, consumer: str) -> None:
        """Hand over what the process had taken; tried again while Redis is away, within bounds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RECLAIM_SECONDS
        pause = FIRST_RECLAIM_PAUSE_SECONDS
        while True:
            try:
                await self._around.reclaimer.reclaim(queue, consumer)
            except PenstockError as error:
                if loop.time() > deadline:
                    log.warning("gave up reclaiming", extra={"consumer": consumer, "error": str(error)})
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_RECLAIM_PAUSE_SECONDS)
            else:
                return

    def _config(self, desired: DesiredReplica, bundle_dir: Path, devices: tuple[str, ...]) -> ReplicaConfig:
        return ReplicaConfig(
            replica=desired.replica,
            # Never used before, also not by an agent that was here earlier.
            consumer=f"{desired.replica}.{secrets.token_hex(4)}",
            queue=desired.queue,
            redis_url=self._policy.redis_url,
            bundle_dir=str(bundle_dir),
            manifest=desired.manifest_json,
            model=desired.model,
            version=desired.version,
            batching=desired.batching,
            devices=devices,
            allow_python_runtime=self._policy.allow_python_runtime,
            allow_compiled_models=self._policy.allow_compiled_models,
            log_level=self._policy.log_level,
            otlp_endpoint=self._policy.otlp_endpoint,
            drain_seconds=self._policy.drain_seconds,
            scheduler_address=self._policy.scheduler_address,
            curve=desired.curve_on(self._policy.device_models.get(next(iter(desired.devices), _CPU), "")),
        )

    async def _unless_ending(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Run a step; give it up and return none if the replica is not wanted any more."""
        step = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({step, ending}, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                return step.result()
            return None
        finally:
            for future in (step, ending):
                future.cancel()
            await asyncio.gather(step, ending, return_exceptions=True)

    def _say(self, message: str) -> None:
        """Tell how far the start is, keeping why there had to be one."""
        if self.state is ReplicaState.STARTING and not self._restarts:
            self._advance(self.state, message)

    def _advance(self, state: ReplicaState, message: str) -> None:
        if state is not self.state and state not in NEXT_STATES[self.state]:
            raise AssertionError(f"{self.desired.replica}: {self.state.name} does not lead to {state.name}")
        self.state = state
        self._message = message
        self._around.changed()
