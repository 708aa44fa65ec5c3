"""Makes the tasks of jobs that run on this node equal to those that the scheduler wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from penstock_worker.domain.task import DesiredTask, ObservedTask
from penstock_worker.usecases.ports import TaskHost
from penstock_worker.usecases.task_keeper import KILL_SECONDS, TaskKeeper, TaskPolicy

FORGET_SECONDS = 15.0
"""What ended and is not wanted is reported STOPPED for so long: many statuses, so that one is heard."""
STOP_MARGIN_SECONDS = KILL_SECONDS + 5.0


class TaskReconciler:
    """Has one keeper for each task, in a task (of asyncio) of its own.

    `apply` may be called with the same state again and again, and with any state after any other. While
    nobody calls it (the scheduler is away) everything goes on as it is.

    Args:
        policy: What holds for all tasks.
        host: Runs them.
        spawn: Runs work in the background for as long as the agent lives.
        changed: Called when something that the scheduler should know has changed.
    """

    def __init__(
        self,
        policy: TaskPolicy,
        host: TaskHost,
        spawn: Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]],
        changed: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._host = host
        self._spawn = spawn
        self._changed = changed
        self._keepers: dict[str, TaskKeeper] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, DesiredTask] = {}
        self._stopping = False
        self._told = asyncio.Event()

    async def told(self) -> None:
        """Wait until the scheduler has said, for the first time, what should run here."""
        await self._told.wait()

    def wants(self, name: str) -> bool:
        """Tell whether a task runs here, or should."""
        return name in self._wanted or name in self._keepers

    def apply(self, tasks: Iterable[DesiredTask]) -> None:
        """Take up a desired state: every task that should run; all others are ended."""
        self._wanted = {desired.name: desired for desired in tasks}
        self._told.set()
        self.step()

    def step(self) -> None:
        """Start, end and forget tasks as the desired state demands; called on every change."""
        if self._stopping:
            return
        for name, desired in self._wanted.items():
            keeper = self._keepers.get(name)
            if keeper is None:
                self._start(desired)
            else:
                keeper.update(desired)
        now = time.monotonic()
        for name, keeper in list(self._keepers.items()):
            if name not in self._wanted:
                keeper.end()
                if keeper.ended and name not in self._running and now - keeper.stopped_at > FORGET_SECONDS:
                    del self._keepers[name]
                    self._spawn(f"forget {name}", keeper.forget())

    def observed(self) -> tuple[ObservedTask, ...]:
        """Return every task that runs or has just ended."""
        return tuple(keeper.observed() for keeper in self._keepers.values())

    async def stop(self) -> None:
        """Stop all tasks, with a checkpoint where they can, and wait, bounded, until they have ended."""
        self._stopping = True
        for keeper in self._keepers.values():
            keeper.end()
        if self._running:
            await asyncio.wait(
                self._running.values(), timeout=self._policy.grace_seconds + STOP_MARGIN_SECONDS
            )

    def _start(self, desired: DesiredTask) -> None:
        before = [
            self._running[name]
            for name, other in self._keepers.items()
            if other.desired.job == desired.job
            and other.desired.attempt != desired.attempt
            and name in self._running
        ]
        keeper = TaskKeeper(desired, self._policy, self._host, self._changed, before)
        self._keepers[desired.name] = keeper
        if desired.stopping:
            keeper.end()  # Nothing of it runs here: it is STOPPED at once.
        task = self._spawn(f"task {desired.name}", keeper.run())
        self._running[desired.name] = task
        task.add_done_callback(lambda _: self._ended(keeper))

    def _ended(self, keeper: TaskKeeper) -> None:
        del self._running[keeper.desired.name]
        self._changed()
        self.step()
