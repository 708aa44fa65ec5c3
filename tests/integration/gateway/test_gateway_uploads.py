"""/predict with large bodies and with files: what reaches the replica, and who is served meanwhile."""

import asyncio
import base64
import gzip
import json
import time
from typing import Any

import httpx
import pytest

from penstock.queue.v1 import envelope_pb2 as envelope
from penstock.scheduler.v1 import routing_service_pb2
from penstock_kit.queue.messages import Request
from support.gateway_world import Answer, Replica, World, wait_until


def size_only(request: Request) -> Answer:
    """Answer with how much came."""
    return envelope.ReplyHeader(), json.dumps({"output_data": len(request.payload)}).encode()


def told(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("reason", "")


def b64(*data: bytes) -> Any:
    found = [{"b64": base64.b64encode(one).decode()} for one in data]
    return found[0] if len(found) == 1 else found


@pytest.mark.parametrize("layout", ["name first", "name last", "name in the query"])
async def test_a_large_body_finds_its_model_wherever_the_name_stands(
    http: httpx.AsyncClient, replica: Replica, layout: str
) -> None:
    replica.behave = size_only
    name, rows = {"model_name": "echo", "model_version": 1}, {"input_data": [[1.5] * 1000] * 50}
    body = {"name first": {**name, **rows}, "name last": {**rows, **name}}.get(layout, rows)
    query = {"model_name": "echo"} if layout == "name in the query" else {}
    data = json.dumps(body).encode()
    assert len(data) > 200_000
    answer = await http.post("/predict", content=data, params=query)
    assert (answer.status_code, answer.json()) == (200, {"output_data": len(data)})
    assert replica.seen[-1].payload == data


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"input_data": 1}, (400, "INVALID_REQUEST")),
        ({"model_name": ["echo"]}, (400, "INVALID_REQUEST")),
        ({"model_name": "nobody"}, (404, "DEPLOYMENT_NOT_FOUND")),
        ({"model_name": "echo", "model_version": 7}, (404, "VERSION_NOT_FOUND")),
        ({"model_name": "echo", "model_version": {}}, (400, "INVALID_REQUEST")),
        (["model_name"], (400, "MALFORMED_BODY")),
    ],
)
async def test_a_large_body_is_told_what_is_wrong(
    http: httpx.AsyncClient, body: Any, wanted: tuple[int, str]
) -> None:
    data = json.dumps(body) + " " * 100_000
    assert told(await http.post("/predict", content=data)) == wanted


async def test_others_are_served_while_a_large_body_is_read(
    http: httpx.AsyncClient, replica: Replica
) -> None:
    replica.behave = size_only
    # Three million brackets: Python's reader would take a third of a second for them, in one go.
    data = b'{"input_data":[' + b",".join([b"[1,2]"] * 600_000) + b'],"model_name":"echo"}'
    large = asyncio.ensure_future(http.post("/predict", content=data))
    served = 0
    while not large.done():
        await http.get("/v2/health/live")
        served += 1
    assert (await large).json() == {"output_data": len(data)}
    assert served > 2


async def test_what_is_too_large_for_its_form_is_refused(http: httpx.AsyncClient) -> None:
    form = {"model_name": "echo", "input_data": "[" + "1," * 50_000 + "1]"}
    answer = await http.post("/predict", data=form)
    assert (answer.status_code, answer.json()["reason"]) == (413, "PAYLOAD_TOO_LARGE")
    assert "as JSON" in answer.json()["error"]
    answer = await http.post("/v2/repository/index", json={"ready": True, "x": "x" * 100_000})
    assert answer.status_code == 413


async def test_a_compressed_body_is_the_same_body(http: httpx.AsyncClient, replica: Replica) -> None:
    data = json.dumps({"model_name": "echo", "input_data": [[0.25] * 40_000]}).encode()
    answer = await http.post("/predict", content=gzip.compress(data), headers={"content-encoding": "gzip"})
    assert answer.json() == {"output_data": [[0.25] * 40_000]}
    assert replica.seen[-1].payload == data


@pytest.fixture
def images(world: World, http: httpx.AsyncClient) -> Any:
    """Offer "echo" with one input of files, of any shape."""

    def offer(shape: list[int], *, batches: bool = True) -> None:
        world.offer("echo", max_batch_size=8 if batches else 0)
        route: routing_service_pb2.Route = world.routes["echo"]
        signature = route.targets[0].manifest.signature
        del signature.inputs[:]
        signature.inputs.add(name="image", data_type="DATA_TYPE_BYTES", shape=shape)
        world.publish()
        wanted = {"name": "image", "datatype": "BYTES", "shape": shape}
        wait_until(
            lambda: (
                httpx.get(f"{http.base_url}/v2/models/echo", trust_env=False).json()["inputs"] == [wanted]
                and httpx.get(f"{http.base_url}/v2/models/echo/config", trust_env=False).json()[
                    "max_batch_size"
                ]
                == (8 if batches else 0)
            )
        )

    return offer


@pytest.mark.parametrize(
    ("shape", "batches", "files", "expected"),
    [
        ([-1], True, [b"\xff\xd8one"], b64(b"\xff\xd8one")),
        ([-1], True, [b"one", b"", b"three"], b64(b"one", b"", b"three")),
        ([-1, 1], True, [b"one"], [b64(b"one")]),
        ([-1, 1], True, [b"one", b"two"], [[b64(b"one")], [b64(b"two")]]),
        ([2], False, [b"one", b"two"], b64(b"one", b"two")),
        ([1, 1], False, [b"one"], [[b64(b"one")]]),
    ],
)
async def test_a_file_becomes_a_tensor_of_bytes(
    http: httpx.AsyncClient, images: Any, shape: list[int], batches: bool, files: list[bytes], expected: Any
) -> None:
    images(shape, batches=batches)
    answer = await http.post(
        "/predict", data={"model_name": "echo"}, files=[("file", ("cat.jpg", data)) for data in files]
    )
    assert (answer.status_code, answer.json()) == (200, {"output_data": expected})
    named = await http.post(
        "/predict?model_name=echo", files=[("image", ("cat.jpg", data)) for data in files]
    )
    assert named.json() == {"output_data": {"image": expected}}


async def test_files_and_texts_go_to_the_inputs_of_their_names(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/predict",
        data={"model_name": "echo@champion", "x": "[1, 2, 3, 4]"},
        files={"note": ("note.txt", b"\x00\xff")},
    )
    assert answer.json() == {"output_data": {"x": [1, 2, 3, 4], "note": [b64(b"\x00\xff")]}}
    texts = {"model_name": (None, "echo"), "model_version": (None, "1"), "input_data": (None, "[[1]]")}
    assert (await http.post("/predict", files=texts)).json() == {"output_data": [[1]]}


@pytest.mark.parametrize(
    ("files", "wanted", "words"),
    [
        ({"file": ("a", b"1")}, 400, "several inputs"),
        ({"x": ("a", b"1")}, 400, "takes FP32; a file can only"),
        ({"other": ("a", b"1")}, 400, "'other' is no input"),
        ({"x": (None, "no JSON")}, 400, "not JSON"),
        ({"x": (None, b"\xff")}, 400, "neither a file nor UTF-8"),
        ({"model_version": (None, "1")}, 400, "No part has input"),
        ({"model_version": (None, "9"), "x": (None, "1")}, 404, "version 9"),
    ],
)
async def test_an_upload_is_told_what_is_wrong(
    http: httpx.AsyncClient, files: dict[str, Any], wanted: int, words: str
) -> None:
    answer = await http.post("/predict?model_name=echo", files=files)
    assert answer.status_code == wanted, answer.text
    assert words in answer.json()["error"]


async def test_an_upload_without_a_model_or_a_form_is_told_so(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", files={"x": (None, "1")})
    assert "model_name is missing" in answer.json()["error"]
    head = {"content-type": "multipart/form-data; boundary=b"}
    for data in (b"", b"--b", b"--b--", b"{}"):
        answer = await http.post("/predict?model_name=echo", content=data, headers=head)
        assert answer.status_code == 400, answer.text


async def test_a_large_file_goes_through_quickly(
    http: httpx.AsyncClient, images: Any, replica: Replica
) -> None:
    images([-1])
    replica.behave = size_only
    started = time.monotonic()
    answer = await http.post(
        "/predict", data={"model_name": "echo"}, files={"file": ("film", bytes(3_500_000))}
    )
    assert answer.json()["output_data"] > 3_500_000 * 4 / 3
    assert time.monotonic() - started < 10
