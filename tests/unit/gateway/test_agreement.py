"""When two answers to one request agree."""

import json
import math
from typing import Any

import numpy as np
import pytest

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import (
    PAYLOAD_FORMAT_OIP_GRPC,
    PAYLOAD_FORMAT_OIP_REST,
    PAYLOAD_FORMAT_PREDICT,
)
from penstock.tensors import encode
from penstock_gateway.domain.agreement import Output, same_arrays, same_outputs, same_trees
from penstock_gateway.hotpath.answers import agree

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize(
    ("first", "second", "tolerance", "agreed"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, True),
        ([100.0], [101.0], 0.01, True),
        ([100.0], [102.0], 0.01, False),
        ([-100.0], [-101.0], 0.01, True),
        ([100.0], [-100.0], 0.5, False),
        ([0.0], [-0.0], 0.0, True),
        ([0.0], [0.001], 0.5, False),
        ([NAN, 1.0], [NAN, 1.0], 0.0, True),
        ([NAN], [1.0], 0.5, False),
        ([1.0], [NAN], 0.5, False),
        ([INF], [INF], 0.0, True),
        ([INF], [-INF], 1.0, False),
        ([INF], [1.0], 1.0, False),
        ([], [], 0.0, True),
    ],
)
def test_fractions_agree_within_the_tolerance_relative_to_the_larger(
    dtype: str, first: list[float], second: list[float], tolerance: float, agreed: bool
) -> None:
    a, b = np.array(first, dtype), np.array(second, dtype)
    assert same_arrays(a, b, tolerance) is agreed
    assert same_arrays(b, a, tolerance) is agreed
    assert same_trees(first, second, tolerance) is agreed


@pytest.mark.parametrize("dtype", ["?", "u1", "<i4", "<i8", "<u8"])
def test_whole_numbers_must_be_equal_whatever_the_tolerance(dtype: str) -> None:
    a = np.array([0, 1], dtype)
    assert same_arrays(a, a.copy(), 0.0)
    assert not same_arrays(a, np.array([1, 1], dtype), 1.0)


def test_the_largest_integers_are_not_taken_for_fractions() -> None:
    a, b = np.array([2**63 - 1]), np.array([2**63 - 2])
    assert not same_arrays(a, b, 0.1)
    assert not same_trees([2**63 - 1], [2**63 - 2], 0.1)


def test_the_last_of_very_many_elements_counts() -> None:
    a = np.ones(200_001, np.float32)
    b = a.copy()
    assert same_arrays(a, b, 0.0)
    b[-1] = 2
    assert not same_arrays(a, b, 0.1)


def test_bytes_must_be_equal() -> None:
    a = np.array([b"cat", b"dog"], object)
    assert same_arrays(a, np.array([b"cat", b"dog"], object), 0.0)
    assert not same_arrays(a, np.array([b"cat", b"cow"], object), 1.0)


def out(name: str, values: Any, datatype: str = "FP32", shape: tuple[int, ...] = (1, 2)) -> Output:
    return Output(name, datatype, shape, values)


def test_names_datatypes_and_shapes_must_be_the_same_and_their_order_need_not() -> None:
    y, z = out("y", [1.0, 2.0]), out("z", [3.0, 4.0])
    assert same_outputs([y, z], [z, y], 0.0)
    assert not same_outputs([y], [y, z], 0.0)
    assert not same_outputs([y], [y._replace(name="x")], 1.0)
    assert not same_outputs([y], [y._replace(datatype="FP64")], 1.0)
    assert not same_outputs([y], [y._replace(shape=(2, 1))], 1.0)


def test_a_fraction_without_a_point_is_a_fraction_where_the_datatype_says_so() -> None:
    assert same_outputs([out("y", [100, 1])], [out("y", [101, 1])], 0.01)
    assert not same_outputs([out("y", [100, 1], "INT64")], [out("y", [101, 1], "INT64")], 0.01)


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [
        ({"a": [1, "x"]}, {"a": [1, "x"]}, True),
        ({"a": 1}, {"b": 1}, False),
        ([1, 2], [1], False),
        ([1], [[1]], False),
        ([True], [1], False),
        ([None], [None], True),
        ([None], [0], False),
        (["1"], [1], False),
        ([1.0], [1], True),
        ([10**400], [1.5], False),
    ],
)
def test_json_agrees_if_its_structure_does(first: Any, second: Any, agreed: bool) -> None:
    assert same_trees(first, second, 0.1) is agreed
    assert same_trees(second, first, 0.1) is agreed


def message(version: str, values: np.ndarray[Any, Any], datatype: str, *, typed: bool = False) -> bytes:
    made = oip.ModelInferResponse(model_name="m", model_version=version, id=version)
    tensor = made.outputs.add(name="y", datatype=datatype, shape=values.shape)
    if typed:
        tensor.contents.fp32_contents.extend(values.ravel().tolist())
    else:
        made.raw_output_contents.append(encode(values, datatype))
    return made.SerializeToString()


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_answers_in_protobuf_agree_whoever_made_them(datatype: str) -> None:
    dtype = {"FP16": "f2", "FP64": "f8"}.get(datatype, "f4")
    a = message("1", np.array([[1.0, 64.0]], dtype), datatype)
    b = message("2", np.array([[1.0, 65.0]], dtype), datatype)
    assert agree(PAYLOAD_FORMAT_OIP_GRPC, (a, 0), (b, 0), 0.05) is True
    assert agree(PAYLOAD_FORMAT_OIP_GRPC, (a, 0), (b, 0), 0.001) is False


def test_tensors_in_typed_form_are_compared_too() -> None:
    values = np.array([[1.0, 2.0]], np.float32)
    a, b = (message(v, values, "FP32", typed=True) for v in "12")
    assert agree(PAYLOAD_FORMAT_OIP_GRPC, (a, 0), (b, 0), 0.0) is True


def rest(values: list[float], *, binary: bool) -> tuple[bytes, int]:
    tensor: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": [1, len(values)]}
    tail = b""
    if binary:
        tail = np.array(values, np.float32).tobytes()
        tensor["parameters"] = {"binary_data_size": len(tail)}
    else:
        tensor["data"] = values
    head = json.dumps({"model_name": "m", "model_version": str(len(tail)), "outputs": [tensor]}).encode()
    return head + tail, len(head) if binary else 0


@pytest.mark.parametrize("binary", [False, True])
def test_answers_in_json_agree_also_with_binary_tensors(binary: bool) -> None:
    a = rest([1.0, NAN], binary=binary)
    assert agree(PAYLOAD_FORMAT_OIP_REST, a, rest([1.01, NAN], binary=binary), 0.02) is True
    assert agree(PAYLOAD_FORMAT_OIP_REST, a, rest([1.1, NAN], binary=binary), 0.02) is False


def test_who_answers_in_another_form_does_not_agree() -> None:
    a, b = rest([1.0, 2.0], binary=True), rest([1.0, 2.0], binary=False)
    assert agree(PAYLOAD_FORMAT_OIP_REST, a, b, 0.0) is False


def test_plain_answers_are_compared_but_for_who_made_them() -> None:
    a = json.dumps({"output_data": [1.0], "model_version": "1"}).encode()
    b = json.dumps({"output_data": [1.0], "model_version": "2"}).encode()
    assert agree(PAYLOAD_FORMAT_PREDICT, (a, 0), (b, 0), 0.0) is True


@pytest.mark.parametrize("form", [PAYLOAD_FORMAT_OIP_GRPC, PAYLOAD_FORMAT_OIP_REST, PAYLOAD_FORMAT_PREDICT])
@pytest.mark.parametrize(
    "junk", [b"\xff\xff", b"[]", b'{"outputs": 3}', b'{"outputs": [{}]}', b"[" * 100_000]
)
def test_an_answer_that_cannot_be_read_agrees_with_none_and_the_callers_own_says_nothing(
    form: int, junk: bytes
) -> None:
    good = {
        PAYLOAD_FORMAT_OIP_GRPC: message("1", np.ones((1, 1), np.float32), "FP32"),
        PAYLOAD_FORMAT_OIP_REST: rest([1.0], binary=False)[0],
        PAYLOAD_FORMAT_PREDICT: b'{"output_data": [1]}',
    }[form]
    assert agree(form, (good, 0), (junk, 0), 1.0) is False
    assert agree(form, (junk, 0), (good, 0), 1.0) is not True
