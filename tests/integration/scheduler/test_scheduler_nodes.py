"""Nodes that come, go, and lie."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc, replica_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import InvalidArgument

READY = node_pb2.NODE_STATE_READY
LOST = node_pb2.NODE_STATE_LOST
GIB = 1024**3
QUICKLY_LOST = pytest.mark.parametrize("leases", [{"node_lease_seconds": 0.6}], ids=["short"])
QUICKLY_SILENT = pytest.mark.parametrize("leases", [{"node_silence_seconds": 2.0}], ids=["short"])


async def lost(client: Any, name: str = "n1") -> bool:
    return bool((await client.node(name)).state == LOST)


async def test_a_node_is_listed_as_its_agent_describes_it(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1", gpus=2)
    agent.node.labels["zone"] = "a"
    agent.node.cached_digests.append("sha256:1")

    async def described() -> bool:
        return (await client.node()).labels == {"zone": "a"}

    await bench.eventually(described)
    node = await client.node()
    assert node.state == READY
    assert [(d.id, d.kind) for d in node.devices] == [
        ("cpu", node_pb2.DEVICE_KIND_CPU),
        ("gpu0", node_pb2.DEVICE_KIND_GPU),
        ("gpu1", node_pb2.DEVICE_KIND_GPU),
    ]
    assert list(node.cached_digests) == ["sha256:1"]
    assert sorted(node.runtimes) == ["onnx", "sklearn", "torch"]
    listed = await client.stub.ListNodes(pb.ListNodesRequest())
    assert [n.name for n in listed.nodes] == ["nodes/n1"]


async def test_when_a_node_was_last_heard_of_is_told_to_the_second(bench: Any, client: Any) -> None:
    await bench.agent("n1")
    first = (await client.node()).last_seen_time.ToDatetime(UTC)

    async def heard_again() -> bool:
        return (await client.node()).last_seen_time.ToDatetime(UTC) > first

    await bench.eventually(heard_again)
    assert datetime.now(UTC) - (await client.node()).last_seen_time.ToDatetime(UTC) < timedelta(seconds=10)


async def test_what_is_held_is_shown_on_node_and_devices(bench: Any, client: Any) -> None:
    await bench.agent("n1", gpus=2)
    await client.create(resources=resources_pb2.Resources(gpus=1, gpu_memory_bytes=4 * GIB))
    await client.create("alone", resources=resources_pb2.Resources(gpus=1))
    await client.until_state("READY")
    await client.until_state("READY", "alone")
    node = await client.node()
    assert sorted(d.memory_bytes_allocated for d in node.devices[1:]) == [4 * GIB, 16 * GIB]
    assert node.devices[0].memory_bytes_allocated == node.memory_bytes_allocated > 0
    held = (await client.stub.ListAllocations(pb.ListAllocationsRequest(node="nodes/n1"))).allocations
    assert {a.holder for a in held} == {r.name for r in await client.replicas()}
    assert {tuple(a.devices) for a in held} == {("gpu0",), ("gpu1",)}


@QUICKLY_LOST
async def test_replicas_of_a_lost_node_move_to_another(bench: Any, client: Any) -> None:
    first = await bench.agent("n1")
    second = await bench.agent("n2")
    await client.create(replicas=2)
    await client.until_state("READY")
    assert len(first.desired) == len(second.desired) == 1
    await first.vanish()
    await bench.eventually(lambda: len(second.desired) == 2)
    await client.until("digits", lambda d: d.state == 2 and d.ready_replicas == 2)
    assert await lost(client)
    assert {r.node for r in await client.replicas()} == {"nodes/n2"}
    await first.attach()

    async def back() -> bool:
        return not await lost(client)

    await bench.eventually(back)
    await bench.eventually(lambda: not first.desired)


@QUICKLY_LOST
async def test_replicas_of_the_only_node_wait_and_say_so(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    await agent.vanish()
    seen = await client.until("digits", lambda d: "not connected" in d.message)
    assert seen.ready_replicas == 0
    await client.routes(lambda table: bool(table["digits"].message))
    await agent.attach()
    await client.until_state("READY")


async def test_an_agent_that_is_restarted_quickly_keeps_its_replicas(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create(replicas=2)
    await client.until_state("READY")
    before = set(agent.desired)
    generation = agent.generation
    await agent.vanish()
    agent.observed.clear()
    agent.hold = lambda spec: True
    await agent.attach()
    await bench.eventually(lambda: len(agent.observed) == 2)
    assert agent.generation == generation
    assert set(agent.desired) == before
    await client.until("digits", lambda d: d.ready_replicas == 0)
    agent.hold = lambda spec: False
    agent.obey()
    await client.until_state("READY")
    assert {r.name for r in await client.replicas()} == before


@QUICKLY_SILENT
async def test_an_agent_that_falls_silent_on_an_open_stream_is_given_up(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    agent.silent = True
    await bench.eventually(lambda: lost(client))
    agent.silent = False
    await client.until("digits", lambda d: d.state == 2)


@QUICKLY_SILENT
async def test_a_pause_of_the_scheduler_is_not_held_against_the_nodes(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    before = set(agent.desired)
    # Scheduler and agent share this loop: both stand still, for longer than a silent node is given.
    time.sleep(2.6)  # noqa: ASYNC251
    reports = agent.reports
    await bench.eventually(lambda: agent.reports >= reports + 4)
    assert not await lost(client)
    assert set(agent.desired) == before


async def test_a_second_stream_of_a_node_ends_the_first(bench: Any, client: Any) -> None:
    first = await bench.agent()
    second = await bench.agent()
    await bench.eventually(lambda: first.error is not None)
    assert first.error is not None
    assert first.error.code() is grpc.StatusCode.ABORTED
    assert "give every worker a name of its own" in (first.error.details() or "")
    assert second.error is None
    await client.create()
    await bench.eventually(lambda: len(second.desired) == 1)
    assert not first.desired


async def test_a_node_that_came_back_smaller_never_holds_more_than_it_has(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1", cpu_millis=400)
    await client.create(replicas=4, resources=resources_pb2.Resources(cpu_millis=100))
    await client.until_state("READY")
    agent.node.cpu_millis = 200

    async def fits() -> bool:
        node = await client.node()
        assert node.cpu_millis_allocated <= node.cpu_millis
        return bool(node.cpu_millis == node.cpu_millis_allocated == 200)

    await bench.eventually(fits)
    seen = await client.until_state("DEGRADED")
    assert "lacks 0.1 cores of CPU" in seen.message


async def test_a_gpu_that_vanished_is_taken_from_who_held_it(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1", gpus=1)
    await client.create(resources=resources_pb2.Resources(gpus=1))
    await client.until_state("READY")
    del agent.node.devices[1]
    seen = await client.until("digits", lambda d: "lacks GPUs" in d.message)
    assert seen.ready_replicas == 0
    assert len((await client.node()).devices) == 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (node_service_pb2.AttachRequest(), "nodes/{node}"),
        (node_service_pb2.AttachRequest(node=node_pb2.Node(name="n1")), "nodes/{node}"),
        (
            node_service_pb2.AttachRequest(node=node_pb2.Node(name="nodes/n1", memory_bytes=-1)),
            "reports -1 as its memory_bytes",
        ),
        (
            node_service_pb2.AttachRequest(node=node_pb2.Node(name="nodes/n1", cpu_millis=2**62)),
            "as its cpu_millis",
        ),
        (
            node_service_pb2.AttachRequest(node=node_pb2.Node(name="nodes/n1", disk_bytes=-1)),
            "reports -1 as its disk_bytes",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(
                    name="nodes/n1", devices=[node_pb2.Device(id="cpu", kind=node_pb2.DEVICE_KIND_GPU)]
                )
            ),
            "alone is the processor",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(name="nodes/n1", devices=[node_pb2.Device(id="a", kind=7)])
            ),
            "does not say what its device a is",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(name="nodes/n1"),
                replicas=[
                    replica_pb2.ObservedReplica(
                        name="replicas/r", state=replica_pb2.REPLICA_STATE_READY, memory_bytes=-1
                    )
                ],
            ),
            "memory_bytes -1",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(name="nodes/n1"),
                replicas=2
                * [replica_pb2.ObservedReplica(name="replicas/r", state=replica_pb2.REPLICA_STATE_READY)],
            ),
            "reported twice",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(
                    name="nodes/n1", devices=2 * [node_pb2.Device(id="a", kind=node_pb2.DEVICE_KIND_GPU)]
                )
            ),
            "not unique",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(name="nodes/n1", devices=[node_pb2.Device(id="a")])
            ),
            "does not say what its device a is",
        ),
        (
            node_service_pb2.AttachRequest(
                node=node_pb2.Node(name="nodes/n1"),
                replicas=[replica_pb2.ObservedReplica(name="replicas/r")],
            ),
            "without a state",
        ),
    ],
)
async def test_a_report_that_makes_no_sense_ends_the_stream(
    bench: Any, client: Any, request_: node_service_pb2.AttachRequest, words: str
) -> None:
    stub: Any = node_service_pb2_grpc.NodeServiceStub(client.channel)

    async def one() -> Any:
        yield request_
        await asyncio.Event().wait()

    with pytest.raises(InvalidArgument) as refused:
        async for _ in stub.Attach(one()):
            pass
    assert words in refused.value.message
    assert not (await client.stub.ListNodes(pb.ListNodesRequest())).nodes


async def test_a_stream_cannot_change_its_node(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    agent.node.name = "nodes/other"
    await bench.eventually(lambda: agent.error is not None)
    assert agent.error is not None
    assert agent.error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_a_model_prints_cannot_stop_the_scheduler(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1")
    agent.loads = lambda spec: "its last output:\n\0" + "x" * 100_000
    await client.create()

    async def told_why() -> bool:
        return any("its last output" in replica.message for replica in await client.replicas())

    await bench.eventually(told_why)
    (replica,) = await client.replicas()
    assert "\0" not in replica.message
    assert len(replica.message) < 10_000
    agent.loads = lambda spec: ""
    await client.create("another")
    await client.until_state("READY", "another")


async def test_a_node_that_reports_what_cannot_be_stored_is_refused(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1")
    agent.node.labels["zone"] = "\0"

    def refused() -> bool:
        return agent.error is not None

    await bench.eventually(refused)
    assert agent.error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_name_that_another_machine_bears_is_not_given_to_a_second(bench: Any, client: Any) -> None:
    first = await bench.agent("n1", instance="one")
    await client.create()
    await client.until_state("READY")
    second = bench.stranger("n1", instance="two")
    await second.attach()
    await bench.eventually(lambda: second.error is not None)
    assert second.error is not None
    assert second.error.code() is grpc.StatusCode.ABORTED
    assert "a name of its own" in second.error.details()
    assert not second.desired
    assert first.error is None
    await first.vanish()
    await first.attach()
    await first.told(0)
    assert first.error is None


@QUICKLY_LOST
async def test_another_machine_gets_the_name_when_the_first_is_lost_and_the_first_is_told(
    bench: Any, client: Any
) -> None:
    first = await bench.agent("n1", instance="one")
    await client.create()
    await client.until_state("READY")
    (before,) = await client.replicas()
    await first.vanish()
    second = bench.stranger("n1", instance="two")

    async def accepted() -> bool:
        if not second.desired:
            await second.vanish()
            await second.attach()
            await bench.eventually(lambda: second.error is not None or second.generation > 0)
        return bool(second.desired)

    await bench.eventually(accepted)
    assert before.name not in second.desired
    first.generation = 0
    await first.attach()
    await bench.eventually(lambda: first.error is not None)
    assert first.error is not None
    assert first.error.code() is grpc.StatusCode.ABORTED
    assert (await client.node()).instance == "two"


async def test_after_a_restart_of_the_scheduler_a_name_is_still_the_first_machines(
    bench: Any, client: Any
) -> None:
    first = await bench.agent("n1", instance="one")
    await client.create()
    await client.until_state("READY")
    await first.vanish()
    await bench.stop()
    await bench.start()
    second = bench.stranger("n1", instance="two")

    async def refused_for_good() -> bool:
        await second.vanish()
        await second.attach()
        await bench.eventually(lambda: second.error is not None or second.generation > 0)
        return second.error is not None and second.error.code() is grpc.StatusCode.ABORTED

    await bench.eventually(refused_for_good)
    assert not second.desired
