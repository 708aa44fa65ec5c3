"""Equal requests in a whole mesh: how often the model really ran, and who got which answer.

The model counts its calls and says the count in each answer: two answers with one count are one computation.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

import penstock
from penstock.errors import InvalidArgument
from penstock.oip.v2 import inference_pb2 as oip
from penstock_cli.__main__ import main
from support.mesh_process import Mesh
from support.models import build_python

CODE = '''
import time


class Model:
    """Adds ADDEND; says how often it was called; takes as long as it is told to."""

    def load(self, directory):
        self.calls = 0

    def predict(self, inputs):
        x = inputs["x"]
        time.sleep(float(x[:, 1].max()))
        self.calls += 1
        return {"y": x[:, :1] + ADDEND, "calls": x[:, :1] * 0 + self.calls}
'''

SETTLED_SECONDS = 0.5
"""A table of routes that has not changed for so long is the last one for now."""


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh]) -> Mesh:
    return shared_mesh(env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"})


@pytest.fixture(scope="module")
def counting(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two versions of the model, and a deployment of the first."""
    folder = tmp_path_factory.mktemp("models")
    with penstock.Client(mesh.address) as client:
        for addend in (10, 20):
            build_python(
                folder / str(addend),
                CODE.replace("ADDEND", str(addend)),
                inputs=[("x", "FP32", (-1, 2))],
                outputs=[("y", "FP32", (-1, 1)), ("calls", "FP32", (-1, 1))],
                max_batch_size=1,
            )
            client.push(folder / str(addend), model="counting")
        client.set_alias("counting", "live", 1)
        client.deploy("counting", "counting@live")
        client.wait_for_deployment("counting")


@pytest.fixture
def client(mesh: Mesh, counting: None) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        yield client


def ask(client: penstock.Client, value: float, **more: Any) -> tuple[float, float]:
    """Return sum and count."""
    answer = client.predict("counting", {"x": np.array([[value, 0.0]], np.float32)}, **more)
    return float(answer["y"][0, 0]), float(answer["calls"][0, 0])


def executions(mesh: Mesh) -> dict[str, int]:
    """Return hits and misses, as the statistics tell them."""
    (found,) = httpx.get(f"{mesh.url}/v2/models/counting/stats").json()["model_stats"]
    stats = found["inference_stats"]
    return {name: stats[name]["count"] for name in ("cache_hit", "cache_miss")}


def metric(mesh: Mesh, name: str) -> float:
    """Return what the gateway's metrics say; 0 if nothing."""
    for line in httpx.get(f"{mesh.url}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return 0.0


def cached(mesh: Mesh, *words: str) -> None:
    """Change how equal requests are answered, and wait until the gateway goes by it."""
    before = metric(mesh, "penstock_gateway_route_generation")
    assert main(["cache", "counting", "--endpoint", mesh.address, *words]) == 0
    seen, since = before, time.monotonic()

    def settled() -> bool:
        nonlocal seen, since
        now = metric(mesh, "penstock_gateway_route_generation")
        if now != seen:
            seen, since = now, time.monotonic()
        # One change may come as two tables: what followed from the change before counts for nothing here.
        return seen > before and time.monotonic() - since > SETTLED_SECONDS

    mesh.wait(settled, "the gateway knows")


def test_nothing_is_kept_unless_it_is_asked_for(client: penstock.Client, mesh: Mesh) -> None:
    assert ask(client, 1) != ask(client, 1)
    assert executions(mesh) == {"cache_hit": 0, "cache_miss": 0}


def test_a_kept_answer_is_given_over_grpc_and_rest_with_ones_own_id(
    client: penstock.Client, mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(mesh, "--on", "--ttl", "600", "--size", "1MiB")
    assert "answers kept for 600 s" in capsys.readouterr().out
    assert ask(client, 2) == ask(client, 2)
    assert ask(client, 2) != ask(client, 3)
    stub = grpc.insecure_channel(mesh.address).unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelInferResponse.FromString,
    )
    request = oip.ModelInferRequest(model_name="counting")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([4, 0])
    answers = []
    for name in ("mine", "yours", ""):
        request.id = name
        answers.append(stub(request, timeout=20))
        assert answers[-1].id == name
        answers[-1].id = ""
    assert answers[0] == answers[1] == answers[2]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [5, 0]}]}
    for path, document in (
        ("/v2/models/counting/infer", body),
        ("/predict", {"model_name": "counting", "input_data": [[6, 0]]}),
        ("/v1/models/counting:predict", {"instances": [[7, 0]]}),
    ):
        texts = {httpx.post(mesh.url + path, json=document).raise_for_status().text for _ in range(3)}
        assert len(texts) == 1, texts
    counted = executions(mesh)
    assert (counted["cache_hit"], counted["cache_miss"]) == (1 + 1 + 2 + 3 * 2, 6)


def test_bad_input_is_refused_each_time(client: penstock.Client, mesh: Mesh) -> None:
    cached(mesh, "--on", "--coalesce")
    hits = executions(mesh)["cache_hit"]
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="shape"):
            client.predict("counting", {"x": np.zeros((1, 3), np.float32)})
    body = json.dumps({"model_name": "counting", "input_data": "no numbers"})
    assert {httpx.post(f"{mesh.url}/predict", content=body).status_code for _ in range(2)} == {400}
    assert executions(mesh)["cache_hit"] == hits


def test_an_alias_that_moves_brings_new_answers_and_back_the_old_model_computes_anew(
    client: penstock.Client, mesh: Mesh
) -> None:
    first = ask(client, 8)
    assert first[0] == 18.0
    assert ask(client, 8) == first
    for version, total in ((2, 28.0), (1, 18.0)):
        client.set_alias("counting", "live", version)

        def moved(total: float = total) -> bool:
            return ask(client, 8)[0] == total

        mesh.wait(moved, f"version {version} answers")
        # Until the last replica of the other version has gone, routes still change.
        mesh.wait(lambda: len(client.list_replicas(deployment="counting")) == 1, "one replica is left")
        again = ask(client, 8)
        assert again == ask(client, 8)
        assert again[0] == total


async def test_fifty_equal_slow_requests_are_one_execution(client: penstock.Client, mesh: Mesh) -> None:
    await asyncio.to_thread(cached, mesh, "--off", "--coalesce")
    slow = {"x": np.array([[9.0, 1.0]], np.float32)}
    async with penstock.AsyncClient(mesh.address) as callers:
        answers = await asyncio.gather(*(callers.predict("counting", slow) for _ in range(50)))
    assert len({float(answer["calls"][0, 0]) for answer in answers}) == 1
    assert {float(answer["y"][0, 0]) for answer in answers} == {19.0}


async def test_a_replica_that_dies_leaves_nobody_who_waits_without_an_answer(
    client: penstock.Client, mesh: Mesh
) -> None:
    await asyncio.to_thread(cached, mesh, "--on", "--coalesce")
    slow = {"x": np.array([[10.0, 1.5]], np.float32)}
    (replica,) = client.list_replicas(deployment="counting")
    waiting = 'penstock_gateway_inferences_in_flight{deployment="counting"}'
    async with penstock.AsyncClient(mesh.address) as callers:
        calls = [asyncio.ensure_future(callers.predict("counting", slow)) for _ in range(20)]
        await asyncio.to_thread(mesh.wait, lambda: metric(mesh, waiting) == 20, "all wait")
        os.kill(replica.pid, signal.SIGKILL)
        answers = await asyncio.gather(*calls)
    assert {float(answer["y"][0, 0]) for answer in answers} == {20.0}
    assert len({float(answer["calls"][0, 0]) for answer in answers}) == 1
