"""An open load of twice the capacity, each request with 250 ms: the figures that must hold.

`make bench` draws the whole curve, beside the peers' (overload.py); this is the test of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import penstock
from performance.workloads import SLEEP_SECONDS, WORKLOADS
from support.mesh_process import Mesh
from support.open_loop import Phase, Trace, grpc_target, run

pytestmark = [pytest.mark.performance, pytest.mark.timeout(300)]

DEADLINE_SECONDS = 0.25
SECONDS = 5.0
# Of the capacity: while the load lasts (its first second included), and before and after it.
GOODPUT = 0.9
CALM = 0.5
REFUSAL_SECONDS = 0.020
BACK_SECONDS = 2.0
# A machine whose generator is later than this has other things to do, and no figure says anything.
LAG_MS = 25.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("overload")
    with Mesh(folder / "data", env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"}) as made:
        with penstock.Client(made.address) as client:
            for key in ("sleep", "w2"):
                WORKLOADS[key].build(folder / key)
                client.push(folder / key, model=WORKLOADS[key].model)
        yield made


def serve(mesh: Mesh, key: str, replicas: int = 1) -> str:
    model = WORKLOADS[key].model
    with penstock.Client(mesh.address) as client:
        deployed = client.deploy(model, replicas=replicas)
        client.wait_for_deployment(model, revision=deployed.revision)
    return model


def load(
    mesh: Mesh,
    key: str,
    *phases: tuple[float, float],
    deadline: float = DEADLINE_SECONDS,
    **parameters: int,
) -> Trace:
    workload = WORKLOADS[key]
    target = grpc_target(mesh.address, workload.model, workload.width, **parameters)
    trace = run(target, [Phase(rate, seconds) for rate, seconds in phases], deadline=deadline, seed=11)
    if trace.lag > LAG_MS:
        pytest.skip(
            f"the load generator was {trace.lag:.0f} ms late: the machine is busy with something else"
        )
    return trace


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize("replicas", [1, 3])
def test_most_of_the_capacity_is_answered_in_time_and_the_rest_is_told_at_once(
    mesh: Mesh, replicas: int, factor: float
) -> None:
    serve(mesh, "sleep", replicas)
    capacity = replicas * WORKLOADS["sleep"].max_batch / SLEEP_SECONDS
    trace = load(mesh, "sleep", (CALM * capacity, 2), (factor * capacity, SECONDS), (CALM * capacity, 4))
    during = trace.phase(1)
    back = trace.recovered_after(2 + SECONDS)
    print(
        f"{replicas} × 20 ms model at {factor:g} × {capacity:.0f}/s: {during.goodput / capacity:.0%} of the "
        f"capacity in time, p99 {during.p99:.0f} ms, refused in {during.refusal_p50:.1f} ms, "
        f"normal after {back:.2f} s; {during.outcomes}"
    )
    assert during.goodput >= GOODPUT * capacity
    assert during.refusal_p50 < REFUSAL_SECONDS * 1000
    assert back <= BACK_SECONDS


def test_a_model_that_takes_a_whole_processor_is_no_different(mesh: Mesh) -> None:
    serve(mesh, "w2")
    # Twice what it can is certain to be refused in part; what is answered then is what it can.
    flood = load(mesh, "w2", (3000, 4), deadline=10)
    ended = (flood.sent + flood.took)[flood.codes == "OK"]
    capacity = float(((ended > 2) & (ended < 4)).sum()) / 2
    trace = load(mesh, "w2", (CALM * capacity, 2), (2 * capacity, SECONDS), (CALM * capacity, 4))
    during = trace.phase(1)
    back = trace.recovered_after(2 + SECONDS)
    print(
        f"W2 at 2 × {capacity:.0f}/s: {during.goodput / capacity:.0%} of the capacity in time, "
        f"p99 {during.p99:.0f} ms, refused in {during.refusal_p50:.1f} ms, normal after {back:.2f} s; "
        f"{during.outcomes}"
    )
    assert during.goodput >= GOODPUT * capacity
    assert during.refusal_p50 < REFUSAL_SECONDS * 1000
    assert back <= BACK_SECONDS


def test_below_four_fifths_of_the_capacity_nobody_is_refused(mesh: Mesh) -> None:
    serve(mesh, "sleep")
    capacity = WORKLOADS["sleep"].max_batch / SLEEP_SECONDS
    trace = load(mesh, "sleep", (0.8 * capacity, 10))
    seen = trace.phase(0)
    print(f"at 80 %: {seen.outcomes}, p99 {seen.p99:.0f} ms")
    assert seen.refused == 0
    assert seen.goodput >= 0.999 * seen.offered


def test_high_priority_is_answered_and_low_is_refused(mesh: Mesh) -> None:
    serve(mesh, "sleep")
    capacity = WORKLOADS["sleep"].max_batch / SLEEP_SECONDS
    with ThreadPoolExecutor() as pool:
        lows = pool.submit(load, mesh, "sleep", (1.5 * capacity, 8), priority=3)
        highs = pool.submit(load, mesh, "sleep", (0.6 * capacity, 8), priority=1)
        low, high = lows.result().between(1, 7), highs.result().between(1, 7)
    print(
        f"high at 60 %: {high.goodput / high.offered:.1%} of it in time, p99 {high.p99:.0f} ms; "
        f"low at 150 %: {low.goodput / capacity:.0%} of capacity, {low.refused / low.offered:.0%} refused; "
        f"{high.outcomes}, {low.outcomes}"
    )
    assert high.goodput >= 0.99 * high.offered
    assert low.refused >= 0.5 * low.offered
    assert high.goodput + low.goodput >= GOODPUT * capacity
