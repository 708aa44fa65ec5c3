"""The database refuses what must not be, and may go away."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from penstock.scheduler.v1 import deployment_pb2
from penstock_kit.db import open_engine
from penstock_kit.errors import Aborted, Internal, Unavailable
from penstock_scheduler.adapters.documents import version_from_message
from penstock_scheduler.adapters.work import PATIENCE_LOOKS, SqlLeadership, SqlWorks
from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.node import Device, DeviceKind, Node, NodeState
from penstock_scheduler.domain.planner import Plan
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 1024**3
NODE = Node(
    "n1",
    cpu_millis=1000,
    memory_bytes=4 * GIB,
    devices=(Device("gpu0", DeviceKind.GPU, memory_bytes=8 * GIB),),
    last_seen_time=NOW,
)
MODEST = Resources(cpu_millis=100, memory_bytes=GIB)


def placed(id_: str, resources: Resources, devices: tuple[str, ...] = ("cpu",)) -> Replica:
    key = GroupKey(VersionKey("digits", 1), "s")
    return Replica(
        id_,
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
    """The scheduler's tables with one node and one deployment, without the scheduler."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self.works = SqlWorks(self.engine)
        self.leadership = SqlLeadership(self.engine)

    async def apply(self, *replicas: Replica, nodes: tuple[Node, ...] = (), epoch: int = 1) -> None:
        async with self.works() as work:
            await work.cluster.apply(Plan(nodes=nodes, replicas=replicas), epoch)
            await work.commit()

    async def ids(self) -> set[str]:
        async with self.works() as work:
            return set((await work.cluster.load()).replicas)

    async def held(self) -> tuple[int, int]:
        async with self.works() as work:
            view = await work.cluster.node("n1")
        assert view is not None
        return view.cpu_millis, view.memory_bytes


@pytest.fixture
async def store(idle_bench: Any) -> AsyncIterator[Store]:
    store = Store(idle_bench.database_url)
    assert await store.leadership.try_lead() == 1
    version = version_from_message(idle_bench.registry.push())
    async with store.works() as work:
        await work.deployments.keep_versions([version])
        await work.deployments.add(Deployment("d", Spec((Target("digits", 100, 1),)), NOW, NOW))
        await work.commit()
    await store.apply(nodes=(NODE,))
    yield store
    await store.leadership.release()
    await store.engine.dispose()


GPU = replace(MODEST, gpus=1)
SHARE = replace(MODEST, gpus=1, gpu_memory_bytes=5 * GIB)


@pytest.mark.parametrize(
    ("wrong", "constraint"),
    [
        ([placed("b", replace(MODEST, cpu_millis=1000))], "ck_nodes_cpu_within_node"),
        ([placed("b", replace(MODEST, memory_bytes=4 * GIB))], "ck_nodes_memory_within_node"),
        ([placed(f"r{n}", MODEST) for n in range(4)], "ck_nodes_memory_within_node"),
        ([placed("b", SHARE, ("gpu0",)), placed("c", SHARE, ("gpu0",))], "ck_devices_memory_within_device"),
        ([placed("b", GPU, ("gpu0",)), placed("c", GPU, ("gpu0",))], "ck_devices_held_alone"),
        ([placed("b", GPU, ("gpu0",)), placed("c", SHARE, ("gpu0",))], "ck_devices_held_alone"),
        ([placed("b", SHARE, ("gpu0",)), placed("c", GPU, ("gpu0",))], "ck_devices_held_alone"),
        ([placed("b", GPU, ("gpu7",))], "fk_allocation_devices_node_device"),
        ([placed("b", GPU, ())], "ck_replicas_allocation"),
        ([replace(placed("b", MODEST), node="nowhere")], "fk_replicas_node"),
    ],
)
async def test_a_wrong_plan_is_refused_as_a_whole(
    store: Store, wrong: list[Replica], constraint: str
) -> None:
    await store.apply(placed("a", MODEST))
    with pytest.raises(Internal) as refused:
        await store.apply(*wrong)
    assert refused.value.metadata["constraint"] == constraint
    assert await store.ids() == {"a"}
    assert await store.held() == (100, GIB)


async def test_a_node_cannot_shrink_below_what_it_gave_out(store: Store) -> None:
    await store.apply(placed("a", replace(MODEST, gpus=1), ("gpu0",)))
    with pytest.raises(Internal) as refused:
        await store.apply(nodes=(replace(NODE, cpu_millis=50),))
    assert refused.value.metadata["constraint"] == "ck_nodes_cpu_within_node"
    with pytest.raises(Internal) as refused:
        await store.apply(nodes=(replace(NODE, devices=()),))
    assert refused.value.metadata["constraint"] == "fk_allocation_devices_node_device"


async def test_nobody_takes_an_allocation_away_by_hand(store: Store) -> None:
    await store.apply(placed("a", SHARE, ("gpu0",)))
    url = store.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    for statement in (
        "DELETE FROM scheduler.allocations",
        "DELETE FROM scheduler.allocation_devices",
        "UPDATE scheduler.allocations SET memory_bytes = 0",
        "UPDATE scheduler.allocation_devices SET memory_bytes = 0",
        "UPDATE scheduler.replicas SET state = 'STOPPED'",
        """UPDATE scheduler.replicas SET resources = resources || '{"cpu_millis": 1}'""",
        "UPDATE scheduler.nodes SET cpu_millis = 1",
    ):
        async with await psycopg.AsyncConnection.connect(url) as connection:
            with pytest.raises(psycopg.errors.CheckViolation):
                await connection.execute(statement)
                await connection.commit()
    assert await store.held() == (100, GIB)


async def test_what_stops_gives_its_part_back(store: Store) -> None:
    gpu = placed("a", GPU, ("gpu0",))
    await store.apply(gpu)
    await store.apply(gpu.advance(ReplicaState.STOPPED, NOW))
    assert await store.held() == (0, 0)
    await store.apply(placed("b", SHARE, ("gpu0",)))
    assert await store.held() == (100, GIB)


async def test_one_scheduler_leads_and_the_earlier_one_writes_nothing_more(store: Store) -> None:
    other = SqlLeadership(store.engine)
    assert await other.try_lead() is None
    assert await store.leadership.try_lead() == 1
    await store.leadership.release()
    assert await other.try_lead() == 2
    with pytest.raises(Aborted, match="Another scheduler leads"):
        await store.apply(placed("a", MODEST), epoch=1)
    await store.apply(placed("a", MODEST), epoch=2)
    await other.release()


class Schedulers:
    """Two that want to lead, each with connections of its own name."""

    def __init__(self, url: str) -> None:
        self.engines = [open_engine(url, application=f"penstock-scheduler {n}") for n in (1, 2)]
        self.first, self.second = (SqlLeadership(engine) for engine in self.engines)

    async def looks(self, number: int) -> list[int | None]:
        return [await self.second.try_lead() for _ in range(number)]


@pytest.fixture
async def schedulers(idle_bench: Any) -> AsyncIterator[Schedulers]:
    both = Schedulers(idle_bench.database_url)
    yield both
    for leadership, engine in zip((both.first, both.second), both.engines, strict=True):
        with suppress(Unavailable):
            await leadership.release()
        await engine.dispose()


async def test_a_leader_that_says_nothing_any_more_is_deposed_with_what_it_had_half_done(
    schedulers: Schedulers,
) -> None:
    assert await schedulers.first.try_lead() == 1
    async with SqlWorks(schedulers.engines[0])() as half_done:
        # Holds a share lock on the epoch, as a process would that is stopped in the middle of a pass.
        await half_done.cluster.apply(Plan(nodes=(NODE,)), 1)
        assert await schedulers.looks(PATIENCE_LOOKS + 1) == [None] * (PATIENCE_LOOKS + 1)
        assert await schedulers.looks(1) == [2]
        with pytest.raises(Unavailable):
            await half_done.commit()
    with pytest.raises(Unavailable):
        await schedulers.first.try_lead()
    assert await schedulers.first.try_lead() is None, "it goes on as a follower"
    async with SqlWorks(schedulers.engines[0])() as late:
        with pytest.raises(Aborted, match="Another scheduler leads"):
            await late.cluster.apply(Plan(nodes=(NODE,)), 1)


async def test_a_leader_that_beats_stays_however_often_another_looks(schedulers: Schedulers) -> None:
    assert await schedulers.first.try_lead() == 1
    for _ in range(PATIENCE_LOOKS * 3):
        assert await schedulers.second.try_lead() is None
        assert await schedulers.first.try_lead() == 1


async def test_a_leader_that_is_merely_slow_stays(schedulers: Schedulers) -> None:
    assert await schedulers.first.try_lead() == 1
    for _ in range(3):
        assert await schedulers.looks(PATIENCE_LOOKS) == [None] * PATIENCE_LOOKS
        assert await schedulers.first.try_lead() == 1


async def test_a_plan_for_what_has_changed_meanwhile_is_refused(store: Store) -> None:
    async with store.works() as work:
        old = await work.deployments.get("d", lock=True)
        assert old is not None
        await work.deployments.replace(old.ask(replace(old.asked, replicas=2), NOW, "ann"))
        await work.commit()
    async with store.works() as work:
        with pytest.raises(Aborted, match="changed meanwhile"):
            await work.cluster.apply(Plan(deployments=(replace(old, message="x"),)), 1)


async def test_a_second_scheduler_answers_questions_and_takes_over(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    second_address = f"unix:{bench.folder}/s2"
    first = bench.scheduler
    second = await bench.start(scheduler_listen=second_address)
    other = bench.client(second_address)
    seen = await other.until_state("READY")
    assert seen.ready_replicas == 1
    table = await other.routes(lambda t: bool(t) and t["digits"].targets[0].ready_replicas == 1)
    assert not table["digits"].message
    await other.create("asked-of-the-follower")
    await client.until_state("READY", "asked-of-the-follower")

    stray = type(agent)(second_address, "n9")
    await stray.attach()
    await bench.eventually(lambda: stray.error is not None)
    assert stray.error is not None
    assert "Another scheduler leads" in (stray.error.details() or "")
    await stray.vanish()

    await agent.vanish()
    await first.stop()
    moved = type(agent)(second_address, "n1")
    moved.observed = agent.observed

    async def attached() -> bool:
        if moved.error is not None or not moved.generation:
            await moved.vanish()
            await moved.attach()
            await asyncio.sleep(0.2)
        return moved.generation > 0 and moved.error is None

    await bench.eventually(attached)
    assert set(moved.desired) == set(agent.desired)
    await other.update(replicas=2)
    assert (await other.until("digits", lambda d: d.state == 2 and d.revision == 2)).ready_replicas == 2
    await moved.vanish()
    bench.scheduler = second


@pytest.mark.parametrize("leases", [{"node_silence_seconds": 2.0}], ids=["short"])
async def test_while_the_database_is_away_agents_and_gateways_stay_connected(
    bench: Any, client: Any, postgres_server: Any
) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    before = dict(agent.desired)
    postgres_server.stop()
    try:
        with pytest.raises(Unavailable):
            await client.create("other")
        with pytest.raises(Unavailable):
            await client.get()
        table = await client.routes(lambda t: bool(t))
        assert table["digits"].targets[0].ready_replicas == 1
        await bench.eventually(lambda: not_serving(client))
        # Longer than a silent node is given: the silence is the database's, not the node's.
        reports = agent.reports
        await bench.eventually(lambda: agent.reports >= reports + 8)
        assert agent.error is None
        assert agent.desired == before
    finally:
        postgres_server.start()
    await bench.eventually(lambda: serving(client))
    assert (await client.update(replicas=2)).revision == 2
    assert (await client.until("digits", lambda d: d.state == 2 and d.revision == 2)).ready_replicas == 2
    assert set(before) < set(agent.desired), "nothing that ran was given up"
    assert agent.error is None


async def serving(client: Any) -> bool:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub(client.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def not_serving(client: Any) -> bool:
    return not await serving(client)


async def test_a_scheduler_that_is_started_before_its_database_waits_for_it(
    idle_bench: Any, postgres_server: Any
) -> None:
    idle_bench.registry.push()
    postgres_server.stop()
    try:
        await idle_bench.start()
        client = idle_bench.client()
        assert await not_serving(client)
    finally:
        postgres_server.start()
    await idle_bench.eventually(lambda: serving(client))
    await client.create()


async def test_a_schema_of_a_newer_release_stops_the_scheduler_with_the_reason(idle_bench: Any) -> None:
    url = idle_bench.database_url.replace("postgresql+psycopg", "postgresql")
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute("UPDATE scheduler.schema_version SET version_num = '9999'")
        await connection.commit()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "penstock_scheduler",
        env={
            **os.environ,
            "PENSTOCK_DATABASE_URL": idle_bench.database_url,
            "PENSTOCK_SCHEDULER_LISTEN": idle_bench.address,
            "PENSTOCK_MIGRATE_ON_START": "true",
        },
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, words = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert b"made by a newer release" in words


async def test_a_settled_cluster_writes_nothing(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    for number in range(3):
        await client.create(f"d{number}", replicas=2)
    for number in range(3):
        await client.until_state("READY", f"d{number}")

    async def written() -> int:
        url = bench.database_url.replace("postgresql+psycopg", "postgresql")
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            row = await (await connection.execute("SELECT pg_current_xact_id()::text::bigint")).fetchone()
        assert row is not None
        return int(row[0])

    first = await written()
    reports = agent.reports
    await bench.eventually(lambda: agent.reports >= reports + 8)
    # Each look at the counter takes a transaction id itself.
    assert await written() - first <= 1


async def test_two_hundred_replicas_of_twenty_deployments_settle(bench: Any, client: Any) -> None:
    for number in range(5):
        await bench.agent(f"n{number}", cpu_millis=8000, memory_bytes=16 * GIB)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*(client.create(f"d{number}", replicas=10) for number in range(20)))
    await asyncio.gather(*(client.until_state("READY", f"d{number}") for number in range(20)))
    took = loop.time() - began
    print(f"200 replicas were ready after {took:.2f} s")
    assert took < 15
    assert [len(agent.desired) for agent in bench.agents] == [40] * 5
    table = await client.routes(lambda t: all(r.targets[0].ready_replicas == 10 for r in t.values()))
    assert len(table) == 20
    assert all(route.targets[0].weight == 100 for route in table.values())
    assert (await client.get("d0")).state == deployment_pb2.DEPLOYMENT_STATE_READY


async def test_what_ended_long_ago_is_forgotten(store: Store) -> None:
    await store.apply(placed("live", MODEST), placed("ended", MODEST))
    await store.apply(placed("ended", MODEST).advance(ReplicaState.STOPPED, NOW))
    gone = replace(NODE, name="gone", state=NodeState.LOST)
    await store.apply(nodes=(gone, replace(gone, name="back", state=NodeState.READY)))
    for before, nodes, replicas in ((NOW, 3, 2), (NOW + timedelta(days=1), 2, 1)):
        async with store.works() as work:
            await work.cluster.prune(before)
            assert len(await work.cluster.nodes("", 10)) == nodes
            found = await work.cluster.replicas("", 10, deployment="", node="", stopped=True)
            assert len(found) == replicas
            await work.commit()
