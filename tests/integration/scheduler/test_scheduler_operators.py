"""What operators say of nodes, and what replicas ask of them."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import field_mask_pb2

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import deployment_pb2, node_pb2, replica_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import FailedPrecondition, InvalidArgument, NotFound

READY = replica_pb2.REPLICA_STATE_READY
GIB = 1024**3


async def say(client: Any, name: str = "n1", mask: tuple[str, ...] = (), **fields: Any) -> node_pb2.Node:
    """What an operator does; without a mask, those fields that are given are meant."""
    node = node_pb2.Node(name=f"nodes/{name}", **fields)
    paths = field_mask_pb2.FieldMask(paths=mask or tuple(fields))
    found: node_pb2.Node = await client.stub.UpdateNode(pb.UpdateNodeRequest(node=node, update_mask=paths))
    return found


async def where(client: Any) -> set[str]:
    """Nodes with a READY replica."""
    return {replica.node for replica in await client.replicas() if replica.state == READY}


async def test_a_cordoned_node_keeps_what_it_has_and_takes_nothing_new(bench: Any, client: Any) -> None:
    await bench.agent("n1")
    await client.create()
    await client.until_state("READY")
    node = await say(client, cordoned=True)
    assert node.cordoned
    assert not node.draining
    await client.create("another")

    async def says_why() -> bool:
        return "uncordon n1" in (await client.get("another")).message

    await bench.eventually(says_why)
    assert (await client.get()).state == deployment_pb2.DEPLOYMENT_STATE_READY
    await say(client, cordoned=False)
    await client.until_state("READY", "another")


async def test_what_operators_said_outlives_reports_agents_and_schedulers(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1")
    await say(client, cordoned=True, taints=[node_pb2.Taint(key="a", value="b")])
    agent.node.labels["zone"] = "z"

    async def described() -> bool:
        return (await client.node()).labels == {"zone": "z"}

    await bench.eventually(described)
    await agent.vanish()
    await bench.stop()
    await bench.start()
    await bench.agent("n1")
    node = await bench.client().node()
    assert node.cordoned
    assert [(taint.key, taint.value) for taint in node.taints] == [("a", "b")]


async def test_a_drain_moves_replicas_new_before_old(bench: Any, client: Any) -> None:
    first = await bench.agent("n1")
    await client.create(replicas=2)
    await client.until_state("READY")
    second = await bench.agent("n2")
    second.hold = lambda spec: True
    await say(client, draining=True)

    async def starting() -> bool:
        return len(second.desired) == 2

    await bench.eventually(starting)
    assert not any(spec.draining for spec in first.desired.values())
    assert "2 replicas here" in (await client.node("n1")).message
    second.hold = lambda spec: False
    second.obey()

    async def moved() -> bool:
        return not first.desired and await where(client) == {"nodes/n2"}

    await bench.eventually(moved)
    node = await client.node("n1")
    assert node.cordoned
    assert node.message == ""
    assert (await client.get()).state == deployment_pb2.DEPLOYMENT_STATE_READY


async def test_a_drain_waits_and_says_why_while_nothing_else_fits(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1")
    await bench.agent("n2", memory_bytes=GIB)
    await client.create(resources=resources_pb2.Resources(memory_bytes=2 * GIB))
    await client.until_state("READY")
    await say(client, draining=True)

    async def says_why() -> bool:
        message = (await client.node("n1")).message
        return "1 replica here" in message and "nodes/n2, lacks 1024 MiB of memory" in message

    await bench.eventually(says_why)
    assert not any(spec.draining for spec in agent.desired.values())
    assert await where(client) == {"nodes/n1"}
    await say(client, cordoned=False, draining=False)

    async def settled() -> bool:
        return len(await client.replicas()) == 1 and (await client.node("n1")).message == ""

    await bench.eventually(settled)


async def test_contradictions_and_unknown_nodes_are_refused(bench: Any, client: Any) -> None:
    await bench.agent("n1")
    with pytest.raises(NotFound):
        await say(client, "n2", cordoned=True)
    with pytest.raises(InvalidArgument):
        await say(client, mask=("memory_bytes",), memory_bytes=1)
    with pytest.raises(InvalidArgument):
        await say(client, taints=[node_pb2.Taint(value="b")])
    with pytest.raises(InvalidArgument):
        await say(client, taints=2 * [node_pb2.Taint(key="a")])
    await say(client, draining=True)
    with pytest.raises(FailedPrecondition, match="being drained"):
        await say(client, cordoned=False)


async def test_replicas_go_where_labels_and_taints_let_them(bench: Any, client: Any) -> None:
    first = await bench.agent("n1")
    second = await bench.agent("n2")
    second.node.labels["zone"] = "b"
    await say(client, "n2", taints=[node_pb2.Taint(key="dedicated", value="research")])

    async def described() -> bool:
        return (await client.node("n2")).labels == {"zone": "b"}

    await bench.eventually(described)
    with pytest.raises(FailedPrecondition, match="do not bear its taint dedicated=research"):
        await client.create(node_selector={"zone": "b"})
    with pytest.raises(FailedPrecondition, match=r"lacks the label zone=c"):
        await client.create(
            node_selector={"zone": "c"}, tolerations=[deployment_pb2.Toleration(key="dedicated")]
        )
    made = await client.create(
        node_selector={"zone": "b"}, tolerations=[deployment_pb2.Toleration(key="dedicated")]
    )
    assert made.node_selector == {"zone": "b"}
    assert [t.key for t in made.tolerations] == ["dedicated"]
    await client.until_state("READY")
    assert await where(client) == {"nodes/n2"}
    assert not first.desired
    lift = deployment_pb2.Deployment(name="deployments/digits")
    mask = field_mask_pb2.FieldMask(paths=["node_selector"])
    await client.stub.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=lift, update_mask=mask))

    async def lifted() -> bool:
        return not (await client.get()).node_selector and len(await client.replicas()) == 1

    await bench.eventually(lifted)


async def test_disk_is_counted_once_for_replicas_of_one_bundle(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1")
    agent.node.disk_bytes = 3 * GIB
    agent.node.disk_bytes_free = GIB

    async def described() -> bool:
        return (await client.node()).disk_bytes == 3 * GIB

    await bench.eventually(described)
    await client.create(replicas=3, resources=resources_pb2.Resources(disk_bytes=2 * GIB))
    await client.until_state("READY")
    node = await client.node()
    assert node.disk_bytes_allocated == 2 * GIB
    assert node.disk_bytes_free == GIB
    with pytest.raises(FailedPrecondition, match="of disk"):
        await client.create("large", resources=resources_pb2.Resources(disk_bytes=4 * GIB))
    await client.delete()

    async def given_back() -> bool:
        return (await client.node()).disk_bytes_allocated == 0

    await bench.eventually(given_back)


async def test_a_gpu_is_shared_by_parts(bench: Any, client: Any) -> None:
    await bench.agent("n1", gpus=1)
    half = resources_pb2.Resources(gpus=1, gpu_memory_millis=500)
    await client.create(replicas=2, resources=half)
    await client.until_state("READY")
    (gpu,) = [device for device in (await client.node()).devices if device.id == "gpu0"]
    assert gpu.memory_bytes_allocated == gpu.memory_bytes
    await client.create("another", resources=half)

    async def waits() -> bool:
        return "GPUs with 50 % of their memory free" in (await client.get("another")).message

    await bench.eventually(waits)
    both = resources_pb2.Resources(gpus=1, gpu_memory_millis=500, gpu_memory_bytes=GIB)
    with pytest.raises(InvalidArgument, match="give one of them"):
        await client.create("both", resources=both)


async def test_measured_memory_corrects_what_new_replicas_hold(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1")
    await client.create()
    await client.until_state("READY")
    (before,) = await client.replicas()
    estimate = before.resources.memory_bytes
    agent.memory_bytes = 400 * 1024**2
    asked = 1

    async def corrected() -> bool:
        """One more replica each time: nothing else shows that what was measured has been taken up."""
        nonlocal asked
        asked += 1
        await client.update(replicas=asked)
        await client.until_state("READY")
        return 500 * 1024**2 in {r.resources.memory_bytes for r in await client.replicas()}

    await bench.eventually(corrected)
    held = {r.name: r.resources.memory_bytes for r in await client.replicas()}
    assert held[before.name] == estimate
    assert set(held.values()) == {estimate, 500 * 1024**2}
