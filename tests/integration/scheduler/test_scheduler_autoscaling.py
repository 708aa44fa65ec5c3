"""Numbers of replicas follow what gateways report, down to none and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import deployment_pb2, routing_service_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import InvalidArgument, PenstockError
from penstock_scheduler.usecases import autoscaling

Scaling = deployment_pb2.Autoscaling
SECOND = Duration(seconds=1)
FROM_ZERO = Scaling(min_replicas=0, max_replicas=3, idle=SECOND, cool_down=SECOND)


class Gateway:
    """Reports several times a second, as long as the test lasts."""

    def __init__(self, client: Any, deployment: str = "digits") -> None:
        self._client = client
        self.target = routing_service_pb2.TargetTraffic(
            deployment=deployment, model="models/digits", version=1
        )

    async def report(self) -> None:
        """Reports now."""
        request = routing_service_pb2.ReportTrafficRequest(
            gateway=f"gateway of {self.target.deployment}", targets=[self.target]
        )
        await self._client.routing.ReportTraffic(request)

    async def run(self) -> None:
        """Reports until cancelled; a scheduler that is not there yet is asked again."""
        while True:
            with suppress(PenstockError):
                await self.report()
            await asyncio.sleep(0.1)


@asynccontextmanager
async def reporting(client: Any, deployment: str = "digits") -> AsyncIterator[Gateway]:
    gateway = Gateway(client, deployment)
    task = asyncio.create_task(gateway.run())
    try:
        yield gateway
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def change(client: Any, scaling: Any, *paths: str) -> deployment_pb2.Deployment:
    deployment = deployment_pb2.Deployment(name="deployments/digits", autoscaling=scaling)
    request = pb.UpdateDeploymentRequest(deployment=deployment, update_mask=FieldMask(paths=paths))
    made: deployment_pb2.Deployment = await client.stub.UpdateDeployment(request)
    return made


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (Scaling(), "max_replicas is 0; say how many replicas there may be, 1 to 1000"),
        (Scaling(max_replicas=-2), "max_replicas is -2"),
        (Scaling(max_replicas=1001), "max_replicas is 1001"),
        (Scaling(max_replicas=3, min_replicas=-1), "min_replicas is -1"),
        (Scaling(max_replicas=3, min_replicas=4), "min_replicas is 4, more than its max_replicas, 3"),
        (Scaling(max_replicas=3, queue_wait_objective=Duration(seconds=-1)), "queue_wait_objective is -1 s"),
        (Scaling(max_replicas=3, queue_wait_objective=Duration(nanos=1)), "queue_wait_objective is 1e-09 s"),
        (Scaling(max_replicas=3, idle=Duration(nanos=5_000_000)), "idle is 0.005 s"),
        (Scaling(max_replicas=3, cool_down=Duration(seconds=10**9)), "cool_down is 1e"),
    ],
)
async def test_an_absurd_autoscaling_is_refused_with_what_to_correct(
    client: Any, scaling: deployment_pb2.Autoscaling, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words) as refused:
        await client.create(autoscaling=scaling)
    assert refused.value.metadata["field"].startswith("autoscaling.")


async def test_autoscaling_is_set_changed_in_part_and_ended(bench: Any, client: Any) -> None:
    made = await client.create(autoscaling=Scaling(min_replicas=2, max_replicas=5))
    assert made.autoscaling == Scaling(
        min_replicas=2,
        max_replicas=5,
        queue_wait_objective=Duration(nanos=100_000_000),
        idle=Duration(seconds=300),
        cool_down=Duration(seconds=60),
    )
    assert made.desired_replicas == 2
    changed = await change(client, Scaling(min_replicas=3), "autoscaling.min_replicas")
    assert (changed.autoscaling.min_replicas, changed.autoscaling.max_replicas) == (3, 5)
    assert changed.autoscaling.idle == Duration(seconds=300)
    assert changed.desired_replicas == 3
    with pytest.raises(InvalidArgument, match="more than its max_replicas"):
        await change(client, Scaling(max_replicas=2), "autoscaling.max_replicas")
    assert not (await change(client, None, "autoscaling")).HasField("autoscaling")
    assert (await client.get()).desired_replicas == 1


async def test_the_last_replica_ends_and_a_request_brings_one_back(bench: Any, client: Any) -> None:
    await bench.agent()
    await client.create(autoscaling=FROM_ZERO)
    await client.until_state("READY")
    async with reporting(client) as gateway:
        idle = await client.until("digits", lambda seen: seen.desired_replicas == 0)
        idle = await client.until("digits", lambda seen: not seen.ready_replicas and "Idle" in seen.message)
        assert idle.state == deployment_pb2.DEPLOYMENT_STATE_READY
        table = await client.routes(lambda t: not t["digits"].targets[0].ready_replicas)
        assert table["digits"].scales_from_zero
        assert table["digits"].targets[0].weight == 100
        assert "next request" in table["digits"].message
        gateway.target.arrived = gateway.target.waiting = gateway.target.waiting_for_replica = 1
        await gateway.report()
        table = await client.routes(lambda t: t["digits"].targets[0].ready_replicas == 1)
        assert not table["digits"].message


async def test_an_idle_deployment_stays_idle_under_the_next_scheduler_and_still_wakes(
    bench: Any, client: Any
) -> None:
    await bench.agent()
    await client.create(autoscaling=FROM_ZERO)
    await client.until_state("READY")
    async with reporting(client) as gateway:
        await client.until("digits", lambda seen: seen.desired_replicas == 0 and not seen.ready_replicas)
        await bench.agents[0].vanish()
        await bench.stop()
        await bench.start()
        await bench.agent()
        assert (await client.get()).desired_replicas == 0
        gateway.target.waiting = gateway.target.waiting_for_replica = 1
        await client.until("digits", lambda seen: seen.ready_replicas == 1)


async def test_a_new_version_of_an_idle_deployment_is_tried_before_it_takes_over(
    bench: Any, client: Any
) -> None:
    bench.registry.push("digits", 2)
    await bench.agent()
    await client.create(autoscaling=FROM_ZERO)
    await client.until_state("READY")
    async with reporting(client):
        await client.until("digits", lambda seen: seen.desired_replicas == 0 and not seen.ready_replicas)
        await client.update("digits", deployment_pb2.Target(model="models/digits", version=2))
        await client.until("digits", lambda seen: [t.version for t in seen.serving] == [2])
        await client.until("digits", lambda seen: not seen.ready_replicas and "Idle" in seen.message)


async def test_more_replicas_come_when_requests_queue_and_that_is_no_trouble(bench: Any, client: Any) -> None:
    await bench.agent()
    await client.create(autoscaling=Scaling(min_replicas=1, max_replicas=3))
    await client.until_state("READY")
    async with reporting(client) as gateway:

        async def load() -> bool:
            # A hundred come in each tenth of a second, ten are answered.
            target = gateway.target
            target.arrived += 100
            target.succeeded += 10
            target.latency_microseconds += 10 * 500_000
            target.latencies[:] = [0] * 50 + [target.succeeded] + [0] * 13
            target.waiting += 90
            await asyncio.sleep(0.1)
            seen = await client.get()
            assert seen.state == deployment_pb2.DEPLOYMENT_STATE_READY, seen
            return bool(seen.ready_replicas == 3)

        await bench.eventually(load, "three replicas answer")


async def test_an_idle_deployment_makes_room_for_one_that_finds_none(
    bench: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaling, "EVICTABLE_SECONDS", 0.5)
    await bench.agent(memory_bytes=1_000_000_000)
    large = resources_pb2.Resources(memory_bytes=800_000_000)
    patient = Scaling(min_replicas=0, max_replicas=1, idle=Duration(seconds=3600))
    await client.create(autoscaling=patient, resources=large)
    await client.until_state("READY")
    async with reporting(client):
        await client.create("other", deployment_pb2.Target(model="models/digits", version=1), resources=large)
        await client.until_state("READY", "other")
        assert "Idle" in (await client.get()).message
