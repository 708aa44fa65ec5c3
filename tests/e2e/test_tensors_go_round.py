"""A tensor of every datatype, rank 0 to 5, goes through the whole mesh unchanged, in every wire form."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import penstock
from penstock.oip.v2 import inference_pb2 as oip
from penstock_kit.oip import NUMPY, Array
from support.mesh_process import Mesh
from support.models import DATATYPES, build_python

RANKS = range(6)
RAW_ONLY = ("FP16", "BF16")
IDENTITY = (
    "class Model:\n    def predict(self, inputs):\n"
    '        return {"out_" + name[3:]: array for name, array in inputs.items()}\n'
)
FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh], tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    """Serves `all-R` for every datatype and `typed-R` for those that have a typed form, R being the rank."""
    mesh = shared_mesh(env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"})
    folder = tmp_path_factory.mktemp("identities")
    with penstock.Client(mesh.address) as client:
        for rank in RANKS:
            for name, datatypes in (("all", DATATYPES), ("typed", list(FIELDS))):
                shape = (-1,) * rank
                build_python(
                    folder / f"{name}-{rank}",
                    IDENTITY,
                    inputs=[(f"in_{d.lower()}", d, shape) for d in datatypes],
                    outputs=[(f"out_{d.lower()}", d, shape) for d in datatypes],
                    max_batch_size=0,
                )
                client.push(folder / f"{name}-{rank}", model=f"{name}-{rank}")
                client.deploy(f"{name}-{rank}")
        for rank in RANKS:
            client.wait_ready(f"all-{rank}")
            client.wait_ready(f"typed-{rank}")
    return mesh


@pytest.fixture(scope="module")
def infer(mesh: Mesh) -> Iterator[Callable[[oip.ModelInferRequest], oip.ModelInferResponse]]:
    with grpc.insecure_channel(mesh.address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelInferResponse.FromString,
        )
        yield lambda request: call(request, timeout=30)


@st.composite
def sets_of_tensors(draw: st.DrawFn, datatypes: list[str], text: bool = False) -> dict[str, Array]:
    """One tensor of every datatype, all of one rank; any bit pattern, NaN and infinities among them."""
    rank = draw(st.sampled_from(list(RANKS)))
    found = {}
    for datatype in datatypes:
        shape = tuple(draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank)))
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        count = int(np.prod(shape))
        array = np.empty(count, dtype=NUMPY[datatype])
        if datatype == "BYTES":
            alphabet = list("aé水\n\0" if text else map(chr, range(256)))
            words = ["".join(random.choice(alphabet, random.integers(0, 9))) for _ in range(count)]
            array[:] = [word.encode("utf-8" if text else "latin-1") for word in words]
        elif datatype == "BOOL":
            array[:] = random.integers(0, 2, count)
        else:
            array = np.frombuffer(random.bytes(count * array.itemsize), dtype=array.dtype)
        found[datatype] = array.reshape(shape)
    return found


def raw_of(array: Array) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(word)) + word for word in array.ravel().tolist())
    return array.tobytes()


def same(got: Array, want: Array) -> bool:
    """Equal in every value; all NaNs are alike, as text and typed forms have only one."""
    if want.dtype.kind == "f":
        return np.array_equal(got, want, equal_nan=True)
    return np.array_equal(got, want)


def request_of(tensors: dict[str, Array], prefix: str) -> oip.ModelInferRequest:
    rank = next(iter(tensors.values())).ndim
    request = oip.ModelInferRequest(model_name=f"{prefix}-{rank}", id="42")
    for datatype, array in tensors.items():
        request.inputs.add(name=f"in_{datatype.lower()}", datatype=datatype, shape=array.shape)
    return request


@few
@given(tensors=sets_of_tensors(DATATYPES))
def test_raw_over_grpc(infer: Any, tensors: dict[str, Array]) -> None:
    request = request_of(tensors, "all")
    request.raw_input_contents.extend(raw_of(array) for array in tensors.values())
    reply = infer(request)
    assert len(reply.outputs) == len(reply.raw_output_contents) == len(tensors)
    for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
        want = tensors[output.datatype]
        assert output.name == f"out_{output.datatype.lower()}"
        assert tuple(output.shape) == want.shape
        assert raw == raw_of(want)


@few
@given(tensors=sets_of_tensors(list(FIELDS)))
@np.errstate(invalid="ignore")
def test_typed_over_grpc(infer: Any, tensors: dict[str, Array]) -> None:
    request = request_of(tensors, "typed")
    for part, (datatype, array) in zip(request.inputs, tensors.items(), strict=True):
        getattr(part.contents, FIELDS[datatype]).extend(array.ravel().tolist())
    reply = infer(request)
    assert not reply.raw_output_contents
    for output in reply.outputs:
        want = tensors[output.datatype]
        got = np.empty(want.size, dtype=want.dtype)
        got[:] = list(getattr(output.contents, FIELDS[output.datatype]))
        assert tuple(output.shape) == want.shape
        assert same(got.reshape(want.shape), want)


@few
@given(tensors=sets_of_tensors(DATATYPES))
def test_binary_over_rest(mesh: Mesh, tensors: dict[str, Array]) -> None:
    rank = next(iter(tensors.values())).ndim
    raws = [raw_of(array) for array in tensors.values()]
    head = {
        "parameters": {"binary_data_output": True},
        "inputs": [
            {
                "name": f"in_{datatype.lower()}",
                "datatype": datatype,
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(raw)},
            }
            for (datatype, array), raw in zip(tensors.items(), raws, strict=True)
        ],
    }
    text = json.dumps(head).encode()
    reply = httpx.post(
        f"{mesh.url}/v2/models/all-{rank}/infer",
        content=text + b"".join(raws),
        headers={
            "inference-header-content-length": str(len(text)),
            "content-type": "application/octet-stream",
        },
        timeout=30,
    )
    assert reply.status_code == 200, reply.text
    length = int(reply.headers["inference-header-content-length"])
    at = length
    for output in json.loads(reply.content[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        want = tensors[output["datatype"]]
        assert tuple(output["shape"]) == want.shape
        assert reply.content[at : at + size] == raw_of(want)
        at += size
    assert at == len(reply.content)


@few
@given(tensors=sets_of_tensors(list(FIELDS), text=True))
@np.errstate(invalid="ignore")
def test_json_over_rest(mesh: Mesh, tensors: dict[str, Array]) -> None:
    rank = next(iter(tensors.values())).ndim

    def plain(array: Array) -> list[Any]:
        return [word.decode() if isinstance(word, bytes) else word for word in array.ravel().tolist()]

    body = {
        "inputs": [
            {
                "name": f"in_{datatype.lower()}",
                "datatype": datatype,
                "shape": list(array.shape),
                "data": plain(array),
            }
            for datatype, array in tensors.items()
        ]
    }
    reply = httpx.post(
        f"{mesh.url}/v2/models/typed-{rank}/infer",
        content=json.dumps(body),  # writes NaN and Infinity, as the protocol's servers do
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert reply.status_code == 200, reply.text
    for output in json.loads(reply.content)["outputs"]:
        want = tensors[output["datatype"]]
        words = output["data"]
        if output["datatype"] == "BYTES":
            words = [base64.b64decode(w["b64"]) if isinstance(w, dict) else w.encode() for w in words]
        got = np.empty(want.size, dtype=want.dtype)
        got[:] = words
        assert tuple(output["shape"]) == want.shape
        assert same(got.reshape(want.shape), want)
