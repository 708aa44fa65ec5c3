"""Bad versions under real callers: each is taken back by itself, and few callers ever meet it.

Prints how long each took from the first canary traffic, and which part of all calls failed meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock.errors import PenstockError
from penstock.rollouts import rollout_policy
from penstock.scheduler.v1 import deployment_pb2, rollout_pb2
from support.mesh_process import Mesh
from support.models import build_python

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

CODE = '''
import random
import time


class Model:
    """Adds ten after a while; errs and disagrees as it was built to."""

    def predict(self, inputs):
        time.sleep(SECONDS)
        if random.random() < ERRORS:
            raise ValueError("bad luck")
        x = inputs["x"]
        wrong = (x[:, :1].astype("int64") % 10) < DISAGREES
        return {"y": x + 10 + wrong}
'''
VERSIONS = {
    1: {"SECONDS": "0.004", "ERRORS": "0", "DISAGREES": "0"},
    2: {"SECONDS": "0.004", "ERRORS": "0.05", "DISAGREES": "0"},
    3: {"SECONDS": "0.012", "ERRORS": "0", "DISAGREES": "0"},
    4: {"SECONDS": "0.004", "ERRORS": "0", "DISAGREES": "1"},
    5: {"SECONDS": "0.0040", "ERRORS": "0", "DISAGREES": "0"},
}
CALLERS = 8
WITHIN_SECONDS = 15.0
SAME_ROLLOUTS = int(os.environ.get("PENSTOCK_EQUAL_ROLLOUTS", "4"))


@dataclass
class Calls:
    """What callers got."""

    answered: int = 0
    failed: int = 0
    wrong: int = 0

    @property
    def failed_part(self) -> float:
        return self.failed / max(1, self.answered + self.failed)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder: Path = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data", env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"}) as mesh:
        with penstock.Client(mesh.address) as client:
            for number, words in VERSIONS.items():
                code = CODE
                for word, value in words.items():
                    code = code.replace(word, value)
                build_python(
                    folder / str(number),
                    code,
                    inputs=[("x", "FP32", (-1, 4))],
                    outputs=[("y", "FP32", (-1, 4))],
                    max_batch_size=1,
                )
                client.push(folder / str(number), model="adding")
        yield mesh


@asynccontextmanager
async def load(mesh: Mesh, name: str) -> AsyncIterator[Calls]:
    """Callers that ask all the time, each for its own row."""
    calls = Calls()
    stopping = asyncio.Event()

    async def call(client: penstock.AsyncClient, first: int) -> None:
        row = first
        while not stopping.is_set():
            row = (row + CALLERS) % 100_000
            x = np.full((1, 4), row, np.float32)
            try:
                answer = await client.predict(name, {"x": x}, timeout=10)
            except PenstockError:
                calls.failed += 1
            else:
                calls.answered += 1
                calls.wrong += int((answer["y"] != x + 10).any())

    async with penstock.AsyncClient(mesh.address) as client:
        tasks = [asyncio.ensure_future(call(client, first)) for first in range(CALLERS)]
        try:
            yield calls
        finally:
            stopping.set()
            await asyncio.gather(*tasks)


async def roll_out(
    client: penstock.AsyncClient, name: str, version: int, policy: deployment_pb2.RolloutPolicy
) -> tuple[rollout_pb2.Rollout, float]:
    """Asks for a version; returns how its rollout ended, and how many seconds after its first traffic."""
    began = [0.0]

    def note(seen: rollout_pb2.Rollout) -> None:
        if seen.state == rollout_pb2.ROLLOUT_STATE_RUNNING and not began[0]:
            began[0] = time.monotonic()

    asked = await client.deploy(name, f"adding:{version}", rollout_policy=policy)
    while True:
        try:
            await client.get_rollout(name, asked.revision)
            break
        except penstock.errors.NotFound:
            await asyncio.sleep(0.05)
    ended = await client.watch_rollout(name, asked.revision, timeout=120, on_change=note)
    return ended, time.monotonic() - began[0]


def say(words: str) -> None:
    print(f"{words} (load {os.getloadavg()[0]:.2f})")


@pytest.mark.parametrize(
    ("version", "kind", "policy"),
    [
        (2, "ERROR_RATE", rollout_policy("canary", steps=[25, 100], step_seconds=5)),
        (3, "LATENCY", rollout_policy("canary", steps=[25, 100], step_seconds=5)),
        (4, "DISAGREEMENT", rollout_policy("shadow", step_seconds=5)),
    ],
    ids=["errors", "slow", "disagrees"],
)
async def test_a_bad_version_is_taken_back_within_seconds(
    mesh: Mesh, version: int, kind: str, policy: deployment_pb2.RolloutPolicy
) -> None:
    name = f"bad-{version}"
    async with penstock.AsyncClient(mesh.address) as client:
        await client.deploy(name, "adding:1")
        await client.wait_for_deployment(name)
        async with load(mesh, name) as calls:
            ended, seconds = await roll_out(client, name, version, policy)
            after = await client.wait_for_deployment(name, revision=3)
        evidence = next(each for each in ended.evidence if each.breached)
        say(f"{kind}: {seconds:.1f} s, {calls}, {calls.failed_part:.4%} failed; {evidence.words}")
        assert ended.state == rollout_pb2.ROLLOUT_STATE_ROLLED_BACK
        assert evidence.kind == rollout_pb2.GuardKind.Value(f"GUARD_KIND_{kind}")
        assert seconds < WITHIN_SECONDS
        assert [target.resolved_version for target in after.serving] == [1]
        # A quarter of the traffic met a version that errs on a twentieth; nobody meets a shadow.
        assert calls.failed_part < 0.05 * 0.25 * 1.5
        assert calls.wrong == 0
        await client.undeploy(name)


async def test_equal_versions_take_over_and_no_call_fails(mesh: Mesh) -> None:
    policy = rollout_policy("canary", steps=[20, 50, 100], step_seconds=1)
    async with penstock.AsyncClient(mesh.address) as client:
        await client.deploy("same", "adding:1")
        await client.wait_for_deployment("same")
        async with load(mesh, "same") as calls:
            for number in range(SAME_ROLLOUTS):
                version = (5, 1)[number % 2]
                ended, seconds = await roll_out(client, "same", version, policy)
                say(f"equal: {seconds:.1f} s, {rollout_pb2.RolloutState.Name(ended.state)} {ended.message}")
                assert ended.state == rollout_pb2.ROLLOUT_STATE_SUCCEEDED
        say(f"equal: {calls}")
        assert calls.failed == 0
        assert calls.wrong == 0
        await client.undeploy("same")


async def test_a_version_that_cannot_be_loaded_is_taken_back_and_no_call_fails(
    mesh: Mesh, tmp_path: Path
) -> None:
    build_python(
        tmp_path / "broken",
        "raise RuntimeError('no such operator')\n",
        inputs=[("x", "FP32", (-1, 4))],
        outputs=[("y", "FP32", (-1, 4))],
        max_batch_size=1,
    )
    async with penstock.AsyncClient(mesh.address) as client:
        pushed = await client.push(tmp_path / "broken", model="adding")
        await client.deploy("unloadable", "adding:1")
        await client.wait_for_deployment("unloadable")
        async with load(mesh, "unloadable") as calls:
            began = time.monotonic()
            ended, _ = await roll_out(client, "unloadable", pushed.number, rollout_policy("canary"))
        say(f"unloadable: {time.monotonic() - began:.1f} s, {calls}; {ended.message}")
        assert ended.state == rollout_pb2.ROLLOUT_STATE_ROLLED_BACK
        assert "no such operator" in ended.message
        assert calls.failed == 0
        await client.undeploy("unloadable")
