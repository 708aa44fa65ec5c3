"""Updates, during which a deployment always answers."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import deployment_pb2, replica_pb2, routing_service_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb

Target = deployment_pb2.Target


def target(version: int = 1, weight: int = 0) -> deployment_pb2.Target:
    return Target(model="models/digits", version=version, weight=weight)


def serving(deployment: deployment_pb2.Deployment) -> dict[int, int]:
    return {t.resolved_version: t.weight for t in deployment.serving}


def weights(table: dict[str, routing_service_pb2.Route]) -> dict[int, int]:
    return {t.version: t.weight for t in table["digits"].targets if t.weight}


class Gateway:
    """Watches the routes and keeps every table it was sent."""

    def __init__(self, client: Any) -> None:
        self.tables: list[routing_service_pb2.WatchRoutesResponse] = []
        self._task = asyncio.create_task(self._watch(client))

    async def _watch(self, client: Any) -> None:
        async for table in client.routing.WatchRoutes(routing_service_pb2.WatchRoutesRequest(gateway="g")):
            self.tables.append(table)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def answered_all_the_time(self) -> bool:
        """Whether, from the first ready table on, every target with traffic had a ready replica."""
        routes = [{r.deployment: r for r in t.routes}.get("digits") for t in self.tables]
        ready = [all(t.ready_replicas for t in r.targets if t.weight) for r in routes if r and r.targets]
        return bool(ready) and all(ready[ready.index(True) :])


async def test_callers_are_answered_throughout_an_update(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    bench.registry.push(number=2)
    gateway = Gateway(client)
    await client.create(replicas=2)
    await client.until_state("READY")
    agent.hold = lambda spec: spec.version.endswith("/2")
    await client.update("digits", target(2))
    updating = await client.until_state("UPDATING")
    assert serving(updating) == {1: 100}
    await client.routes(lambda table: {t.version for t in table["digits"].targets} == {1, 2})
    agent.hold = lambda spec: spec.draining
    agent.obey()
    await client.until("digits", lambda d: serving(d) == {2: 100})
    await client.routes(lambda table: weights(table) == {2: 100})
    states = {r.version[-1]: r.state for r in await client.replicas()}
    assert states == {"1": replica_pb2.REPLICA_STATE_DRAINING, "2": replica_pb2.REPLICA_STATE_READY}
    agent.hold = lambda spec: False
    agent.obey()
    await client.routes(lambda table: [t.version for t in table["digits"].targets] == [2])
    await gateway.stop()
    assert gateway.answered_all_the_time()
    generations = [t.generation for t in gateway.tables]
    assert generations == sorted(set(generations))


async def test_a_new_version_that_does_not_load_leaves_the_old_one_serving(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    bench.registry.push(number=2)
    await client.create()
    await client.until_state("READY")
    agent.loads = lambda spec: "the file is not a model" if spec.version.endswith("/2") else ""
    await client.update("digits", target(2))
    seen = await client.until("digits", lambda d: "the file is not a model" in d.message)
    assert seen.state == deployment_pb2.DEPLOYMENT_STATE_UPDATING
    assert serving(seen) == {1: 100}
    assert weights(await client.routes()) == {1: 100}
    await client.rollback()
    assert (await client.until_state("READY")).targets[0].version == 1
    await bench.eventually(lambda: len(agent.desired) == 1)


async def test_a_first_version_that_does_not_load_fails_with_its_words(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    agent.loads = lambda spec: "no such operator"
    await client.create()
    failed = await client.until_state("FAILED")
    assert "no such operator" in failed.message
    table = await client.routes(lambda t: "no such operator" in t["digits"].message)
    assert table["digits"].targets[0].ready_replicas == 0
    agent.loads = lambda spec: ""
    agent.obey()
    assert (await client.until_state("READY")).message == ""


async def test_a_crash_loop_degrades_and_recovers(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create(replicas=2)
    await client.until_state("READY")
    first = min(agent.desired)
    agent.say(first, replica_pb2.REPLICA_STATE_BACKOFF, "killed by signal 9", restarts=3)
    seen = await client.until_state("DEGRADED")
    assert "1 of 2 replicas answer" in seen.message
    assert "killed by signal 9" in seen.message
    (crashed,) = (r for r in await client.replicas() if r.name == first)
    assert crashed.restarts == 3
    agent.say(first, replica_pb2.REPLICA_STATE_READY, restarts=3)
    assert (await client.until_state("READY")).ready_replicas == 2


async def test_traffic_shifts_without_starting_or_ending_anything(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    bench.registry.push(number=2)
    await client.create("digits", target(1, 90), target(2, 10))
    await client.until_state("READY")
    generation = agent.generation
    shifted = await client.update("digits", target(1, 0), target(2, 100))
    assert shifted.revision == 2
    await client.until("digits", lambda d: serving(d) == {1: 0, 2: 100})
    await client.routes(lambda table: weights(table) == {2: 100})
    assert agent.generation == generation


@pytest.mark.parametrize(
    "change",
    [
        {"resources": resources_pb2.Resources(cpu_millis=300)},
        {
            "batching": resources_pb2.Batching(
                max_batch_size=16, max_delay_microseconds=500, latency_objective_microseconds=250_000
            )
        },
    ],
)
async def test_a_new_spec_replaces_replicas_new_before_old(
    bench: Any, client: Any, change: dict[str, Any]
) -> None:
    agent = await bench.agent()
    gateway = Gateway(client)
    await client.create(replicas=2)
    await client.until_state("READY")
    before = set(agent.desired)
    await client.update(**change)
    await client.until("digits", lambda d: d.revision == 2 and d.state == 2 and d.ready_replicas == 2)
    await bench.eventually(lambda: len(agent.desired) == 2)
    assert not before & set(agent.desired)
    spec = next(iter(agent.desired.values()))
    assert spec.resources.cpu_millis == (300 if "resources" in change else 50)
    assert spec.batching.max_batch_size == (16 if "batching" in change else 0)
    assert spec.batching.latency_objective_microseconds == (250_000 if "batching" in change else 0)
    await gateway.stop()
    assert gateway.answered_all_the_time()


async def test_more_and_fewer_replicas(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    (first,) = agent.desired
    await client.update(replicas=3)
    await client.until("digits", lambda d: d.state == 2 and d.ready_replicas == 3)
    assert first in agent.desired
    await client.update(replicas=1)
    await bench.eventually(lambda: len(agent.desired) == 1)
    assert (await client.until_state("READY")).ready_replicas == 1


async def test_a_scheduler_that_is_restarted_in_the_middle_finishes_the_update(
    bench: Any, client: Any
) -> None:
    agent = await bench.agent()
    bench.registry.push(number=2)
    await client.create()
    await client.until_state("READY")
    agent.hold = lambda spec: spec.version.endswith("/2")
    await client.update("digits", target(2))
    await bench.eventually(lambda: len(agent.desired) == 2)
    generation, wanted = agent.generation, set(agent.desired)
    await bench.stop()
    await bench.start()
    table = await bench.client().routes(lambda t: bool(t))
    assert weights(table) == {1: 100}, "the restart must not empty the routes"
    assert table["digits"].targets[0].ready_replicas == 1
    await agent.vanish()
    await agent.attach()
    await agent.told(generation)
    assert set(agent.desired) == wanted, "the same replicas are wanted after the restart"
    agent.hold = lambda spec: False
    agent.obey()
    again = bench.client()
    await again.until("digits", lambda d: serving(d) == {2: 100} and d.state == 2)
    await bench.eventually(lambda: len(agent.desired) == 1)


async def test_a_watcher_sees_every_step_and_nothing_twice(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    agent.hold = lambda spec: True
    await client.create()
    seen: list[deployment_pb2.Deployment] = []

    async def watch() -> None:
        async for item in client.stub.WatchDeployment(pb.WatchDeploymentRequest(name="deployments/digits")):
            seen.append(item)  # noqa: PERF401 - the test looks at it meanwhile

    watching = asyncio.create_task(watch())
    await bench.eventually(lambda: bool(seen))
    agent.hold = lambda spec: False
    agent.obey()
    await client.until_state("READY")
    await client.delete()
    await asyncio.wait_for(watching, 10)
    states = [deployment_pb2.DeploymentState.Name(s.state).rpartition("_")[2] for s in seen]
    assert states[0] == "PENDING"
    assert "READY" in states
    assert states[-1] == "DELETING"
    assert all(a != b for a, b in pairwise(seen))
