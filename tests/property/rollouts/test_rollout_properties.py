"""Whatever happens to a rollout, traffic adds up and what was taken back stays away."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_scheduler.domain.deployment import Target
from penstock_scheduler.domain.replica import ReplicaState
from penstock_scheduler.domain.rollout import RolloutState, Strategy
from penstock_scheduler.domain.rollout.decide import take_back
from support.rollout_world import Behaviour, World, policy

EVENTS = st.lists(
    st.sampled_from(
        (
            "tick",
            "tick",
            "tick",
            "pause",
            "resume",
            "promote",
            "abort",
            "crash",
            "lost",
            "ready",
            "update",
            "bad",
        )
    ),
    max_size=40,
)


def happen(world: World, event: str) -> None:
    """Lets one thing happen, if it may."""
    rollout = world.deployment.rollout
    state = rollout.state if rollout is not None else None
    newest = max(world.states)
    if event == "pause" and rollout is not None and state is RolloutState.RUNNING:
        held = rollout.advance(RolloutState.PAUSED, world.now, "")
        world.deployment = replace(world.deployment, rollout=held)
    elif event == "resume" and rollout is not None and state is RolloutState.PAUSED:
        on = rollout.advance(RolloutState.RUNNING, world.now, "")
        world.deployment = replace(world.deployment, rollout=on)
    elif event == "promote" and rollout is not None and rollout.moving and not rollout.absent:
        onward = rollout.next_step(world.now)
        serving = world.deployment.asked if onward.ended else world.deployment.serving
        world.deployment = replace(world.deployment, rollout=onward, serving=serving)
    elif event == "abort" and rollout is not None and not rollout.ended:
        if state is not RolloutState.ROLLING_BACK:
            world.deployment = take_back(world.deployment, RolloutState.ABORTED, world.now, "ann", "no")
    elif event == "update":
        world.states[newest + 1] = ReplicaState.READY
        spec = replace(world.deployment.asked, targets=(Target("digits", 100, newest + 1),))
        world.deployment = world.deployment.ask(spec, world.now, "bob")
    elif event == "crash":
        world.restarts[newest] = world.restarts.get(newest, 0) + 1
    elif event in ("lost", "ready"):
        world.states[newest] = ReplicaState.READY if event == "ready" else ReplicaState.STARTING
    elif event == "bad":
        world.behaviours[newest] = Behaviour(errors=0.5, disagrees=0.5)
    if world.deployment.rollout is not None:
        world.kept[world.deployment.rollout.number] = world.deployment.rollout
    world.tick()


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, strategy=st.sampled_from(Strategy), seed=st.integers(0, 1000))
def test_traffic_adds_up_and_what_was_taken_back_stays_away(
    events: list[str], strategy: Strategy, seed: int
) -> None:
    world = World(policy(strategy, step_seconds=1, min_answers=10), rate=60, seed=seed)
    for event in events:
        happen(world, event)
        rollout = world.deployment.rollout
        assert sum(world.shares().values()) == 100
        if rollout is None:
            continue
        served = {t.version for t in rollout.before}
        if rollout.state in (RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK, RolloutState.ABORTED):
            live = (
                {t.version for t in world.deployment.serving.targets} if world.deployment.serving else set()
            )
            assert live == served
        if rollout.state is RolloutState.ROLLED_BACK:
            assert {t.version for t in world.deployment.asked.targets} == served
        if rollout.state is RolloutState.SUCCEEDED:
            assert world.deployment.serving is not None
        assert world.deployment.revision >= rollout.number
        ends = [kept for number, kept in world.kept.items() if number < rollout.number]
        assert all(kept.ended for kept in ends)
