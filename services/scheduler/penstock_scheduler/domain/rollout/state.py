"""Rollouts: one change of a deployment's targets, from its first replica to its end.

STARTING ──► RUNNING ◄──► PAUSED
   │           │  │          │
   │           │  └──────────┼──► SUCCEEDED
   ▼           ▼             ▼
 ROLLING_BACK ◄──────────────┘──► ROLLED_BACK
STARTING, RUNNING, PAUSED ──► ABORTED
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum

from penstock_scheduler.domain.deployment import Target
from penstock_scheduler.domain.machine import step
from penstock_scheduler.domain.rollout.policy import ALL, RolloutPolicy, Strategy
from penstock_scheduler.domain.traffic import NO_COUNTS, Counts


class RolloutState(Enum):
    """Where a rollout stands; values are those of scheduler/v1/rollout.proto."""

    STARTING = 1
    RUNNING = 2
    PAUSED = 3
    ROLLING_BACK = 4
    SUCCEEDED = 5
    ROLLED_BACK = 6
    ABORTED = 7


_S = RolloutState
_NEXT: dict[RolloutState, frozenset[RolloutState]] = {
    _S.STARTING: frozenset({_S.RUNNING, _S.ROLLING_BACK, _S.ABORTED}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.SUCCEEDED, _S.ROLLING_BACK, _S.ABORTED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.ROLLING_BACK, _S.ABORTED}),
    _S.ROLLING_BACK: frozenset({_S.ROLLED_BACK}),
    _S.SUCCEEDED: frozenset(),
    _S.ROLLED_BACK: frozenset(),
    _S.ABORTED: frozenset(),
}

ENDED = frozenset({_S.SUCCEEDED, _S.ROLLED_BACK, _S.ABORTED})
"""States without a next one."""


class GuardKind(Enum):
    """What a guard looks at; values are those of scheduler/v1/rollout.proto."""

    ERROR_RATE = 1
    LATENCY = 2
    DISAGREEMENT = 3
    METRIC = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict rests on; see scheduler/v1/rollout.proto."""

    kind: GuardKind
    time: datetime
    words: str
    metric: str = ""
    before_count: int = 0
    after_count: int = 0
    before: float = 0.0
    after: float = 0.0
    limit: float = 0.0
    against: float = 1.0
    in_favour: float = 1.0
    breached: bool = False
    passed: bool = False
    percent: int = 0
    held_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Tally:
    """What was counted of the earlier targets and of the new ones since the present step began."""

    old: Counts = NO_COUNTS
    new: Counts = NO_COUNTS

    def add(self, old: Counts, new: Counts) -> Tally:
        """With what came since."""
        return Tally(self.old + old, self.new + new)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout.

    Attributes:
        number: the revision that began it.
        policy: how it moves, as it was when it began.
        before: what served.
        after: what is to serve.
        create_time: when it began.
        step_time: when the present step began.
        actor: who began it.
        state: where it stands.
        message: why, for people.
        step: position of the present step in the policy's steps.
        absent: a new version has no replica that would answer, so that nothing is sent there for now.
        tally: what was counted since the step began.
        full: what the earlier targets did while they had all traffic, before the first step.
        full_bucket: the bucket of latencies of their 95th percentile then; -1 before that is known.
        bucket: the bucket of the running version's 95th percentile in this step; -1 before that is known.
        evidence: what the guards saw, the latest of each.
        end_time: when it ended.
        hands: counts what people did to it; the loop writes nothing over what it has not seen.
    """

    number: int
    policy: RolloutPolicy
    before: tuple[Target, ...]
    after: tuple[Target, ...]
    create_time: datetime
    step_time: datetime
    actor: str = ""
    state: RolloutState = RolloutState.STARTING
    message: str = ""
    step: int = 0
    absent: bool = False
    tally: Tally = field(default_factory=Tally)
    full: Counts = NO_COUNTS
    full_bucket: int = -1
    bucket: int = -1
    evidence: tuple[Evidence, ...] = ()
    end_time: datetime | None = None
    hands: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ENDED

    @property
    def moving(self) -> bool:
        """Whether it may still give the new targets traffic."""
        return self.state in (RolloutState.RUNNING, RolloutState.PAUSED)

    @property
    def percent(self) -> int:
        """Percent of the traffic that the new targets get; of the mirrored traffic for SHADOW."""
        if self.state is RolloutState.SUCCEEDED:
            return ALL
        if not self.moving or self.absent:
            return 0
        return self.policy.steps[self.step]

    @property
    def shadow(self) -> bool:
        """Whether the new targets get a copy of the traffic instead of a part."""
        return self.policy.strategy is Strategy.SHADOW and self.moving

    def advance(self, to: RolloutState, now: datetime, message: str) -> Rollout:
        """Takes one step of the table at the top of this module.

        Raises:
            Internal: the table does not allow the step.
        """
        step(_NEXT, self.state, to)
        end = now if to in ENDED else None
        return replace(self, state=to, message=message, end_time=end)

    def next_step(self, now: datetime) -> Rollout:
        """Begins the step after the present one; the last one ends it."""
        steps = self.policy.steps
        if self.state is RolloutState.PAUSED:
            return self.advance(RolloutState.RUNNING, now, "").next_step(now)
        if self.step + 1 >= len(steps):
            return self.advance(RolloutState.SUCCEEDED, now, "The new targets have all traffic.")
        return replace(self, step=self.step + 1).enter(now)

    @property
    def heavy(self) -> bool:
        """Whether the new targets have more traffic in the present step than the earlier ones have left."""
        return 2 * self.policy.steps[self.step] > ALL and self.policy.strategy is not Strategy.SHADOW

    def enter(self, now: datetime) -> Rollout:
        """Begins to count for the present step.

        Who has more traffic answers later. Where the new targets have more than the earlier ones, latency is
        therefore compared with what it was when the earlier ones had everything.
        """
        percent = self.policy.steps[self.step]
        # With all traffic gone from the earlier targets, what they did last is what there is to compare with.
        old = self.tally.old if percent == ALL else NO_COUNTS
        latencies = self.full.latencies if self.heavy else NO_COUNTS.latencies
        what = "a copy of " if self.policy.strategy is Strategy.SHADOW else ""
        return replace(
            self,
            step_time=now,
            tally=Tally(old=replace(old, latencies=latencies)),
            bucket=self.full_bucket if self.heavy else -1,
            message=f"The new targets get {what}{percent} % of the traffic.",
        )
