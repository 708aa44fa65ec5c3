"""The life of an agent: attach, keep replicas and tasks as wanted, keep house, and on the way out drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from penstock_kit.lifecycle import TaskSet
from penstock_worker.usecases.reconcile import Reconciler
from penstock_worker.usecases.report import Changes
from penstock_worker.usecases.tasks import TaskReconciler

log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 1.0
MEMORY_ROUNDS = 10
"""Reading a process's memory holds it up for a millisecond or more: it is done every so many rounds."""
CLEAN_ROUNDS = 60
"""What jobs have left on the disk is looked through so often."""
RECLAIM_SECONDS = 2.0
LAST_STATUS_SECONDS = 0.1
"""Time for a last status, with all replicas STOPPED, to go up."""


class Background:
    """Runs short work that may outlive what began it."""

    def __init__(self) -> None:
        self._set = TaskSet()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` once; a failure is logged."""
        task = self._set.spawn(name, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, seconds: float) -> None:
        """Give what runs so much time, then cancel it."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        await self._set.stop()


class LogKeeper(Protocol):
    """Keeps the logs of replicas bounded."""

    async def keep_bounded(self, running: set[str]) -> None:
        """Rotate what is too long and remove the oldest, but not those of running replicas."""


class Agent:
    """Ties the parts together.

    Args:
        reconciler: Keeps the replicas.
        tasks: Keeps the tasks of jobs.
        background: Where reclaims run.
        attach: Stays attached to the scheduler until cancelled.
        publish_health: Called when whether the node can take work may have changed.
        logs: The logs of replicas.
        memory_of: Returns the bytes of memory of a process. Blocking.
        changes: To be told when something changed.
        clean: Removes what old jobs have left on the disk.
    """

    def __init__(
        self,
        *,
        reconciler: Reconciler,
        tasks: TaskReconciler,
        background: Background,
        attach: Callable[[], Awaitable[None]],
        publish_health: Callable[[bool], Awaitable[None]],
        logs: LogKeeper,
        memory_of: Callable[[int], int],
        changes: Changes,
        clean: Callable[[], Awaitable[None]],
    ) -> None:
        self._reconciler = reconciler
        self._jobs = tasks
        self._background = background
        self._attach = attach
        self._publish_health = publish_health
        self._logs = logs
        self._memory_of = memory_of
        self._changes = changes
        self._clean = clean
        self._tasks = TaskSet()

    async def start(self) -> None:
        """Begin; replicas follow when the scheduler says so."""
        self._tasks.run_forever("attach to the scheduler", self._attach)
        self._tasks.run_forever("housekeeping", self._keep_house)

    async def stop(self) -> None:
        """Drain all replicas and stop all tasks of jobs, telling the scheduler meanwhile."""
        await self._publish_health(False)
        await asyncio.gather(self._reconciler.stop(), self._jobs.stop())
        await self._background.finish(RECLAIM_SECONDS)
        self._changes()
        await asyncio.sleep(LAST_STATUS_SECONDS)
        await self._tasks.stop()

    async def _keep_house(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            self._reconciler.step()
            self._jobs.step()
            keepers = self._reconciler.keepers()
            await self._logs.keep_bounded({keeper.desired.replica for keeper in keepers})
            for keeper in keepers:
                if keeper.pid and (rounds % MEMORY_ROUNDS == 0 or not keeper.memory_bytes):
                    keeper.memory_bytes = await asyncio.to_thread(self._memory_of, keeper.pid)
            rounds += 1
            if rounds % CLEAN_ROUNDS == 0:
                await self._clean()
