"""What agents are told of tasks of jobs."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from penstock_scheduler.domain.job import Job, JobState, Order, Task, TaskState
from penstock_scheduler.domain.node import Node
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.resources import Resources
from penstock_scheduler.usecases.attach import STORED_SECONDS, AttachHub
from penstock_scheduler.usecases.wake import Wake

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NODE = Node("n1", 1000, 1, last_seen_time=NOW)
JOB = Job("fit", create_time=NOW, update_time=NOW, state=JobState.RUNNING, attempt=1)


def task(number: int, **fields: object) -> Task:
    made = Task("fit", number, number, 1, Resources(), NOW, NOW, TaskState.RUNNING, node="n1")
    return replace(made, **fields)  # type: ignore[arg-type]


class Told:
    """A hub with one attached agent, and a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.hub = AttachHub(Wake(), clock=lambda: self.now)
        self.session = self.hub.open("n1")

    def publish(self, *tasks: Task) -> None:
        self.hub.publish(
            Snapshot(NOW, "", nodes={"n1": NODE}, jobs={"fit": JOB}, tasks={each.id: each for each in tasks})
        )

    async def news(self) -> tuple[int, ...] | None:
        """The stored events of the tasks as they were told; None if nothing is new."""
        if self.session._wanted is None:
            return None
        wanted = await self.session.next()
        assert wanted is not None
        return tuple(each.task.stored_event for each in wanted.tasks)


async def test_what_is_stored_is_told_now_and_then_and_with_all_else() -> None:
    told = Told()
    told.publish(task(0))
    assert await told.news() == (0,)
    told.publish(task(0, stored_event=5))
    assert await told.news() is None
    told.now += STORED_SECONDS
    told.publish(task(0, stored_event=6))
    assert await told.news() == (6,)
    told.now += STORED_SECONDS
    told.publish(task(0, stored_event=6))
    assert await told.news() is None
    told.publish(task(0, stored_event=7, order=Order.STOP))
    assert await told.news() == (7,)


async def test_a_task_that_is_to_end_is_not_told_of_any_more() -> None:
    told = Told()
    told.publish(task(0), task(1))
    assert await told.news() == (0, 0)
    told.publish(task(0), task(1, order=Order.END))
    assert await told.news() == (0,)
    told.publish(task(0, state=TaskState.SUCCEEDED))
    assert await told.news() is None, "it stays until its events are stored"


async def test_all_but_the_leading_task_are_told_where_the_ranks_meet() -> None:
    told = Told()
    told.publish(task(0), task(1))
    await told.news()
    told.publish(task(0, rendezvous="127.0.0.1:29500"), task(1))
    wanted = await told.session.next()
    assert wanted is not None
    assert [each.rendezvous for each in wanted.tasks] == ["", "127.0.0.1:29500"]
    assert [each.tasks for each in wanted.tasks] == [2, 2]
