"""Is a request that fits a template read as the parser would read it, whatever its bytes are?"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.oip.v2 import inference_pb2 as oip
from penstock_kit.errors import PenstockError
from penstock_kit.oip import InferRequest, Signature, TensorSpec
from penstock_kit.oip.grpc_form import GrpcForm
from penstock_kit.oip.request import InputTable

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, -1)), TensorSpec("mask", "INT8", (-1, 3), optional=True)),
    (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("z", "FP32", (-1,))),
    batched=True,
)
ids = st.one_of(st.just(""), st.integers(0, 10**9).map(str), st.text(max_size=140))


def form() -> GrpcForm:
    return GrpcForm(InputTable(SIGNATURE), "7")


@st.composite
def requests(draw: st.DrawFn) -> oip.ModelInferRequest:
    rows, width = draw(st.integers(1, 3)), draw(st.integers(0, 40))
    message = oip.ModelInferRequest(
        model_name=draw(st.sampled_from(["digits", "", "m" * 130])),
        model_version=draw(st.sampled_from(["", "3"])),
        id=draw(ids),
    )
    if draw(st.booleans()):
        message.parameters["timeout"].int64_param = draw(st.integers(0, 2))
    if draw(st.booleans()):
        message.outputs.add(name="z")
    tensors = {"x": np.full((rows, width), draw(st.floats(width=32)), np.float32)}
    if draw(st.booleans()):
        tensors["mask"] = np.full((rows, 3), draw(st.integers(-128, 127)), np.int8)
    names = list(tensors)
    if draw(st.booleans()):
        names.reverse()
    for name in names:
        datatype = "FP32" if name == "x" else "INT8"
        message.inputs.add(name=name, datatype=datatype, shape=tensors[name].shape)
        message.raw_input_contents.append(tensors[name].tobytes())
    return message


def read(reader: Any, payload: bytes) -> object:
    """What a request asks for, in a form that can be compared; or how it is refused."""
    try:
        request: InferRequest = reader(payload)
    except PenstockError as error:
        return (type(error), error.message, error.metadata)
    inputs = [
        (name, array.dtype, array.shape, array.tobytes(), array.flags.writeable)
        for name, array in request.inputs.items()
    ]
    return (inputs, request.rows, request.form, request.id, request.outputs, request.parameters)


@given(
    learned=st.lists(requests(), min_size=1, max_size=4), later=requests(), same=st.booleans(), caller_id=ids
)
def test_a_request_is_read_as_if_it_were_the_first(
    learned: list[oip.ModelInferRequest], later: oip.ModelInferRequest, same: bool, caller_id: str
) -> None:
    known = form()
    for message in learned:
        read(known.decode, message.SerializeToString())
    if same:
        later.CopyFrom(learned[-1])
        later.id = caller_id
        for index, raw in enumerate(later.raw_input_contents):
            later.raw_input_contents[index] = raw[::-1]
    payload = later.SerializeToString()
    assert read(known.decode, payload) == read(form().parse, payload)


@settings(max_examples=300)
@given(
    message=requests(), at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.booleans(), add=st.binary()
)
def test_a_byte_that_changes_is_not_overlooked(
    message: oip.ModelInferRequest, at: int, byte: int, cut: bool, add: bytes
) -> None:
    known = form()
    payload = message.SerializeToString()
    read(known.decode, payload)
    at %= max(1, len(payload))
    changed = payload[:at] + bytes([byte]) + payload[at + 1 :]
    for damaged in (changed, changed[:at] if cut else changed + add, payload[:at] + add + payload[at:]):
        assert read(known.decode, damaged) == read(form().parse, damaged)


def test_a_request_like_the_last_is_not_parsed() -> None:
    known = form()
    message = oip.ModelInferRequest(model_name="digits", id="1")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    message.raw_input_contents.append(np.array([1, 2], np.float32).tobytes())
    known.decode(message.SerializeToString())
    message.id, message.raw_input_contents[0] = "22", np.array([3, 4], np.float32).tobytes()
    payload = message.SerializeToString()
    found = known._templates.read(payload)
    assert found is not None
    assert (found.id, found.inputs["x"].tolist()) == ("22", [[3.0, 4.0]])
    # Read where it lies: no copy of the tensor is made.
    assert np.shares_memory(found.inputs["x"], np.frombuffer(payload, np.uint8))
