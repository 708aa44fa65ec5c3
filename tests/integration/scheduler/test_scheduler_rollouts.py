"""Rollouts on a real database, with gateways that report what they would have counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import deployment_pb2, replica_pb2, rollout_pb2, routing_service_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound

Target = deployment_pb2.Target
REPORT_SECONDS = 0.05


def target(version: int = 1, weight: int = 0) -> deployment_pb2.Target:
    return Target(model="models/digits", version=version, weight=weight)


def policy(strategy: str = "CANARY", **fields: Any) -> deployment_pb2.RolloutPolicy:
    """A policy in a hurry."""
    hold = Duration(nanos=100_000_000)
    return deployment_pb2.RolloutPolicy(
        strategy=deployment_pb2.RolloutStrategy.Value(f"ROLLOUT_STRATEGY_{strategy}"),
        **{"step_duration": hold, **fields},
    )


def weights(table: dict[str, routing_service_pb2.Route]) -> dict[int, int]:
    return {t.version: t.weight for t in table["digits"].targets if t.weight}


class Gateway:
    """Follows the routes and reports traffic that fits them, in steps of 200 requests."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._weights: dict[int, int] = {}
        self._mirrors: dict[int, int] = {}
        self._counts: dict[int, routing_service_pb2.TargetTraffic] = {}
        self.errors: dict[int, float] = {}
        self.buckets: dict[int, int] = {}
        self.disagree: dict[int, float] = {}
        self.seen: list[dict[int, int]] = []
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._report())]

    async def _watch(self) -> None:
        request = routing_service_pb2.WatchRoutesRequest(gateway="g")
        async for table in self._client.routing.WatchRoutes(request):
            for route in table.routes:
                self._weights = {t.version: t.weight for t in route.targets if t.weight}
                self._mirrors = {t.version: t.mirror_percent for t in route.targets if t.mirror_percent}
                if self._weights not in self.seen[-1:]:
                    self.seen.append(self._weights)

    def _count(self, version: int) -> routing_service_pb2.TargetTraffic:
        if version not in self._counts:
            self._counts[version] = routing_service_pb2.TargetTraffic(
                deployment="digits", model="models/digits", version=version, latencies=[0] * 64
            )
        return self._counts[version]

    async def _report(self) -> None:
        while True:
            for version, weight in self._weights.items():
                count, answers = self._count(version), 2 * weight
                failed = round(answers * self.errors.get(version, 0.0))
                count.arrived += answers
                count.failed += failed
                count.succeeded += answers - failed
                count.latencies[self.buckets.get(version, 20)] += answers
            for version in self._mirrors:
                count = self._count(version)
                wrong = round(200 * self.disagree.get(version, 0.0))
                count.disagreed += wrong
                count.agreed += 200 - wrong
            await self._client.routing.ReportTraffic(
                routing_service_pb2.ReportTrafficRequest(gateway="g", targets=self._counts.values())
            )
            await asyncio.sleep(REPORT_SECONDS)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Rollouts:
    """The rollout RPCs as callers use them."""

    def __init__(self, client: Any) -> None:
        self._stub = client.stub

    async def get(self, name: str = "deployments/digits/rollouts/-") -> rollout_pb2.Rollout:
        return await self._stub.GetRollout(pb.GetRolloutRequest(name=name))

    async def hand(self, verb: str, name: str = "deployments/digits/rollouts/-") -> rollout_pb2.Rollout:
        call, request = getattr(self._stub, f"{verb}Rollout"), getattr(pb, f"{verb}RolloutRequest")
        return await call(request(name=name))

    async def until(self, state: str, name: str = "deployments/digits/rollouts/-") -> rollout_pb2.Rollout:
        """Waits until the rollout is in a state."""
        wanted = rollout_pb2.RolloutState.Value(f"ROLLOUT_STATE_{state}")
        seen = None
        async with asyncio.timeout(60):
            async for seen in self._stub.WatchRollout(pb.WatchRolloutRequest(name=name)):
                if seen.state == wanted:
                    return seen
        raise AssertionError(f"it ended otherwise:\n{seen}")

    async def begun(self) -> rollout_pb2.Rollout:
        """Waits until there is one under way."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return await self.get()
                except NotFound:
                    await asyncio.sleep(0.01)


@pytest.fixture
async def gateway(bench: Any, client: Any) -> AsyncIterator[Gateway]:
    """Version 1 serves, version 2 is pushed, and a gateway reports."""
    await bench.agent()
    bench.registry.push(number=2)
    bench.registry.push(number=3)
    await client.create(rollout_policy=policy(steps=[25, 100]))
    await client.until_state("READY")
    gateway = Gateway(client)
    await client.routes(lambda table: weights(table) == {1: 100})
    yield gateway
    await gateway.stop()


@pytest.fixture
def rollouts(client: Any) -> Rollouts:
    return Rollouts(client)


async def test_a_canary_goes_through_its_steps_and_history_says_what_was_live(
    gateway: Gateway, client: Any, rollouts: Rollouts
) -> None:
    asked = await client.update("digits", target(2))
    rollout = await rollouts.begun()
    assert rollout.name == f"deployments/digits/rollouts/{asked.revision}"
    done = await rollouts.until("SUCCEEDED")
    assert done.percent == 100
    assert all(evidence.passed for evidence in done.evidence)
    ready = await client.until_state("READY")
    assert [t.resolved_version for t in ready.serving] == [2]
    assert ready.rollout == ""
    await client.routes(lambda table: weights(table) == {2: 100})
    assert gateway.seen == [{1: 100}, {1: 75, 2: 25}, {2: 100}]
    live = await client.stub.GetLiveTargets(pb.GetLiveTargetsRequest(name="deployments/digits"))
    assert {t.resolved_version: t.weight for t in live.targets} == {2: 100}
    before = Timestamp()
    before.FromNanoseconds(done.step_time.ToNanoseconds() - 1_000_000)
    live = await client.stub.GetLiveTargets(pb.GetLiveTargetsRequest(name="deployments/digits", time=before))
    assert {t.resolved_version: t.weight for t in live.targets} == {1: 75, 2: 25}
    with pytest.raises(NotFound):
        await client.stub.GetLiveTargets(
            pb.GetLiveTargetsRequest(name="deployments/digits", time=Timestamp(seconds=1))
        )


@pytest.mark.parametrize(
    ("kind", "strategy"), [("ERROR_RATE", "CANARY"), ("LATENCY", "BLUE_GREEN"), ("DISAGREEMENT", "SHADOW")]
)
async def test_a_bad_version_is_taken_back_by_itself_and_the_evidence_stays(
    gateway: Gateway, client: Any, rollouts: Rollouts, kind: str, strategy: str
) -> None:
    gateway.errors[2] = 0.05 if kind == "ERROR_RATE" else 0.0
    gateway.buckets[2] = 30 if kind == "LATENCY" else 20
    gateway.disagree[2] = 0.1
    await client.update(
        "digits", target(2), rollout_policy=policy(strategy, steps=[25, 100] if strategy == "CANARY" else [])
    )
    await rollouts.begun()
    back = await rollouts.until("ROLLED_BACK")
    (breach,) = [e for e in back.evidence if e.breached]
    assert breach.kind == rollout_pb2.GuardKind.Value(f"GUARD_KIND_{kind}")
    assert breach.against >= 100
    assert breach.words in back.message
    after = await client.until("digits", lambda d: [t.version for t in d.targets] == [1])
    assert after.revision == 3
    await client.until_state("READY")
    await client.routes(lambda table: weights(table) == {1: 100})
    revisions = await client.stub.ListDeploymentRevisions(
        pb.ListDeploymentRevisionsRequest(parent="deployments/digits")
    )
    assert revisions.revisions[0].cause == f"rollout 2 rolled back: {back.message}"
    assert revisions.revisions[0].actor == "penstock"


async def test_a_version_that_does_not_load_is_taken_back(
    gateway: Gateway, bench: Any, client: Any, rollouts: Rollouts
) -> None:
    agent = bench.agents[0]
    agent.hold = lambda spec: spec.version.endswith("/2")
    await client.update("digits", target(2))
    await bench.eventually(lambda: any(s.version.endswith("/2") for s in agent.desired.values()))
    (bad,) = [name for name, spec in agent.desired.items() if spec.version.endswith("/2")]
    agent.say(bad, replica_pb2.REPLICA_STATE_BACKOFF, "the file is not a model", restarts=2)
    back = await rollouts.until("ROLLED_BACK")
    assert "the file is not a model" in back.message
    assert [t.version for t in (await client.until_state("READY")).targets] == [1]


async def test_by_hand_it_is_held_goes_on_passes_a_step_and_ends(
    gateway: Gateway, client: Any, rollouts: Rollouts
) -> None:
    slow = policy(steps=[10, 20, 100], step_duration=Duration(seconds=3600))
    await client.update("digits", target(2), rollout_policy=slow)
    await rollouts.begun()
    await rollouts.until("RUNNING")
    assert (await rollouts.hand("Pause")).state == rollout_pb2.ROLLOUT_STATE_PAUSED
    assert (await rollouts.hand("Pause")).state == rollout_pb2.ROLLOUT_STATE_PAUSED
    assert (await rollouts.hand("Resume")).state == rollout_pb2.ROLLOUT_STATE_RUNNING
    assert (await rollouts.hand("Promote")).percent == 20
    await client.routes(lambda table: weights(table) == {1: 80, 2: 20})
    ended = await rollouts.hand("Abort")
    assert ended.state == rollout_pb2.ROLLOUT_STATE_ABORTED
    await client.routes(lambda table: weights(table) == {1: 100})
    deployment = await client.until_state("READY")
    assert [t.version for t in deployment.targets] == [1]
    for verb in ("Pause", "Resume", "Promote", "Abort"):
        with pytest.raises(FailedPrecondition, match="ABORTED"):
            await rollouts.hand(verb)


async def test_the_last_promotion_gives_the_new_version_everything(
    gateway: Gateway, client: Any, rollouts: Rollouts
) -> None:
    slow = policy(steps=[10, 100], step_duration=Duration(seconds=3600))
    await client.update("digits", target(2), rollout_policy=slow)
    await rollouts.begun()
    await rollouts.until("RUNNING")
    await rollouts.hand("Promote")
    assert (await rollouts.hand("Promote")).state == rollout_pb2.ROLLOUT_STATE_SUCCEEDED
    ready = await client.until_state("READY")
    assert [t.resolved_version for t in ready.serving] == [2]


async def test_another_update_ends_it_and_begins_its_own_and_both_are_listed(
    gateway: Gateway, client: Any, rollouts: Rollouts
) -> None:
    slow = policy(steps=[10, 100], step_duration=Duration(seconds=3600))
    await client.update("digits", target(2), rollout_policy=slow)
    await rollouts.begun()
    await rollouts.until("RUNNING")
    await client.update("digits", target(3))
    await rollouts.until("ABORTED", "deployments/digits/rollouts/2")
    await rollouts.until("RUNNING")
    found = await client.stub.ListRollouts(pb.ListRolloutsRequest(parent="deployments/digits", page_size=1))
    assert [r.name for r in found.rollouts] == ["deployments/digits/rollouts/3"]
    rest = await client.stub.ListRollouts(
        pb.ListRolloutsRequest(parent="deployments/digits", page_token=found.next_page_token)
    )
    assert [r.name for r in rest.rollouts] == ["deployments/digits/rollouts/2"]
    await client.routes(lambda table: weights(table) == {1: 90, 3: 10})


async def test_a_rollback_by_hand_goes_past_the_steps(
    gateway: Gateway, client: Any, rollouts: Rollouts
) -> None:
    await client.update("digits", target(2))
    await rollouts.begun()
    await rollouts.until("SUCCEEDED")
    await client.until_state("READY")
    await client.rollback()
    await client.until("digits", lambda d: [t.resolved_version for t in d.serving] == [1])
    assert (await rollouts.get()).name.endswith("/2")


async def test_a_new_leader_goes_on_where_the_old_one_was(
    gateway: Gateway, bench: Any, client: Any, rollouts: Rollouts
) -> None:
    slow = policy(steps=[10, 100], step_duration=Duration(seconds=3600))
    await client.update("digits", target(2), rollout_policy=slow)
    await rollouts.begun()
    await rollouts.until("RUNNING")
    await rollouts.hand("Pause")
    await gateway.stop()
    agent = bench.agents[0]
    await agent.vanish()
    await bench.stop()
    await bench.start()
    await agent.attach()
    again = bench.client()
    await again.routes(lambda table: weights(table) == {1: 90, 2: 10})
    gateway2 = Gateway(again)
    gateway2.errors[2] = 1.0
    back = await Rollouts(again).until("ROLLED_BACK")
    await gateway2.stop()
    assert back.name == "deployments/digits/rollouts/2"


async def test_after_a_rollback_the_alias_is_followed_to_the_next_version_only(
    gateway: Gateway, bench: Any, client: Any, rollouts: Rollouts
) -> None:
    bench.registry.alias_of["digits"]["champion"] = 1
    await client.update("digits", Target(model="models/digits", alias="champion"))
    await client.until_state("READY")
    gateway.errors[2] = 1.0
    bench.registry.alias_of["digits"]["champion"] = 2
    await rollouts.begun()
    await rollouts.until("ROLLED_BACK")
    calls = bench.registry.calls
    await bench.eventually(lambda: bench.registry.calls > calls + 3, "the alias was looked at again")
    assert (await client.get()).targets[0].resolved_version == 1
    bench.registry.alias_of["digits"]["champion"] = 3
    await client.until("digits", lambda d: [t.resolved_version for t in d.serving] == [3])


async def test_what_makes_no_sense_is_refused_with_words(
    gateway: Gateway, bench: Any, client: Any, rollouts: Rollouts
) -> None:
    with pytest.raises(InvalidArgument, match=r"rollout_policy\.steps"):
        await client.update("digits", rollout_policy=policy(steps=[50, 10]))
    for name in ("deployments/digits/rollouts/x", "deployments/digits", "deployments/digits/rollouts/0"):
        with pytest.raises(InvalidArgument):
            await rollouts.get(name)
    for name in (
        "deployments/digits/rollouts/7",
        "deployments/digits/rollouts/-",
        "deployments/none/rollouts/1",
    ):
        with pytest.raises(NotFound):
            await rollouts.get(name)
        with pytest.raises(NotFound):
            await rollouts.hand("Abort", name)
    bench.registry.push(number=4, state=version_pb2.VERSION_STATE_UPLOADING)
    with pytest.raises((FailedPrecondition, NotFound)):
        await client.update("digits", target(4))
    seen = await client.get()
    await client.update("digits", target(2))
    with pytest.raises(Aborted):
        await client.update("digits", target(3), etag=seen.etag)
