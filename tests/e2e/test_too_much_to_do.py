"""More work than a model can do: who is answered, who is told to come back, and who never stands still."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

import penstock
from penstock.errors import DeadlineExceeded, ResourceExhausted
from penstock.tensors import Priority
from penstock_cli.__main__ import main
from support.mesh_process import Mesh
from support.models import build_python
from support.open_loop import Phase, grpc_target, run

WIDTH = 16
BATCH = 8
CALL_SECONDS = 0.02
CAPACITY = BATCH / CALL_SECONDS
CODE = f'''
import time


class Model:
    """Takes {CALL_SECONDS} s for up to {BATCH} rows, and no processor."""

    def predict(self, inputs):
        time.sleep({CALL_SECONDS})
        return {{"y": inputs["x"]}}
'''
ROW = {"x": np.zeros((1, WIDTH), np.float32)}


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh], tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    made = shared_mesh(env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"})
    folder = tmp_path_factory.mktemp("model")
    build_python(folder, CODE, max_batch_size=BATCH)
    with penstock.Client(made.address) as client:
        client.push(folder, model="slow")
        client.deploy("slow")
        client.wait_ready("slow")
    return made


class Crowd:
    """Callers who ask again as soon as they are answered.

    Attributes:
        answered: Answers, by priority.
        refused: Refusals, by priority.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.answered: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    async def until(self, priority: Priority, count: int, callers: dict[Priority, int]) -> None:
        """Keep so many callers busy until those of one priority have so many answers."""
        enough = asyncio.Event()

        async def ask(client: penstock.AsyncClient, of: Priority) -> None:
            while not enough.is_set():
                try:
                    await client.predict("slow", ROW, priority=of, timeout=30)
                except ResourceExhausted as error:
                    self.refused[of] += 1
                    await asyncio.sleep(error.retry_after_seconds or 0.1)
                    continue
                self.answered[of] += 1
                if self.answered[priority] >= count:
                    enough.set()

        async with penstock.AsyncClient(self._address) as client, asyncio.TaskGroup() as tasks:
            for of, number in callers.items():
                for _ in range(number):
                    tasks.create_task(ask(client, of))


async def test_under_constant_high_load_the_others_get_the_part_that_is_promised(mesh: Mesh) -> None:
    crowd = Crowd(mesh.address)
    async with asyncio.timeout(60):
        await crowd.until("high", 600, {"high": 64, "normal": 32, "low": 32})
    total = crowd.answered.total()
    # A tenth is promised to low, a fifth to normal, and the rest is high's.
    assert crowd.answered["low"] >= 0.06 * total
    assert crowd.answered["normal"] >= 0.12 * total
    assert crowd.answered["high"] >= 0.6 * total


async def test_callers_in_a_hurry_are_refused_at_once_and_the_patient_are_all_answered(mesh: Mesh) -> None:
    patient: list[float] = []
    refusals: list[tuple[float, ResourceExhausted]] = []
    async with penstock.AsyncClient(mesh.address) as client, asyncio.timeout(60):
        await client.predict("slow", ROW)

        async def wait() -> None:
            began = time.monotonic()
            await client.predict("slow", ROW, timeout=30)
            patient.append(time.monotonic() - began)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(600):
                tasks.create_task(wait())
            while len(patient) < 300:
                began = time.monotonic()
                try:
                    await client.predict("slow", ROW, timeout=0.25)
                except ResourceExhausted as error:
                    refusals.append((time.monotonic() - began, error))
                except DeadlineExceeded:
                    pass  # admitted, and not answered in time: the machine has others to serve
                await asyncio.sleep(0.01)
    assert len(patient) == 600
    assert refusals
    took, error = refusals[-1]
    assert "would answer in" in error.message
    assert 0 < (error.retry_after_seconds or 0) < 10
    assert took < 0.25


def test_an_open_load_of_twice_the_capacity_is_answered_or_refused_and_nothing_else(mesh: Mesh) -> None:
    target = grpc_target(mesh.address, "slow", WIDTH)
    trace = run(target, [Phase(2 * CAPACITY, 4), Phase(CAPACITY / 4, 2)], deadline=1.0, seed=7)
    during, after = trace.phase(0), trace.phase(1)
    # How fast is the performance tier's business; here the machine may have others to serve.
    assert set(during.outcomes) <= {"OK", "LATE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert during.outcomes["RESOURCE_EXHAUSTED"] > 100
    assert during.goodput > CAPACITY / 3
    assert after.goodput > after.offered / 2


def test_the_command_line_takes_a_priority(mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    value = str(ROW["x"].tolist())
    assert main(["predict", "slow", "-i", value, "--priority", "high", "--endpoint", mesh.address]) == 0
    assert "y (FP32" in capsys.readouterr().out
