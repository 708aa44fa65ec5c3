"""Keeps one task of a job: starts it, watches it, ends it, and says how it went."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from penstock_kit.errors import FailedPrecondition, PenstockError
from penstock_worker.domain.task import (
    NEXT_STATES,
    DesiredTask,
    End,
    EndKind,
    ObservedTask,
    TaskState,
)
from penstock_worker.usecases.ports import TaskHost, TaskRun

log = logging.getLogger(__name__)

KILL_SECONDS = 10.0
"""How long the end of killed processes may take."""
GRACE_MARGIN_SECONDS = 2.0
"""The launcher knows the grace, and kills what is left then; so long after that it is killed itself."""
TURN_SECONDS = 180.0
"""How long a task waits before it starts: for one before it to end here, for task 0 to say where to meet."""
MAX_LAUNCHER_DEATHS = 3
LAUNCHER_LOST = "LAUNCHER_LOST"
NOT_STARTED = "NOT_STARTED"
AGENT_RESTARTED = "AGENT_RESTARTED"
"""The scheduler knows this word: it costs the job an attempt, but counts for no failure."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaskPolicy:
    """What holds for all tasks of a node.

    Attributes:
        grace_seconds: How long a task may take to write a checkpoint and end, its upload included.
        turn_seconds: How long it waits for its turn to start.
    """

    grace_seconds: float = 10.0
    turn_seconds: float = TURN_SECONDS


class TaskKeeper:
    """See the module.

    `run` is its one task. `update` and `end` may be called at any time. What has ended stays with its state
    until the scheduler wants it STOPPED, or nothing of it.
    """

    def __init__(
        self,
        desired: DesiredTask,
        policy: TaskPolicy,
        host: TaskHost,
        changed: Callable[[], None],
        before: Collection[asyncio.Task[None]] = (),
    ) -> None:
        self.desired = desired
        self.state = TaskState.STARTING
        self.stopped_at = math.inf
        self._message = ""
        self._end: End | None = None
        self._policy = policy
        self._host = host
        self._told = changed
        self._before = before
        self._run: TaskRun | None = None
        self._ending = asyncio.Event()
        self._wake = asyncio.Event()
        self._deaths = 0

    @property
    def ended(self) -> bool:
        """Whether it holds nothing any more."""
        return self.state is TaskState.STOPPED

    @property
    def _leads_others(self) -> bool:
        return self.desired.tasks > 1 and self.desired.index == 0

    def observed(self) -> ObservedTask:
        """Return what the scheduler should know."""
        run, end = self._run, self._end
        failed = end if end is not None and self.state is TaskState.FAILED else None
        done = (
            run if run is not None and self.state is TaskState.SUCCEEDED and not self.desired.index else None
        )
        return ObservedTask(
            name=self.desired.name,
            state=self.state,
            message=self._message,
            pid=run.pid if run else 0,
            rendezvous=run.rendezvous if run else "",
            cause=failed.cause if failed else "",
            permanent=failed.permanent if failed else False,
            # All the time: what is left of a job that does not succeed is deleted by these names.
            results=run.results if run is not None and not self.desired.index else (),
            report=done.report if done else b"",
            memory_bytes=run.memory_bytes if run else 0,
            last_event=run.last_event if run else 0,
        )

    def update(self, desired: DesiredTask) -> None:
        """Take up what may change: where the ranks meet, what is stored, that it must stop."""
        self.desired = desired
        if self._run is not None:
            self._run.note_stored(desired.stored_event)
        if desired.stopping:
            self.end()
        self._wake.set()

    def end(self) -> None:
        """Make `run` stop the task, with a checkpoint if it can, and return."""
        self._ending.set()
        self._wake.set()

    async def run(self) -> None:
        """Run the task until `end`; never raises but when cancelled."""
        try:
            await self._live()
        except Exception as error:
            # A fault of ours ends the task, not the agent; the scheduler starts a new attempt.
            log.exception("keeping a task failed")
            self._conclude(End(EndKind.FAILED, f"{type(error).__name__}: {error}", "INTERNAL"))
        finally:
            try:
                await self._clear_away()
            finally:
                self.stopped_at = time.monotonic()
        await self._ending.wait()
        self._advance(TaskState.STOPPED, self._message)

    async def forget(self) -> None:
        """Give up its events; called once it is STOPPED and nobody wants it."""
        if self._run is not None:
            run, self._run = self._run, None
            await run.forget()

    async def _live(self) -> None:
        try:
            self._host.check(self.desired)
        except FailedPrecondition as error:
            self._conclude(End(EndKind.FAILED, str(error), error.reason.name, permanent=True))
            return
        try:
            await self._in_time(self._until_others_ended())
            if self._end is not None or self._ending.is_set():
                return
            run = self._run = await self._host.admit(self.desired, self._changed)
            if run.resumed and self._leads_others:
                # An agent before this one ran it: the store where the ranks of all tasks meet died with it.
                self._conclude(End(EndKind.FAILED, "Its agent was restarted.", AGENT_RESTARTED))
                return
            await self._in_time(self._until_meeting_place())
            while self._end is None and not self._ending.is_set():
                await self._unless_ending(run.start(self.desired))
                end = await self._watch(run) if run.pid or run.exit else End(EndKind.STOPPED)
                if end is None:
                    continue
                self._conclude(end)
                return
        except PenstockError as error:
            self._conclude(End(EndKind.FAILED, str(error), error.reason.name))

    async def _in_time(self, turn: Coroutine[Any, Any, None]) -> None:
        """Wait for its turn; one that does not come ends the task, and the scheduler tries anew."""
        try:
            async with asyncio.timeout(self._policy.turn_seconds):
                await turn
        except TimeoutError:
            words = f"It did not start within {self._policy.turn_seconds:g} s. {self._message}"
            self._conclude(End(EndKind.FAILED, words.rstrip(), NOT_STARTED))

    async def _until_others_ended(self) -> None:
        """Wait for the attempts before this one to end here: they write into the same directory."""
        others = [task for task in self._before if not task.done()]
        if others:
            self._advance(self.state, "Waiting for the attempt before to end on this node.")
            await self._unless_ending(asyncio.wait(others))

    async def _unless_ending(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do a step; give it up if the task is not wanted any more."""
        step = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({step, ending}, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                step.result()
        finally:
            for future in (step, ending):
                future.cancel()
            await asyncio.gather(step, ending, return_exceptions=True)

    async def _until_meeting_place(self) -> None:
        """Wait until task 0 has said where the ranks meet; it need not wait itself."""
        while self.desired.index and not self.desired.rendezvous and not self._ending.is_set():
            self._advance(self.state, "Waiting for the first task to say where the ranks meet.")
            self._wake.clear()
            await self._wake.wait()

    async def _watch(self, run: TaskRun) -> End | None:
        """Watch one launcher to its end; none means to start another."""
        while run.exit is None:
            self._wake.clear()
            if self._ending.is_set():
                return await self._stop(run)
            if run.running and self.state is TaskState.STARTING:
                self._advance(TaskState.RUNNING, "")
            await self._wake.wait()
        await run.sweep()
        if run.end is not None:
            return run.end
        self._deaths += 1
        how = f"The launcher {run.exit}"
        if self._deaths > MAX_LAUNCHER_DEATHS or self._leads_others:
            # With task 0's launcher the store is gone where the ranks of all tasks meet.
            return End(EndKind.FAILED, f"{how}.", LAUNCHER_LOST)
        run.say(f"{how}; it starts again, from the last checkpoint.")
        return None

    async def _stop(self, run: TaskRun) -> End:
        """Have the ranks write a checkpoint and end; kill what does not, and wait a little for the upload."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._policy.grace_seconds
        self._advance(self.state, "Writing a checkpoint and ending.")
        await run.signal(signal.SIGTERM)
        if not await self._exited(run, self._policy.grace_seconds + GRACE_MARGIN_SECONDS):
            await run.signal(signal.SIGKILL)
            if not await self._exited(run, KILL_SECONDS):
                log.error("a task does not die", extra={"task": self.desired.name, "pid": run.pid})
        await run.sweep()
        await run.settle(max(0.0, deadline - loop.time()))
        end = run.end
        if end is not None and end.kind is not EndKind.SUCCEEDED:
            return dataclasses.replace(end, kind=EndKind.STOPPED)
        return end or End(EndKind.STOPPED, "It was killed.")

    async def _exited(self, run: TaskRun, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while run.exit is None:
                    self._wake.clear()
                    await self._wake.wait()
        return run.exit is not None

    async def _clear_away(self) -> None:
        run = self._run
        if run is None:
            return
        if run.exit is None and run.pid:
            await run.signal(signal.SIGKILL)
            await self._exited(run, KILL_SECONDS)
        await run.sweep()
        await run.release()

    def _conclude(self, end: End) -> None:
        self._end = end
        match end.kind:
            case EndKind.SUCCEEDED:
                self._advance(TaskState.SUCCEEDED, end.message)
            case EndKind.STOPPED:
                # Nobody but the scheduler asks for that; of several tasks, another may have heard it first.
                self._advance(TaskState.STOPPED, end.message or "It has stopped, as it was asked to.")
            case _:
                self._advance(TaskState.FAILED, end.message)
        log.info(
            "task has ended",
            extra={"task": self.desired.name, "how": end.kind.name, "cause": end.cause, "why": end.message},
        )

    def _changed(self) -> None:
        self._wake.set()
        self._told()

    def _advance(self, state: TaskState, message: str) -> None:
        if state is self.state and message == self._message:
            return
        if state is not self.state and state not in NEXT_STATES[self.state]:
            raise AssertionError(f"{self.desired.name}: {self.state.name} does not lead to {state.name}")
        self.state = state
        self._message = message
        self._told()
