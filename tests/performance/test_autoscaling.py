"""Numbers of replicas that follow the load of a whole mesh: from none, and by a step of ten times as much."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

import penstock
from support.mesh_process import Mesh
from support.models import ECHO_WIDTH, build_digits_cnn, build_python, digits_test_set
from support.open_loop import Phase, grpc_target, run

pytestmark = [pytest.mark.performance, pytest.mark.timeout(300)]

FIRST_ANSWER_SECONDS = 1.5
SERVICE_SECONDS = 0.01
OBJECTIVE_SECONDS = 0.05
# What the way through the mesh takes on a machine that has other things to do.
WAY_SECONDS = 0.04
CALM_RATE = 40
CALM_SECONDS, STEP_SECONDS = 15, 30
RESTORED_SECONDS = 10.0
PATIENT_SECONDS = 20.0
WAVE_RATE, WAVE_PART, WAVE_SECONDS, WAVES = 200, 0.8, 60, 3
# Of what a replica can do, as the scheduler reckons (services/scheduler/README.md).
FULL = 0.85


def build_slow(folder: Path) -> None:
    """A model that takes its time, and no processor."""
    code = (
        "import time\n\n\n"
        'class Model:\n    """Takes its time, and no processor."""\n\n'
        f"    def predict(self, inputs):\n        time.sleep({SERVICE_SECONDS})\n"
        '        return {"y": inputs["x"]}\n'
    )
    build_python(folder, code, max_batch_size=1)


@contextmanager
def watched(client: penstock.Client, name: str) -> Iterator[list[tuple[float, int, int]]]:
    """Yield a list of (seconds, desired, ready) to which each change of a deployment is added."""
    seen: list[tuple[float, int, int]] = []
    done = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        while not done.wait(0.25):
            now = client.get_deployment(name)
            entry = (time.monotonic() - began, now.desired_replicas, now.ready_replicas)
            if not seen or seen[-1][1:] != entry[1:]:
                seen.append(entry)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(
        tmp_path_factory.mktemp("mesh") / "data", env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"}
    ) as made:
        yield made


def test_the_first_request_to_a_cached_torch_model_at_rest_is_answered_soon(
    mesh: Mesh, tmp_path: Path
) -> None:
    build_digits_cnn(tmp_path)
    row = digits_test_set()[0][:1]
    took = []
    with penstock.Client(mesh.address) as client:
        client.push(tmp_path, model="digits")
        (name,) = [tensor.name for tensor in client.get_version("digits:1").manifest.signature.inputs]
        client.deploy("digits", autoscaling={"min_replicas": 0, "max_replicas": 2, "idle": 1})
        client.wait_ready("digits", timeout=30)

        def at_rest() -> bool:
            gone = not client.list_replicas(deployment="digits")
            return gone and client.get_deployment("digits").desired_replicas == 0

        for _ in range(7):
            mesh.wait(at_rest, "no replica is left")
            began = time.monotonic()
            client.predict("digits", {name: row}, timeout=30)
            took.append(time.monotonic() - began)
        client.undeploy("digits")
    print("first answer from none:", " ".join(f"{seconds * 1000:.0f}" for seconds in took), "ms")
    assert statistics.median(took) < FIRST_ANSWER_SECONDS
    assert sorted(took)[-2] < FIRST_ANSWER_SECONDS


def test_ten_times_the_load_at_once_is_served_as_it_should_within_ten_seconds(
    mesh: Mesh, tmp_path: Path
) -> None:
    build_slow(tmp_path / "slow")
    with penstock.Client(mesh.address) as client:
        client.push(tmp_path / "slow", model="slow")
        client.deploy(
            "slow",
            autoscaling={
                "min_replicas": 1,
                "max_replicas": 12,
                "queue_wait_objective": OBJECTIVE_SECONDS,
                "cool_down": 60,
            },
        )
        client.wait_ready("slow", timeout=60)

        with watched(client, "slow") as seen:
            phases = [Phase(CALM_RATE, CALM_SECONDS), Phase(10 * CALM_RATE, STEP_SECONDS)]
            trace = run(
                grpc_target(mesh.address, "slow", ECHO_WIDTH), phases, deadline=PATIENT_SECONDS, seed=5
            )
        client.undeploy("slow")
    trace.deadline = SERVICE_SECONDS + OBJECTIVE_SECONDS + WAY_SECONDS
    restored = trace.recovered_after(CALM_SECONDS)
    last = trace.between(CALM_SECONDS + RESTORED_SECONDS, CALM_SECONDS + STEP_SECONDS)
    for at, desired, ready in seen:
        print(f"{at:5.1f} s: {desired} desired, {ready} ready")
    print(
        f"ten times {CALM_RATE}/s at {CALM_SECONDS} s: within {trace.deadline * 1000:.0f} ms again "
        f"after {restored:.1f} s; then p50 {last.p50:.0f} ms, p99 {last.p99:.0f} ms, {last.outcomes}; "
        f"generator late by {trace.lag:.0f} ms"
    )
    assert set(trace.codes) == {"OK"}
    assert restored <= RESTORED_SECONDS


def changes(numbers: Sequence[int]) -> int:
    """How many replicas come and go."""
    return sum(abs(after - before) for before, after in pairwise(numbers))


def test_a_wave_moves_no_more_than_twice_the_replicas_that_it_must(mesh: Mesh, tmp_path: Path) -> None:
    build_slow(tmp_path / "wavy")

    def rate(second: float) -> float:
        return WAVE_RATE * (1 + WAVE_PART * math.sin(2 * math.pi * second / WAVE_SECONDS))

    with penstock.Client(mesh.address) as client:
        client.push(tmp_path / "wavy", model="wavy")
        client.deploy(
            "wavy",
            replicas=3,
            autoscaling={
                "min_replicas": 1,
                "max_replicas": 12,
                "queue_wait_objective": OBJECTIVE_SECONDS,
                "cool_down": 5,
            },
        )
        client.wait_ready("wavy", timeout=60)
        with watched(client, "wavy") as seen:
            phases = [Phase(rate(second + 0.5), 1) for second in range(WAVES * WAVE_SECONDS)]
            trace = run(
                grpc_target(mesh.address, "wavy", ECHO_WIDTH), phases, deadline=PATIENT_SECONDS, seed=7
            )
    # The first wave shows what a replica can do.
    least = changes(
        [
            math.ceil(rate(second + 0.5) * SERVICE_SECONDS / FULL)
            for second in range(WAVE_SECONDS, WAVES * WAVE_SECONDS)
        ]
    )
    moved = changes([desired for at, desired, _ in seen if at >= WAVE_SECONDS])
    trace.deadline = SERVICE_SECONDS + OBJECTIVE_SECONDS + WAY_SECONDS
    late = trace.between(WAVE_SECONDS, WAVES * WAVE_SECONDS)
    print(f"{WAVES - 1} waves between {rate(45):.0f} and {rate(15):.0f}/s: {moved} changes, at least {least}")
    print(f"p50 {late.p50:.0f} ms, p99 {late.p99:.0f} ms, {late.outcomes}")
    assert set(trace.codes) == {"OK"}
    assert 0 < moved <= 2 * least
