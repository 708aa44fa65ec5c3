"""A task that waits for what does not come fails, so that another attempt begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock_worker.domain.task import DesiredTask, TaskState
from penstock_worker.usecases.task_keeper import TaskKeeper, TaskPolicy
from support.agent_world import until

FOLLOWER = DesiredTask(
    name="jobs/j/tasks/1",
    job="j",
    number=1,
    attempt=1,
    index=1,
    tasks=2,
    least_tasks=2,
    ranks=1,
    kind="train",
    spec=b"",
    cpu_millis=1000,
    memory_bytes=0,
    devices=(),
)


class Run:
    """A task that has not started."""

    pid, exit, end, resumed, running, rendezvous = 0, None, None, False, False, ""
    memory_bytes, results, report, last_event = 0, (), b"", 0

    def note_stored(self, number: int) -> None:
        """Nothing is stored."""

    async def sweep(self) -> None:
        """Nothing is left."""

    async def release(self) -> None:
        """Nothing was fetched."""


class Host:
    """Admits all."""

    def check(self, desired: DesiredTask) -> None:
        """All may run."""

    async def admit(self, desired: DesiredTask, changed: Callable[[], None]) -> Any:
        """Return a task that does not start by itself."""
        return Run()


async def failure(*before: asyncio.Task[None]) -> str:
    keeper = TaskKeeper(FOLLOWER, TaskPolicy(turn_seconds=0.01), Host(), lambda: None, before)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(keeper.run())
        await until(lambda: keeper.state is not TaskState.STARTING)
        seen = keeper.observed()
        keeper.end()
    assert (seen.state, seen.cause, seen.permanent) == (TaskState.FAILED, "NOT_STARTED", False)
    assert keeper.ended
    return seen.message


async def test_a_task_that_is_not_told_where_the_ranks_meet_fails() -> None:
    assert "Waiting for the first task to say where the ranks meet." in await failure()


async def test_a_task_fails_if_the_attempt_before_does_not_end_on_its_node() -> None:
    other: asyncio.Task[None] = asyncio.ensure_future(asyncio.Event().wait())  # type: ignore[arg-type]
    try:
        assert "Waiting for the attempt before to end on this node." in await failure(other)
        assert not other.done()
    finally:
        other.cancel()
