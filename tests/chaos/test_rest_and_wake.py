"""Requests that come just when the last replica of a deployment ends: each is answered, and soon."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import penstock
from penstock.errors import PenstockError
from support.mesh_process import Mesh
from support.onnx_models import save_adder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

SECONDS = 60.0
CALLERS = 2
SOON_SECONDS = 3.0


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh") / "data", gateways=2, schedulers=2) as made:
        yield made


def test_requests_that_come_as_the_last_replica_ends_are_all_answered(mesh: Mesh) -> None:
    with penstock.Client(mesh.address) as client:
        client.push(
            save_adder(mesh.data_dir.parent / "adder.onnx", 7.0),
            model="adder",
            options=penstock.PackageOptions(max_batch_size=8),
        )
        client.deploy("adder", autoscaling={"min_replicas": 0, "max_replicas": 2, "idle": 1})
        client.wait_ready("adder", timeout=60)
    took: list[float] = []
    wrong: list[str] = []
    ends = time.monotonic() + SECONDS
    rests = 0

    def call(seed: int) -> None:
        chance = random.Random(seed)
        # A client each: their connections end at different gateways.
        with penstock.Client(mesh.address) as caller:
            while time.monotonic() < ends:
                # Idle for a second, a report each second, a pass of the loop: it ends within a second or two.
                time.sleep(chance.uniform(0.9, 3.5))
                value = float(chance.randrange(1000))
                began = time.monotonic()
                try:
                    out = caller.predict("adder", {"input": np.full((1, 1), value, np.float32)}, timeout=20)
                except PenstockError as error:
                    wrong.append(f"{error!r} after {time.monotonic() - began:.2f} s")
                    continue
                took.append(time.monotonic() - began)
                if float(out["output"][0, 0]) != value + 7.0:
                    wrong.append(f"{value} gave {out}")

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(CALLERS)]
    for thread in callers:
        thread.start()
    with penstock.Client(mesh.address) as client:
        at_rest = False
        while time.monotonic() < ends:
            now = client.get_deployment("adder").desired_replicas == 0
            rests += now and not at_rest
            at_rest = now
            time.sleep(0.05)
    for thread in callers:
        thread.join()
    took.sort()
    print(
        f"{len(took)} requests, {rests} rests; median {took[len(took) // 2] * 1000:.0f} ms, "
        f"slowest {' '.join(f'{seconds:.2f}' for seconds in took[-5:])} s"
    )
    assert not wrong
    assert rests >= 3
    assert took[-1] < SOON_SECONDS
