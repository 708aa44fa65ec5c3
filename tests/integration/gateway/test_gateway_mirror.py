"""Versions in the shadow through a gateway process: what replicas get, and what the scheduler hears."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1 import envelope_pb2 as envelope
from penstock_kit.errors import Code, Reason
from penstock_kit.queue.keys import queue_name
from penstock_kit.queue.messages import Request
from penstock_local.embedded import EmbeddedRedis
from support import gateway_world
from support.gateway_world import Answer, GatewayProcess, Replica, World, echo, hold, refuse, wait_until

REQUESTS = 40
BODY: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.5]}]}


class Pair:
    """The version in use, and the one in the shadow."""

    def __init__(self, world: World, name: str, live: Replica, dark: Replica) -> None:
        self.name = name
        self.live = live
        self.dark = dark
        self._world = world

    async def told(self, agreed: int, disagreed: int) -> None:
        """Wait until the scheduler has heard of so many."""

        def so() -> bool:
            told = self._world.counted(self.name, 2)
            return (told.agreed, told.disagreed) == (agreed, disagreed)

        await asyncio.to_thread(wait_until, so, f"{agreed} that agree and {disagreed} that do not")


@pytest.fixture
async def pair(world: World, gateway: GatewayProcess, redis_server: EmbeddedRedis) -> AsyncIterator[Pair]:
    name = f"pair-{uuid.uuid4().hex[:8]}"
    replicas = [
        Replica(redis_server.url, queue_name(name, version, gateway_world.DIGEST)) for version in (1, 2)
    ]
    world.offer(name, versions={1: 100, 2: 0}, mirrored={2: 100}, tolerance=0.01)
    await asyncio.to_thread(
        wait_until, lambda: httpx.get(f"{gateway.url}/v2/models/{name}", trust_env=False).status_code == 200
    )
    yield Pair(world, name, *replicas)
    for replica in replicas:
        await asyncio.to_thread(replica.stop)


def scaled(factor: float) -> Any:
    """Answer REST like echo, but with another number."""

    def behave(request: Request) -> Answer:
        head, payload = echo(request)
        document = json.loads(payload)
        for tensor in document["inputs"]:
            tensor["data"] = [value * factor for value in tensor["data"]]
        return head, json.dumps({"outputs": document["inputs"]}).encode()

    return behave


@pytest.mark.parametrize("door", ["grpc", "v2", "v1", "predict"])
async def test_copies_of_every_door_are_compared_and_never_returned(
    door: str, pair: Pair, channel: grpc.aio.Channel, http: httpx.AsyncClient
) -> None:
    infer = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelInferResponse.FromString,
    )
    asked = oip.ModelInferRequest(model_name=pair.name, id="mine")
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    asked.raw_input_contents.append(bytes(16))
    if door == "v2":
        pair.live.behave = pair.dark.behave = scaled(1.0)
    for _ in range(REQUESTS):
        if door == "grpc":
            answer = await infer(asked, timeout=10)
            assert (answer.model_version, answer.id) == ("1", "mine")
        elif door == "v2":
            assert (await http.post(f"/v2/models/{pair.name}/infer", json=BODY)).status_code == 200
        elif door == "v1":
            body = {"instances": [[1.0]]}
            assert (await http.post(f"/v1/models/{pair.name}:predict", json=body)).status_code == 200
        else:
            body = {"model_name": pair.name, "input_data": [[1.0]]}
            assert (await http.post("/predict", json=body)).status_code == 200
    await pair.told(REQUESTS, 0)
    assert (len(pair.live.seen), len(pair.dark.seen)) == (REQUESTS, REQUESTS)
    assert {one.header.id for one in pair.live.seen}.isdisjoint(one.header.id for one in pair.dark.seen)


async def test_differences_over_the_tolerance_and_errors_of_the_shadow_are_told(
    world: World, pair: Pair, http: httpx.AsyncClient
) -> None:
    path = f"/v2/models/{pair.name}/infer"
    pair.live.behave = scaled(1.0)
    for behave in (
        scaled(1.005),
        scaled(1.1),
        refuse(int(Code.INTERNAL), Reason.MODEL_ERROR, "it broke"),
        lambda _: (envelope.ReplyHeader(), b"no answer at all"),
    ):
        pair.dark.behave = behave
        seen = len(pair.dark.seen)
        answer = await http.post(path, json=BODY)
        assert answer.json()["outputs"][0]["data"] == [1.5, 2.5]
        await asyncio.to_thread(wait_until, lambda seen=seen: len(pair.dark.seen) > seen, "the copy")
    await pair.told(1, 3)
    told = world.counted(pair.name, 2)
    assert (told.arrived, told.succeeded, told.failed) == (0, 3, 1)
    assert world.counted(pair.name, 1).arrived == 4
    text = (await http.get("/metrics")).text
    assert (
        f'penstock_gateway_mirrored_total{{deployment="{pair.name}",result="disagreed",version="2"}} 3.0'
        in text
    )


async def test_a_shadow_that_answers_nothing_harms_no_caller(
    world: World, pair: Pair, http: httpx.AsyncClient
) -> None:
    pair.live.behave, pair.dark.behave = scaled(1.0), hold
    for _ in range(3 * REQUESTS):
        assert (await http.post(f"/v2/models/{pair.name}/infer", json=BODY)).status_code == 200
    text = (await http.get("/metrics")).text
    assert f'penstock_gateway_mirrored_total{{deployment="{pair.name}",result="busy",version="2"}}' in text
    # Given up, its copies are gone, and the one that it is made of answers as before.
    world.offer(pair.name, versions={1: 100})
    assert (await http.post(f"/v2/models/{pair.name}/infer", json=BODY)).status_code == 200
