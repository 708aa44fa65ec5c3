"""What becomes of a rollout; no I/O anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock_kit.errors import Internal, InvalidArgument
from penstock_scheduler.domain.deployment import Target
from penstock_scheduler.domain.replica import ReplicaState
from penstock_scheduler.domain.rollout import (
    GuardKind,
    MetricGuard,
    RolloutPolicy,
    RolloutState,
    Strategy,
    check_policy,
)
from penstock_scheduler.domain.rollout.decide import take_back
from penstock_scheduler.domain.rollout.targets import live_targets, mirrored, mix
from penstock_scheduler.domain.version import VersionKey
from support.rollout_world import NOW, Behaviour, World, policy

STEPS = (5, 25, 100)


def breach(world: World) -> GuardKind | None:
    return next((e.kind for e in world.rollout.evidence if e.breached), None)


def test_a_good_version_gets_more_traffic_step_by_step_and_then_all() -> None:
    world = World(policy(steps=STEPS, step_seconds=5))
    seen: list[dict[int, int]] = []
    while not seen or not world.rollout.ended:
        world.tick()
        if world.shares() not in seen[-1:]:
            seen.append(world.shares())
    assert seen == [{1: 100}, {1: 95, 2: 5}, {1: 75, 2: 25}, {2: 100}]
    assert world.stands(RolloutState.SUCCEEDED)
    assert world.deployment.serving == world.deployment.asked
    assert world.causes == []


def test_a_version_with_errors_is_taken_back_and_asked_for_no_more() -> None:
    world = World(policy(steps=STEPS, step_seconds=5), behaviours={2: Behaviour(errors=0.05)})
    world.run()
    assert world.stands(RolloutState.ROLLED_BACK)
    assert breach(world) is GuardKind.ERROR_RATE
    assert world.shares() == {1: 100}
    assert [t.resolved_version for t in world.deployment.asked.targets] == [1]
    assert world.deployment.revision == 3
    assert world.causes[0].startswith("rollout 2 rolled back: ")
    assert "answers are errors" in world.causes[0]
    assert world.failed / world.answered < 0.05 * 0.25


def test_all_traffic_is_back_in_the_very_decision_that_sees_the_breach() -> None:
    world = World(policy(steps=(50, 100)), behaviours={2: Behaviour(errors=1.0)})
    while not world.deployment.rollout or not world.stands(RolloutState.ROLLING_BACK):
        world.tick()
    assert world.shares() == {1: 100}
    world.decide()
    assert world.stands(RolloutState.ROLLED_BACK)


def test_a_slow_version_is_taken_back_within_seconds() -> None:
    world = World(policy(steps=(25, 100)), behaviours={2: Behaviour(median_seconds=0.012)})
    assert world.run() < 15
    assert breach(world) is GuardKind.LATENCY


def test_a_little_slower_is_fine() -> None:
    world = World(policy(steps=(25, 100), step_seconds=3), behaviours={2: Behaviour(median_seconds=0.005)})
    world.run()
    assert world.stands(RolloutState.SUCCEEDED)


def test_a_shadow_that_disagrees_is_taken_back_before_any_caller_met_it() -> None:
    world = World(policy(Strategy.SHADOW), behaviours={2: Behaviour(disagrees=0.1)})
    world.tick()
    assert mirrored(world.deployment) == {VersionKey("digits", 2): 100}
    assert world.shares() == {1: 100}
    assert world.run() < 15
    assert breach(world) is GuardKind.DISAGREEMENT
    assert world.stands(RolloutState.ROLLED_BACK)


def test_a_shadow_that_agrees_takes_over_all_at_once() -> None:
    world = World(policy(Strategy.SHADOW, step_seconds=2))
    world.run()
    assert world.stands(RolloutState.SUCCEEDED)
    assert world.deployment.serving == world.deployment.asked


def test_blue_green_switches_all_traffic_and_still_goes_back() -> None:
    world = World(policy(Strategy.BLUE_GREEN), behaviours={2: Behaviour(errors=0.1)})
    while not world.deployment.rollout or not world.stands(RolloutState.RUNNING):
        world.tick()
    assert world.shares() == {2: 100}
    assert world.deployment.serving is not None
    assert [t.resolved_version for t in world.deployment.serving.targets] == [1]
    world.run()
    assert world.stands(RolloutState.ROLLED_BACK)
    assert next(e for e in world.rollout.evidence if e.breached).before_count > 0


def test_blue_green_compares_latency_with_what_came_before_the_switch() -> None:
    world = World(policy(Strategy.BLUE_GREEN), behaviours={2: Behaviour(median_seconds=0.02)})
    world.run()
    assert breach(world) is GuardKind.LATENCY


def test_a_worse_metric_ends_it_before_any_replica_starts() -> None:
    world = World(policy(metrics=(MetricGuard("accuracy", max_loss=0.01),)))
    world.metrics = {VersionKey("digits", 1): {"accuracy": 0.97}, VersionKey("digits", 2): {"accuracy": 0.95}}
    world.states[2] = ReplicaState.PENDING
    world.tick()
    assert world.stands(RolloutState.ROLLING_BACK)
    assert breach(world) is GuardKind.METRIC
    assert "it must be at least 0.96" in world.rollout.message


@pytest.mark.parametrize(
    ("guard", "after", "breached"),
    [
        (MetricGuard("loss", lower_is_better=True), {"loss": 0.5}, False),
        (MetricGuard("loss", lower_is_better=True), {"loss": 0.6}, True),
        (MetricGuard("loss", lower_is_better=True), {}, True),
        (MetricGuard("loss", lower_is_better=True), {"loss": float("nan")}, True),
        (MetricGuard("f1"), {"f1": 0.1}, False),
    ],
)
def test_metrics_are_compared_in_their_own_direction(
    guard: MetricGuard, after: dict[str, float], breached: bool
) -> None:
    world = World(policy(metrics=(guard,)))
    world.metrics = {VersionKey("digits", 1): {"loss": 0.5}, VersionKey("digits", 2): after}
    world.tick()
    assert world.stands(RolloutState.ROLLING_BACK) is breached


def test_a_version_that_does_not_load_is_taken_back() -> None:
    world = World(policy())
    world.states[2] = ReplicaState.BACKOFF
    world.restarts[2] = 2
    world.messages[2] = "the file is not a model"
    world.tick()
    world.tick()
    world.tick()
    assert world.stands(RolloutState.ROLLED_BACK)
    assert "the file is not a model" in world.causes[0]


def test_a_replica_that_fails_once_for_reasons_outside_its_process_gets_time() -> None:
    world = World(policy(step_seconds=60))
    world.states[2] = ReplicaState.BACKOFF
    for _ in range(8):
        world.tick()
    assert world.stands(RolloutState.STARTING)
    world.states[2] = ReplicaState.READY
    world.tick()
    assert world.stands(RolloutState.RUNNING)


def test_a_version_that_crashes_under_traffic_is_taken_back() -> None:
    world = World(policy(step_seconds=60))
    world.tick()
    world.tick()
    world.restarts[2] = 3
    world.run()
    assert world.stands(RolloutState.ROLLED_BACK)
    assert "crashes" in world.rollout.message


def test_without_a_ready_replica_the_new_version_gets_nothing_until_it_is_back() -> None:
    world = World(policy(step_seconds=600))
    for _ in range(4):
        world.tick()
    assert world.shares() == {1: 99, 2: 1}
    world.states[2] = ReplicaState.STARTING
    world.tick()
    assert world.shares() == {1: 100}
    world.states[2] = ReplicaState.READY
    world.tick()
    assert world.shares() == {1: 99, 2: 1}


def test_without_traffic_a_step_waits_for_ever_or_as_long_as_its_patience() -> None:
    world = World(policy(steps=STEPS, step_seconds=1), rate=0)
    world.run(300)
    assert world.rollout.percent == 5
    hasty = World(policy(steps=STEPS, step_seconds=1, patience_seconds=20), rate=0)
    assert hasty.run(300) < 70
    assert hasty.stands(RolloutState.SUCCEEDED)


def test_while_paused_it_stays_and_its_guards_still_look() -> None:
    world = World(policy(steps=STEPS, step_seconds=1), behaviours={2: Behaviour(errors=0.0)})
    world.tick()
    world.tick()
    paused = world.rollout.advance(RolloutState.PAUSED, world.now, "held")
    world.deployment = replace(world.deployment, rollout=paused)
    for _ in range(60):
        world.tick()
    assert world.rollout.percent == 5
    assert world.stands(RolloutState.PAUSED)
    world.behaviours = {2: Behaviour(errors=0.5)}
    world.run()
    assert world.stands(RolloutState.ROLLED_BACK)


def test_another_change_ends_it_and_begins_its_own() -> None:
    world = World(policy(step_seconds=600))
    world.tick()
    world.tick()
    spec = replace(world.deployment.asked, targets=(Target("digits", 100, 3),))
    world.states[3] = ReplicaState.STARTING
    world.deployment = world.deployment.ask(spec, world.now, "bob")
    world.tick()
    assert world.kept[2].state is RolloutState.ABORTED
    assert world.rollout.number == 3
    assert world.stands(RolloutState.STARTING)
    assert world.shares() == {1: 100}
    assert world.causes == []


def test_a_change_of_replicas_does_not_disturb_it_and_outlives_a_rollback() -> None:
    world = World(policy(step_seconds=600))
    world.tick()
    world.tick()
    world.deployment = world.deployment.ask(replace(world.deployment.asked, replicas=4), world.now, "bob")
    world.tick()
    assert world.stands(RolloutState.RUNNING)
    world.behaviours = {2: Behaviour(errors=1.0)}
    world.run()
    assert world.stands(RolloutState.ROLLED_BACK)
    assert world.deployment.asked.replicas == 4


def test_after_a_rollback_an_alias_is_followed_again_but_not_to_the_bad_version() -> None:
    world = World(
        policy(step_seconds=600),
        before=Target("digits", 100, 1, alias="champion"),
        after=Target("digits", 100, 2, alias="champion"),
        behaviours={2: Behaviour(errors=1.0)},
    )
    world.run()
    assert world.deployment.asked.targets == (Target("digits", 100, 1, alias="champion", avoids=2),)


def test_an_abort_asks_for_the_earlier_targets_again() -> None:
    world = World(policy(step_seconds=600))
    world.tick()
    world.tick()
    ended = take_back(world.deployment, RolloutState.ABORTED, world.now, "ann", "Aborted by ann.")
    assert ended.rollout is not None
    assert ended.rollout.state is RolloutState.ABORTED
    assert [t.resolved_version for t in ended.asked.targets] == [1]
    assert {t.resolved_version: t.weight for t in live_targets(ended)} == {1: 100}
    with pytest.raises(Internal):
        take_back(ended, RolloutState.ABORTED, world.now, "ann")


def test_what_goes_past_the_policy_begins_no_rollout() -> None:
    world = World(policy())
    world.deployment = world.deployment.ask(world.deployment.asked, NOW, "ann", at_once=True)
    world.tick()
    assert world.deployment.rollout is None
    none = World(None)
    none.tick()
    assert none.deployment.rollout is None


def test_a_change_of_weights_alone_begins_no_rollout() -> None:
    world = World(policy(), after=Target("digits", 100, 1))
    world.tick()
    assert world.deployment.rollout is None


@pytest.mark.parametrize("percent", [0, 1, 5, 33, 50, 99, 100])
def test_mixed_weights_always_sum_to_a_hundred(percent: int) -> None:
    before = (Target("a", 33, 1), Target("a", 33, 2), Target("b", 34, 1))
    after = (Target("a", 50, 2), Target("c", 50, 1))
    mixed = mix(before, after, percent)
    assert sum(t.weight for t in mixed) == 100
    assert len({t.version for t in mixed}) == len(mixed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": (5, 5, 100)},
        {"steps": (50, 25, 100)},
        {"steps": (5, 50)},
        {"steps": (0, 100)},
        {"steps": (5, 100, 101)},
        {"strategy": Strategy.SHADOW, "steps": (5, 100)},
        {"strategy": Strategy.SHADOW, "steps": (101,)},
        {"strategy": Strategy.BLUE_GREEN, "steps": (5, 100)},
        {"step_seconds": -1.0},
        {"step_seconds": float("nan")},
        {"min_answers": -1},
        {"max_error_increase": 1.5},
        {"max_latency_ratio": 0.5},
        {"false_alarm_rate": 0.9},
        {"tolerance": float("inf")},
        {"metrics": (MetricGuard("f1"), MetricGuard("f1"))},
        {"metrics": (MetricGuard(""),)},
        {"metrics": (MetricGuard("f1", max_loss=-1),)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_field(wrong: dict[str, object]) -> None:
    fields = {"strategy": Strategy.CANARY} | wrong
    with pytest.raises(InvalidArgument, match="rollout_policy"):
        check_policy(RolloutPolicy(**fields))  # type: ignore[arg-type]


def test_of_a_hundred_canaries_of_an_equal_version_at_most_five_are_taken_back() -> None:
    same = Behaviour(errors=0.01)
    worlds = [
        World(policy(steps=STEPS, step_seconds=5), seed=seed, rate=100, behaviours={1: same, 2: same})
        for seed in range(100)
    ]
    for world in worlds:
        world.run(400)
    ends = [world.rollout.state for world in worlds]
    assert ends.count(RolloutState.ROLLED_BACK) <= 5
    assert ends.count(RolloutState.SUCCEEDED) >= 95


@pytest.mark.parametrize("steps", [(20, 50, 100), (25, 75, 100), (100,)])
def test_the_load_that_a_version_takes_over_is_not_held_against_it(steps: tuple[int, ...]) -> None:
    same = Behaviour(queues=8.0)
    for seed in range(5):
        world = World(policy(steps=steps, step_seconds=3), seed=seed, behaviours={1: same, 2: same})
        world.run()
        assert world.stands(RolloutState.SUCCEEDED), world.rollout.message


def test_a_slow_version_under_load_is_still_taken_back() -> None:
    slow = Behaviour(queues=8.0, median_seconds=0.012)
    world = World(policy(steps=(50, 100)), behaviours={1: Behaviour(queues=8.0), 2: slow})
    assert world.run() < 30
    assert breach(world) is GuardKind.LATENCY
