"""Projects: quotas that hold, in the plans and in the database, and what operators may do with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf import field_mask_pb2
from sqlalchemy import text

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import deployment_pb2, project_pb2, project_service_pb2_grpc, replica_pb2
from penstock.scheduler.v1 import project_service_pb2 as pb
from penstock_kit.db import open_engine
from penstock_kit.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Reason,
)
from penstock_scheduler.adapters.documents import version_from_message
from penstock_scheduler.adapters.work import SqlLeadership, SqlWorks
from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.node import Device, DeviceKind, Node
from penstock_scheduler.domain.planner import Plan
from penstock_scheduler.domain.project import Holding, Project
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.metrics import REFUSED_PLANS

GIB = 1024**3
NOW = datetime(2026, 1, 1, tzinfo=UTC)
CORE = resources_pb2.Resources(cpu_millis=1000, memory_bytes=1_000_000)
READY = deployment_pb2.DEPLOYMENT_STATE_READY


class Operator:
    """What an operator does with projects."""

    def __init__(self, client: Any) -> None:
        self.stub: Any = project_service_pb2_grpc.ProjectServiceStub(client.channel)

    async def create(self, name: str = "x", **fields: Any) -> project_pb2.Project:
        project = project_pb2.Project(name=f"projects/{name}", **fields)
        made: project_pb2.Project = await self.stub.CreateProject(pb.CreateProjectRequest(project=project))
        return made

    async def get(self, name: str = "x") -> project_pb2.Project:
        found: project_pb2.Project = await self.stub.GetProject(pb.GetProjectRequest(name=f"projects/{name}"))
        return found

    async def update(
        self, name: str = "x", *mask: str, allow_below_use: bool = False, **fields: Any
    ) -> project_pb2.Project:
        changed: project_pb2.Project = await self.stub.UpdateProject(
            pb.UpdateProjectRequest(
                project=project_pb2.Project(name=f"projects/{name}", **fields),
                update_mask=field_mask_pb2.FieldMask(paths=mask),
                allow_below_use=allow_below_use,
            )
        )
        return changed

    async def delete(self, name: str = "x") -> None:
        await self.stub.DeleteProject(pb.DeleteProjectRequest(name=f"projects/{name}"))


@pytest.fixture
def operator(client: Any) -> Operator:
    return Operator(client)


def cores(count: float) -> resources_pb2.Resources:
    return resources_pb2.Resources(cpu_millis=round(1000 * count))


# -- operators --------------------------------------------------------------------------------------


async def test_projects_are_made_listed_changed_and_deleted(operator: Operator) -> None:
    made = await operator.create("x", quota=cores(4), weight=2.0, description="for x")
    assert (made.quota, made.weight, made.description) == (cores(4), 2.0, "for x")
    assert (made.waiting, made.dominant_share) == (0, 0.0)
    with pytest.raises(AlreadyExists):
        await operator.create("x")
    first = await operator.stub.ListProjects(pb.ListProjectsRequest(page_size=1))
    rest = await operator.stub.ListProjects(pb.ListProjectsRequest(page_token=first.next_page_token))
    assert [p.name for p in (*first.projects, *rest.projects)] == ["projects/default", "projects/x"]
    changed = await operator.update("x", "description", description="for y", weight=5.0)
    assert (changed.description, changed.weight, changed.quota) == ("for y", 2.0, cores(4))
    await operator.delete("x")
    with pytest.raises(NotFound, match="no project x"):
        await operator.get("x")
    with pytest.raises(FailedPrecondition, match="takes what names no other") as refused:
        await operator.delete("default")
    assert refused.value.reason is Reason.IN_USE


async def test_nonsense_is_refused_with_the_field_that_is_wrong(operator: Operator) -> None:
    for fields, words in (
        ({"weight": -1.0}, "weight is -1"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"quota": resources_pb2.Resources(cpu_millis=-1)}, "cpu_millis is -1"),
        ({"quota": resources_pb2.Resources(disk_bytes=1)}, "cannot bound disk_bytes"),
        ({"description": "x" * 2000}, "description has 2000"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            await operator.create("x", **fields)
    await operator.create("x")
    with pytest.raises(InvalidArgument, match="update_mask names 'used'"):
        await operator.update("x", "used")
    with pytest.raises(InvalidArgument):
        await operator.get("../x")


async def test_the_second_of_two_operators_is_told_that_the_first_was_there(operator: Operator) -> None:
    seen = await operator.create("x")
    await operator.update("x", "weight", weight=2.0, etag=seen.etag)
    with pytest.raises(Aborted, match="changed since it was read") as refused:
        await operator.update("x", "quota", quota=cores(1), etag=seen.etag)
    assert refused.value.reason is Reason.CONFLICT
    # One of the same name that is made anew is not what was read.
    await operator.delete("x")
    await operator.create("x")
    with pytest.raises(Aborted):
        await operator.update("x", "weight", weight=3.0, etag=seen.etag)


# -- quotas -----------------------------------------------------------------------------------------


async def test_a_quota_keeps_replicas_and_jobs_waiting_with_a_reason(
    bench: Any, client: Any, operator: Operator
) -> None:
    await bench.agent("n1", cpu_millis=8000)
    await operator.create("x", quota=cores(2.5))
    await client.create(replicas=3, resources=CORE, project="projects/x")
    seen = await client.until("digits", lambda seen: seen.ready_replicas == 2 and "quota" in seen.message)
    assert "project x holds 2 of 2.5 cores (this needs 1)" in seen.message
    assert seen.project == "projects/x"
    project = await operator.get()
    assert (project.used.cpu_millis, project.waiting) == (2000, 1)
    assert project.dominant_share == pytest.approx(0.25)
    await client.create_job(project="projects/x", resources={"cpu_millis": 600})
    waiting = await client.until_job(lambda job: "quota" in job.message)
    assert "this needs 0.6" in waiting.message
    await operator.update("x", "quota", quota=cores(4))
    await client.until_state("READY")
    await client.until_job("RUNNING")
    assert (await operator.get()).used.cpu_millis == 3600


async def test_a_deployment_moves_between_projects_without_a_new_replica(
    bench: Any, client: Any, operator: Operator
) -> None:
    await bench.agent("n1", cpu_millis=8000)
    await operator.create("x", quota=cores(1))
    await operator.create("y", quota=cores(2))
    await client.create(replicas=2, resources=CORE)
    await client.until_state("READY")
    before = {replica.name for replica in await client.replicas()}
    with pytest.raises(FailedPrecondition, match="project x holds 0 of 1 cores") as refused:
        await client.update(project="projects/x")
    assert refused.value.reason is Reason.QUOTA_BELOW_USE
    with pytest.raises(NotFound, match="no project z"):
        await client.update(project="projects/z")
    with pytest.raises(NotFound, match="no project z"):
        await client.create("other", project="projects/z")
    moved = await client.update(project="projects/y")
    assert moved.project == "projects/y"
    await client.until_state("READY")
    assert {replica.name for replica in await client.replicas()} == before
    assert (await operator.get("y")).used.cpu_millis == 2000
    assert (await operator.get("default")).used.cpu_millis == 0
    with pytest.raises(FailedPrecondition, match="deployments/digits names it") as refused:
        await operator.delete("y")
    assert refused.value.reason is Reason.IN_USE


async def test_a_quota_is_not_taken_below_use_unless_that_is_wanted(
    bench: Any, client: Any, operator: Operator
) -> None:
    await bench.agent("n1", cpu_millis=8000)
    await operator.create("x", quota=cores(4))
    await client.create(replicas=3, resources=CORE, project="projects/x")
    await client.until_state("READY")
    with pytest.raises(FailedPrecondition, match="Project x holds 3 cores, more than 1") as refused:
        await operator.update("x", "quota", quota=cores(1))
    assert refused.value.reason is Reason.QUOTA_BELOW_USE
    lowered = await operator.update("x", "quota", quota=cores(1), allow_below_use=True)
    assert lowered.quota == cores(1)
    # What runs stays, and what ends is not replaced.
    await client.update(replicas=2)
    await client.until("digits", lambda seen: seen.state == READY and seen.ready_replicas == 2)
    await client.update(replicas=3)
    await client.until("digits", lambda seen: "project x holds 2 of 1 cores" in seen.message)
    assert (await operator.get()).used.cpu_millis == 2000


@pytest.mark.parametrize("replicas", [1, 3])
async def test_an_update_at_a_full_quota_goes_through_and_ends_within_it(
    bench: Any, client: Any, operator: Operator, replicas: int
) -> None:
    agent = await bench.agent("n1", cpu_millis=8000)
    bench.registry.push(number=2)
    await operator.create("x", quota=cores(replicas))
    await client.create(replicas=replicas, resources=CORE, project="projects/x")
    await client.until_state("READY")
    agent.hold = lambda spec: spec.version.endswith("/2")
    await client.update("digits", deployment_pb2.Target(model="models/digits", version=2))

    async def surging() -> bool:
        return (await operator.get()).used.cpu_millis == 2000 * replicas

    await bench.eventually(surging)
    agent.hold = lambda spec: False
    agent.obey()
    await client.until(
        "digits",
        lambda seen: (
            seen.state == READY and seen.ready_replicas == replicas and seen.serving[0].resolved_version == 2
        ),
    )

    async def settled() -> bool:
        return (await operator.get()).used.cpu_millis == 1000 * replicas

    await bench.eventually(settled)
    kept = [r for r in await client.replicas() if r.state == replica_pb2.REPLICA_STATE_READY]
    assert len(kept) == replicas


async def test_operators_and_the_loop_at_once_neither_deadlock_nor_have_a_plan_refused(
    bench: Any, client: Any, operator: Operator
) -> None:
    await bench.agent("n1", cpu_millis=64000)
    for name in ("x", "y"):
        await operator.create(name, quota=cores(20))
    for name in ("a", "b"):
        await client.create(name, replicas=2, resources=CORE, project="projects/x")

    async def persist(change: Any) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    await change()
                    return
                except Aborted:
                    await asyncio.sleep(0.01)

    async def move(name: str, turn: int) -> None:
        to = "xy"[turn % 2]
        await persist(lambda: client.update(name, project=f"projects/{to}", replicas=1 + turn % 4))

    async def resize(name: str, turn: int) -> None:
        quota = cores(18 + turn % 3)
        await persist(lambda: operator.update(name, "quota", quota=quota, allow_below_use=True))

    refused = REFUSED_PLANS._value.get()
    for turn in range(6):
        await asyncio.gather(
            move("a", turn), move("b", turn + 1), resize("x", turn), resize("y", turn), operator.get("x")
        )
    for name in ("a", "b"):
        await client.until_state("READY", name)

    async def settled() -> bool:
        # One that drains still holds its part.
        lasting = {replica_pb2.REPLICA_STATE_READY, replica_pb2.REPLICA_STATE_STOPPED}
        return {replica.state for replica in await client.replicas()} <= lasting

    await bench.eventually(settled, "no replica drains any more")
    used = [(await operator.get(name)).used.cpu_millis for name in ("x", "y")]
    replicas = [r for r in await client.replicas() if r.state == replica_pb2.REPLICA_STATE_READY]
    assert sum(used) == 1000 * len(replicas)
    assert REFUSED_PLANS._value.get() == refused


# -- the database alone -----------------------------------------------------------------------------


class Store:
    """The tables with one node of two GPUs and a deployment in project x, without the scheduler."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self.works = SqlWorks(self.engine)
        self.leadership = SqlLeadership(self.engine)

    async def apply(self, *replicas: Replica, nodes: tuple[Node, ...] = ()) -> None:
        async with self.works() as work:
            await work.cluster.apply(Plan(nodes=nodes, replicas=replicas), 1)
            await work.commit()

    async def run(self, statement: str, **values: Any) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)

    async def sums(self, name: str = "x") -> tuple[Holding, Holding]:
        """What counts against the quota of a project, and what surges."""
        columns = ", ".join(
            f"{each}_{kind}"
            for kind in ("allocated", "surge")
            for each in ("cpu_millis", "memory_bytes", "gpu_millis")
        )
        query = text(f"SELECT {columns} FROM scheduler.projects WHERE name = :name")
        async with self.engine.connect() as connection:
            row = (await connection.execute(query, {"name": name})).one()
        return Holding(*row[:3]), Holding(*row[3:])

    async def quota(self, **quota: int) -> None:
        async with self.works() as work:
            old = (await work.projects.lock(["x"]))["x"]
            await work.projects.replace(replace(old, quota=Holding(**quota)))
            await work.commit()


NODE = Node(
    "n1",
    64000,
    64 * GIB,
    (
        Device("cpu", DeviceKind.CPU, memory_bytes=64 * GIB),
        *(Device(f"gpu{n}", DeviceKind.GPU, memory_bytes=16 * GIB) for n in range(2)),
    ),
    runtimes=("torch",),
    last_seen_time=NOW,
)
NEED = Resources(cpu_millis=1000, memory_bytes=GIB)


def placed(id_: str, resources: Resources = NEED, devices: tuple[str, ...] = ("cpu",)) -> Replica:
    key = GroupKey(VersionKey("digits", 1), "s")
    state = ReplicaState.STARTING
    return Replica(id_, "d", key, "00", resources, Batching(), NOW, NOW, state, node="n1", devices=devices)


def stopped(id_: str, **traits: Any) -> Replica:
    return replace(placed(id_), state=ReplicaState.STOPPED, **traits)


@pytest.fixture
async def store(idle_bench: Any) -> AsyncIterator[Store]:
    store = Store(idle_bench.database_url)
    assert await store.leadership.try_lead() == 1
    version = version_from_message(idle_bench.registry.push())
    async with store.works() as work:
        await work.deployments.keep_versions([version])
        await work.projects.add(Project("x", create_time=NOW, update_time=NOW))
        await work.deployments.add(Deployment("d", Spec((Target("digits", 100, 1),)), NOW, NOW, project="x"))
        await work.commit()
    await store.apply(nodes=(NODE,))
    yield store
    await store.leadership.release()
    await store.engine.dispose()


async def test_sums_follow_what_is_given_out_and_taken_back(store: Store) -> None:
    half = replace(NEED, gpus=1, gpu_memory_millis=500)
    some = replace(NEED, gpus=1, gpu_memory_bytes=4 * GIB)
    whole = replace(NEED, gpus=1)
    await store.apply(
        placed("a"), placed("b", half, ("gpu0",)), placed("c", some, ("gpu0",)), placed("d", whole, ("gpu1",))
    )
    assert await store.sums() == (Holding(4000, 4 * GIB, 1750), Holding())
    await store.apply(stopped("b"), stopped("d"))
    assert await store.sums() == (Holding(2000, 2 * GIB, 250), Holding())
    await store.run("UPDATE scheduler.deployments SET project = 'default' WHERE name = 'd'")
    assert await store.sums() == (Holding(), Holding())
    assert await store.sums("default") == (Holding(2000, 2 * GIB, 250), Holding())


@pytest.mark.parametrize(
    ("quota", "wrong", "constraint"),
    [
        ({"cpu_millis": 1500}, [placed("a"), placed("b")], "ck_projects_cpu_millis_within_quota"),
        ({"memory_bytes": GIB}, [placed("a"), placed("b")], "ck_projects_memory_bytes_within_quota"),
        (
            {"gpu_millis": 500},
            [placed("a", replace(NEED, gpus=1), ("gpu0",))],
            "ck_projects_gpu_millis_within_quota",
        ),
        (
            {"gpu_millis": 500},
            [placed("a", replace(NEED, gpus=2, gpu_memory_millis=300), ("gpu0", "gpu1"))],
            "ck_projects_gpu_millis_within_quota",
        ),
        (
            {"cpu_millis": 1500},
            [replace(placed("a"), surge=True), replace(placed("b"), surge=True)],
            "ck_projects_cpu_millis_within_quota",
        ),
    ],
)
async def test_no_plan_gets_more_than_the_quota(
    store: Store, quota: dict[str, int], wrong: list[Replica], constraint: str
) -> None:
    await store.quota(**quota)
    with pytest.raises(Internal, match=constraint):
        await store.apply(*wrong)
    assert await store.sums() == (Holding(), Holding())
    await store.quota()
    await store.apply(*wrong)


async def test_a_successor_counts_by_itself_until_there_is_room(store: Store) -> None:
    await store.quota(cpu_millis=1000)
    old, new = placed("old"), replace(placed("new"), surge=True)
    await store.apply(old, new)
    assert await store.sums() == (Holding(1000, GIB), Holding(1000, GIB))
    with pytest.raises(Internal, match="ck_projects_cpu_millis_within_quota"):
        await store.apply(replace(new, surge=False))
    await store.apply(stopped("old"), replace(new, surge=False))
    assert await store.sums() == (Holding(1000, GIB), Holding())


async def test_what_is_held_beyond_a_lowered_quota_may_shrink_and_not_grow_again(store: Store) -> None:
    await store.apply(*(placed(f"r{n}") for n in range(4)))
    await store.quota(cpu_millis=2000)
    with pytest.raises(Internal, match="ck_projects_cpu_millis_within_quota"):
        await store.apply(placed("more"))
    await store.apply(stopped("r0"))
    with pytest.raises(Internal, match="ck_projects_cpu_millis_within_quota"):
        await store.apply(placed("again"))
    await store.apply(stopped("r1"), stopped("r2"))
    await store.apply(placed("fits"))
    with pytest.raises(Internal, match="ck_projects_cpu_millis_within_quota"):
        await store.apply(placed("one too many"))


async def test_a_project_that_something_names_is_not_lost_by_hand_either(store: Store) -> None:
    await store.run("DELETE FROM scheduler.projects WHERE name = 'x'")
    # It falls back to the default one.
    async with store.works() as work:
        found = await work.deployments.get("d")
    assert found is not None
    assert found.project == "default"
