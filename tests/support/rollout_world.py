"""Rollouts without a mesh: one deployment, versions that behave as told, and a clock that jumps."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Spec, Target
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import NO_BATCHING, NO_RESOURCES
from penstock_scheduler.domain.rollout import (
    Rollout,
    RolloutPolicy,
    RolloutState,
    Strategy,
    Tally,
    check_policy,
)
from penstock_scheduler.domain.rollout.decide import Facts, decide
from penstock_scheduler.domain.rollout.targets import live_targets, mirrored
from penstock_scheduler.domain.traffic import LATENCY_BUCKETS, NO_COUNTS, Counts
from penstock_scheduler.domain.version import VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def policy(strategy: Strategy = Strategy.CANARY, **fields: Any) -> RolloutPolicy:
    """A policy with its defaults."""
    return check_policy(RolloutPolicy(strategy, **fields))


@dataclass(frozen=True)
class Behaviour:
    """How a version answers: part of errors, median latency, spread of its logarithm, part that disagrees,
    and how many times its own median all the traffic adds by waiting.
    """

    errors: float = 0.0
    median_seconds: float = 0.004
    spread: float = 0.4
    disagrees: float = 0.0
    queues: float = 0.0


class World:
    """A deployment that serves version 1 and is asked for version 2.

    Args:
        rules: its rollout policy.
        rate: requests a second.
        seed: of everything random.
        behaviours: how each version answers.
        target: what is asked for; version 2 with all traffic unless said otherwise.
    """

    def __init__(
        self,
        rules: RolloutPolicy | None,
        *,
        rate: float = 200.0,
        seed: int = 0,
        behaviours: dict[int, Behaviour] | None = None,
        before: Target | None = None,
        after: Target | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.rate = rate
        self.now = NOW
        self.behaviours = behaviours or {}
        self.metrics: dict[VersionKey, dict[str, float]] = {}
        self.states: dict[int, ReplicaState] = {1: ReplicaState.READY, 2: ReplicaState.READY}
        self.restarts: dict[int, int] = {}
        self.messages: dict[int, str] = {}
        self.failed = self.answered = 0
        self.causes: list[str] = []
        self.kept: dict[int, Rollout] = {}
        spec = Spec((before or Target("digits", 100, 1),), 1)
        settled = Deployment(
            "d", spec, NOW, NOW, spec, state=DeploymentState.READY, rollout_policy=rules, uid=1
        )
        self.deployment = settled.ask(replace(spec, targets=(after or Target("digits", 100, 2),)), NOW, "ann")

    @property
    def rollout(self) -> Rollout:
        """The present rollout."""
        assert self.deployment.rollout is not None
        return self.deployment.rollout

    def stands(self, state: RolloutState) -> bool:
        """Whether the present rollout is in a state."""
        return self.rollout.state is state

    def shares(self) -> dict[int, int]:
        """Percent of the traffic by version."""
        return {t.resolved_version: t.weight for t in live_targets(self.deployment)}

    def tick(self, seconds: float = 1.0) -> None:
        """Lets traffic come for a while, then decides."""
        self.now += timedelta(seconds=seconds)
        rollout = self.deployment.rollout
        counted = self._traffic(seconds) if rollout is not None else Tally()
        self.decide(counted)

    def decide(self, counted: Tally | None = None) -> None:
        """Decides once."""
        facts = Facts(self.now, self._replicas(), self.metrics, {}, counted or Tally())
        decision = decide(self.deployment, facts)
        self.deployment = decision.deployment
        self.kept |= {rollout.number: rollout for rollout in decision.rollouts}
        if decision.cause:
            self.causes.append(decision.cause)

    def run(self, seconds: float = 3600.0) -> float:
        """Runs until the rollout has ended; returns how long that took."""
        begun = self.now
        while (self.now - begun).total_seconds() < seconds:
            self.tick()
            if self.rollout.ended:
                break
        return (self.now - begun).total_seconds()

    def _replicas(self) -> tuple[Replica, ...]:
        return tuple(
            Replica(
                f"r{number}",
                "d",
                GroupKey(VersionKey("digits", number), "s"),
                "",
                NO_RESOURCES,
                NO_BATCHING,
                NOW,
                NOW,
                state=state,
                message=self.messages.get(number, ""),
                restarts=self.restarts.get(number, 0),
            )
            for number, state in self.states.items()
        )

    def _traffic(self, seconds: float) -> Tally:
        shares = self.shares()
        total = round(self.rate * seconds)
        counts = {
            number: self._answers(number, total * share // 100, share / 100)
            for number, share in shares.items()
        }
        for key, percent in mirrored(self.deployment).items():
            agreed = total * percent // 100
            wrong = sum(self.random.random() < self._behaviour(key.number).disagrees for _ in range(agreed))
            counts[key.number] = Counts(agreed=agreed - wrong, disagreed=wrong)
        return Tally(counts.get(1, NO_COUNTS), counts.get(2, NO_COUNTS))

    def _answers(self, number: int, total: int, load: float) -> Counts:
        behaviour = self._behaviour(number)
        failed = sum(self.random.random() < behaviour.errors for _ in range(total))
        latencies = [0] * LATENCY_BUCKETS
        for _ in range(total):
            took = (
                behaviour.median_seconds
                * (1 + behaviour.queues * load)
                * math.exp(self.random.gauss(0, behaviour.spread))
            )
            latencies[min(LATENCY_BUCKETS - 1, max(0, int(4 * math.log2(took / 100e-6))))] += 1
        self.failed += failed
        self.answered += total
        return Counts(arrived=total, succeeded=total - failed, failed=failed, latencies=tuple(latencies))

    def _behaviour(self, number: int) -> Behaviour:
        return self.behaviours.get(number, Behaviour())
