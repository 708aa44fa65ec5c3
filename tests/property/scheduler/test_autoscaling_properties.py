"""Whatever gateways say, the number of replicas keeps within what its owner asked for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_scheduler.domain.autoscaling.decide import Facts, Memory, Target, decide
from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.traffic import Counts, Window
from penstock_scheduler.domain.version import VersionKey

VERSIONS = [VersionKey("m", number) for number in (1, 2)]
SOME = st.integers(0, 100_000)


@st.composite
def asked(draw: st.DrawFn) -> Autoscaling:
    least = draw(st.integers(0, 5))
    return Autoscaling(
        min_replicas=least,
        max_replicas=draw(st.integers(max(least, 1), 40)),
        queue_wait_seconds=draw(st.floats(0.001, 10)),
        idle_seconds=draw(st.floats(1, 600)),
        cool_down_seconds=draw(st.floats(1, 600)),
    )


@st.composite
def windows(draw: st.DrawFn, length: float) -> Window:
    if draw(st.integers(0, 9)) == 0:
        return Window()
    waiting = draw(st.sampled_from([0, 0, 1, 7, 500]))
    counts = Counts(arrived=draw(SOME), succeeded=draw(SOME), failed=draw(SOME), overloaded=draw(SOME))
    return Window(length, draw(st.sampled_from([Counts(), counts])), waiting, draw(st.integers(0, waiting)))


@st.composite
def targets(draw: st.DrawFn) -> tuple[Target, ...]:
    found = []
    for version in VERSIONS[: draw(st.integers(1, 2))]:
        steady, sudden = draw(windows(10.0)), draw(windows(2.0))
        fastest = draw(st.one_of(st.none(), st.floats(1e-4, 10)))
        found.append(
            Target(version, steady, sudden, draw(st.integers(0, 40)), fastest, draw(st.integers(1, 64)))
        )
    return tuple(found)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), limits=asked(), first=st.integers(0, 40))
def test_every_number_is_allowed_and_silence_or_a_request_never_ends_the_last_replica(
    data: st.DataObject, limits: Autoscaling, first: int
) -> None:
    scale, memory, now, arrived = Scale(limits.clamp(first)), None, 0.0, 0
    began: float | None = None
    for _ in range(data.draw(st.integers(1, 12))):
        now += data.draw(st.floats(0.01, 200))
        arrived += data.draw(st.sampled_from([0, 0, 1, 1000]))
        facts = Facts(limits, scale, data.draw(targets()), arrived, data.draw(st.booleans()))
        before: Memory | None = memory
        decided, memory = decide(facts, memory, now)
        began = now if began is None else began
        assert limits.min_replicas <= decided.desired <= limits.max_replicas
        assert all(rate > 0 for _, rate in decided.capacities)
        if not facts.known:
            assert decided == scale
        elif facts.waiting:
            assert decided.desired > 0
        if 0 < decided.desired < scale.desired:
            # Fewer only after a whole cool-down, and never fewer than any moment of it asked for.
            assert now - began >= limits.cool_down_seconds
            assert decided.desired >= limits.clamp(max(count for _, count in memory.needs))
        if decided.desired == 0 < scale.desired and not facts.starved:
            assert before is not None
            assert now - before.busy_at >= limits.idle_seconds
        scale = decided
