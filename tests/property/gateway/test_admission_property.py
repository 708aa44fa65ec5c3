"""Is there a model, a number of replicas or a load for which admission wastes the capacity?"""

from hypothesis import given, settings
from hypothesis import strategies as st

from support.queue_simulation import Load, Model, Simulation


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Models of 5 to 60 ms for a full call; some gain nothing by batching, some much."""
    batch = draw(st.sampled_from([1, 4, 16, 64]))
    full = draw(st.floats(0.005, 0.06))
    fixed = full * draw(st.floats(0.0, 1.0))
    return Model(
        batch=batch,
        seconds=lambda n: fixed + (full - fixed) * n / batch,
        noise=draw(st.floats(0.02, 0.3)),
    )


@settings(max_examples=20, deadline=None)
@given(
    model=models(),
    replicas=st.integers(1, 4),
    times=st.floats(1.3, 4.0),
    seed=st.integers(0, 1000),
)
def test_overload_never_costs_much_of_the_capacity(
    model: Model, replicas: int, times: float, seed: int
) -> None:
    capacity = model.capacity * replicas
    # So many calls that their noise evens out, and time for at least six of them.
    seconds = max(2.0, 200 * model.seconds(model.batch) / replicas)
    timeout = max(0.25, 6 * model.seconds(model.batch))
    world = Simulation(model, replicas=replicas, seed=seed, slice_seconds=seconds / 8)
    world.offer(Load(min(times * capacity, capacity + 20_000), end=seconds, timeout=timeout))
    world.run(seconds + 1)
    seen = world.sum(seconds / 4, seconds)
    assert seen.came == seen.good + seen.refused + seen.late
    assert seen.good >= 0.85 * 0.75 * seconds * capacity


@settings(max_examples=20, deadline=None)
@given(model=models(), replicas=st.integers(1, 4), part=st.floats(0.1, 0.75), seed=st.integers(0, 1000))
def test_light_load_is_never_refused(model: Model, replicas: int, part: float, seed: int) -> None:
    capacity = model.capacity * replicas
    seconds = max(1.0, 300 / capacity)
    # Requests that wait by chance for longer than they may are not what this is about.
    timeout = max(0.25, 20 * model.seconds(model.batch))
    world = Simulation(model, replicas=replicas, seed=seed, slice_seconds=seconds)
    world.offer(Load(min(part * capacity, 10_000), end=seconds, timeout=timeout))
    world.run(seconds + timeout + 1)
    seen = world.sum(0, seconds)
    assert (seen.refused, seen.late) == (0, 0)
