"""The database refuses of jobs what must not be, whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from penstock_kit.db import open_engine
from penstock_kit.errors import Aborted, Internal
from penstock_scheduler.adapters.documents import version_from_message
from penstock_scheduler.adapters.work import SqlLeadership, SqlWorks
from penstock_scheduler.domain.constraints import Constraints, Toleration
from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.job import EventKind, Gang, Job, JobState, Stop, Task, TaskState
from penstock_scheduler.domain.job_events import JobEvent
from penstock_scheduler.domain.node import Device, DeviceKind, Node
from penstock_scheduler.domain.planner import Plan
from penstock_scheduler.domain.project import Project
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.job_ports import JobRequest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 1024**3
NODE = Node(
    "n1",
    cpu_millis=1000,
    memory_bytes=4 * GIB,
    disk_bytes=10 * GIB,
    devices=(Device("gpu0", DeviceKind.GPU, memory_bytes=8 * GIB),),
    last_seen_time=NOW,
)
MODEST = Resources(cpu_millis=100, memory_bytes=GIB, disk_bytes=2 * GIB)
GPU = replace(MODEST, gpus=1)
SHARE = replace(MODEST, gpus=1, gpu_memory_bytes=5 * GIB)
JOB = Job("fit", create_time=NOW, update_time=NOW, gang=Gang(resources=MODEST))


def task(number: int, resources: Resources = MODEST, devices: tuple[str, ...] = ("cpu",)) -> Task:
    return Task("fit", number, number, 1, resources, NOW, NOW, TaskState.STARTING, node="n1", devices=devices)


def replica(resources: Resources, devices: tuple[str, ...] = ("cpu",)) -> Replica:
    key = GroupKey(VersionKey("digits", 1), "s")
    return Replica(
        "r",
        "d",
        key,
        "00",
        resources,
        Batching(),
        NOW,
        NOW,
        ReplicaState.STARTING,
        node="n1",
        devices=devices,
    )


class Store:
    """The scheduler's tables with a node, a deployment and a job, without the scheduler."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self.works = SqlWorks(self.engine)
        self.leadership = SqlLeadership(self.engine)

    async def apply(self, *tasks: Task, epoch: int = 1, **plan: Any) -> None:
        async with self.works() as work:
            await work.cluster.apply(Plan(tasks=tasks, **plan), epoch)
            await work.commit()

    async def job(self) -> Job:
        async with self.works() as work:
            found = await work.jobs.get("fit")
        assert found is not None
        return found

    async def held(self) -> tuple[int, int, int]:
        async with self.works() as work:
            view = await work.cluster.node("n1")
        assert view is not None
        return view.cpu_millis, view.memory_bytes, view.disk_bytes


@pytest.fixture
async def store(idle_bench: Any) -> AsyncIterator[Store]:
    store = Store(idle_bench.database_url)
    assert await store.leadership.try_lead() == 1
    async with store.works() as work:
        await work.deployments.keep_versions([version_from_message(idle_bench.registry.push())])
        await work.deployments.add(Deployment("d", Spec((Target("digits", 100, 1),)), NOW, NOW))
        await work.jobs.add(JOB, "profile", JobRequest())
        await work.commit()
    await store.apply(nodes=(NODE,))
    yield store
    await store.leadership.release()
    await store.engine.dispose()


async def test_every_field_of_a_job_is_kept(store: Store) -> None:
    later = NOW + timedelta(seconds=1)
    pool = Constraints((("pool", "big"),), (Toleration("k", "v"),))
    asked: dict[str, Any] = {
        "project": "vision",
        "priority": 3,
        "gang": Gang(3, 2, MODEST, pool, "script", keeps=True),
        "work": b"what is to be done",
        "labels": {"team": "a"},
        "max_restarts": 7,
        "timeout": timedelta(hours=1),
        "created_by": "ann",
    }
    changing: dict[str, Any] = {
        "state": JobState.SUCCEEDED,
        "message": "done",
        "failure_reason": "SIGNAL",
        "cancelling": True,
        "stop": Stop.LOSS,
        "attempt": 4,
        "restarts": 2,
        "losses": 1,
        "tasks_made": 12,
        "not_before": later,
        "homes": ("n1", "n2"),
        "start_time": later,
        "placed_time": later,
        "ran": timedelta(seconds=9),
        "end_time": later,
        "results": ("models/digits/versions/2",),
        "leftovers": ("models/digits/versions/1",),
        "report": b"found",
        "update_time": later,
    }
    full = Job("full", NOW, NOW, **asked)
    same = {each.name for each in fields(Job)} - asked.keys() - changing.keys()
    assert same == {"id", "create_time", "revision"}
    async with store.works() as work:
        await work.projects.add(Project("vision"))
        await work.jobs.add(full, "train", JobRequest())
        await work.jobs.replace(replace(full, **changing))
        await work.commit()
    async with store.works() as work:
        found = await work.jobs.get("full")
    assert found == replace(full, **changing, revision=1)


async def test_tasks_never_hold_more_than_a_node_has_beside_replicas(store: Store) -> None:
    await store.apply(task(0), replicas=(replica(MODEST),))
    before = await store.held()
    assert before == (200, 2 * GIB, 4 * GIB)
    wrong = {
        "ck_nodes_cpu_within_node": [task(1, replace(MODEST, cpu_millis=900))],
        "ck_nodes_memory_within_node": [task(n) for n in (1, 2, 3)],
        # Unlike replicas of one bundle, tasks share no disk.
        "ck_nodes_disk_within_node": [task(n, replace(MODEST, memory_bytes=0)) for n in (1, 2, 3, 4)],
        "ck_devices_memory_within_device": [task(1, SHARE, ("gpu0",)), task(2, SHARE, ("gpu0",))],
        "ck_devices_held_alone": [task(1, GPU, ("gpu0",)), task(2, SHARE, ("gpu0",))],
        "fk_task_allocation_devices_node_device": [task(1, GPU, ("gpu7",))],
        "ck_job_tasks_allocation": [task(1, GPU, ())],
        "fk_task_allocations_node": [replace(task(1), node="nowhere")],
    }
    for constraint, tasks in wrong.items():
        with pytest.raises(Internal) as refused:
            await store.apply(*tasks)
        assert refused.value.metadata["constraint"] == constraint
        assert await store.held() == before


async def test_a_gpu_is_never_shared_by_a_task_and_a_replica_that_holds_it_alone(store: Store) -> None:
    await store.apply(replicas=(replica(GPU, ("gpu0",)),))
    for wants in (GPU, SHARE):
        with pytest.raises(Internal) as refused:
            await store.apply(task(0, wants, ("gpu0",)))
        assert refused.value.metadata["constraint"] == "ck_devices_held_alone"
    await store.apply(
        task(0, GPU, ("gpu0",)), replicas=(replica(GPU, ("gpu0",)).advance(ReplicaState.STOPPED, NOW),)
    )
    await store.apply(task(0, GPU, ("gpu0",)).stopped(NOW))
    assert await store.held() == (0, 0, 0)


async def test_nobody_takes_what_a_task_holds_away_by_hand_nor_changes_how_a_job_ended(store: Store) -> None:
    await store.apply(task(0, SHARE, ("gpu0",)))
    running = await store.job()
    ended = replace(running.advance(JobState.CANCELLED, NOW))
    with pytest.raises(Internal) as refused:
        await store.apply(jobs=(ended,))
    assert refused.value.metadata["constraint"] == "ck_jobs_hold_nothing"
    url = store.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)

    async def refuse(statement: str) -> None:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            with pytest.raises(psycopg.errors.IntegrityError):
                await connection.execute(statement)
                await connection.commit()

    for statement in (
        "DELETE FROM scheduler.task_allocations",
        "DELETE FROM scheduler.task_allocation_devices",
        "UPDATE scheduler.task_allocations SET memory_bytes = 0",
        "UPDATE scheduler.task_allocation_devices SET memory_bytes = 0",
        "UPDATE scheduler.job_tasks SET state = 'STOPPED'",
        """UPDATE scheduler.job_tasks SET resources = resources || '{"cpu_millis": 1}'""",
        "DELETE FROM scheduler.jobs",
        "UPDATE scheduler.jobs SET results = '[\"models/digits/versions/1\"]'",
        "UPDATE scheduler.jobs SET state = 'SUCCEEDED'",
    ):
        await refuse(statement)
    await store.apply(task(0, SHARE, ("gpu0",)).stopped(NOW), jobs=(ended,))
    await refuse("UPDATE scheduler.jobs SET state = 'SUCCEEDED'")
    await refuse("UPDATE scheduler.jobs SET state = 'QUEUED', end_time = NULL")


async def test_a_plan_for_a_job_that_was_cancelled_meanwhile_is_made_anew(store: Store) -> None:
    stale = await store.job()
    async with store.works() as work:
        job = await work.jobs.get("fit", lock=True)
        assert job is not None
        await work.jobs.replace(replace(job, cancelling=True))
        await work.commit()
    with pytest.raises(Aborted, match="changed meanwhile"):
        await store.apply(task(0), jobs=(stale.advance(JobState.STARTING, NOW),))
    assert await store.held() == (0, 0, 0)
    with pytest.raises(Aborted, match="Another scheduler leads"):
        await store.apply(task(0), epoch=7)


async def test_two_schedulers_that_read_the_same_events_store_each_once(store: Store) -> None:
    await store.apply(task(0), task(1))

    def event(number: int, of: int) -> JobEvent:
        return JobEvent("fit", of, number, EventKind.LOG, NOW, b"")

    async def take_in() -> int:
        async with store.works() as work:
            taken = await work.job_events.take_in(
                [event(number, of) for number in range(1, 101) for of in (0, 1, 9)]
            )
            await work.commit()
        return taken.count

    counts = await asyncio.gather(*(take_in() for _ in range(4)))
    assert sorted(counts) == [0, 0, 0, 200]
    async with store.works() as work:
        events = await work.job_events.page("fit", 0, 1000, ())
        tasks = (await work.cluster.load()).tasks
    assert [event.sequence for event in events] == list(range(1, 201))
    assert {(event.task, event.number) for event in events} == {
        (of, number) for of in (0, 1) for number in range(1, 101)
    }
    assert {each.stored_event for each in tasks.values()} == {100}
