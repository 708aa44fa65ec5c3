"""Compares answers as replicas write them. Off the event loop, and off the caller's path: it decodes.

Imported when the first copy of a request is answered: a gateway without shadows needs no numpy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from penstock.errors import PenstockError
from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, PAYLOAD_FORMAT_OIP_REST
from penstock.tensors import Prediction, decode
from penstock_gateway.domain.agreement import Array, Output, same_outputs, same_trees

# What of an answer says who made it, not what was computed.
_MAKERS = ("model_name", "model_version", "id")
# What comes of reading something else as an answer.
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    DecodeError,
    PenstockError,
)


def agree(
    payload_format: int, first: tuple[bytes, int], second: tuple[bytes, int], tolerance: float
) -> bool | None:
    """Return whether a shadow's answer agrees with the one that its caller got.

    Args:
        payload_format: How both are written.
        first: The caller's: payload, and the length of its JSON part where binary tensors follow it.
        second: The shadow's.
        tolerance: How far fractions may differ, relative to the larger.

    Returns:
        None if the caller's own answer cannot be read, so that nothing can be said.
    """
    if first == second:
        return True
    if payload_format == PAYLOAD_FORMAT_OIP_GRPC and _same_bits(first[0], second[0]):
        return True
    try:
        ours = _read(payload_format, *first)
    except _UNREADABLE:
        return None
    try:
        theirs = _read(payload_format, *second)
    except _UNREADABLE:
        return False
    if isinstance(ours, list) and isinstance(theirs, list):
        return same_outputs(ours, theirs, tolerance)
    return same_trees(ours, theirs, tolerance)


def _same_bits(first: bytes, second: bytes) -> bool:
    """Return whether two messages have the same outputs bit by bit: most have, and are done with quickly."""
    try:
        a, b = oip.ModelInferResponse.FromString(first), oip.ModelInferResponse.FromString(second)
    except DecodeError:
        return False
    same: bool = a.raw_output_contents == b.raw_output_contents and a.outputs == b.outputs
    return same and len({one.name for one in a.outputs}) == len(a.outputs) > 0


def _read(payload_format: int, payload: bytes, json_length: int) -> Any:
    """Return a list of outputs; for forms that do not name them, what the JSON holds."""
    if payload_format == PAYLOAD_FORMAT_OIP_GRPC:
        response = oip.ModelInferResponse.FromString(payload)
        arrays = Prediction(response)
        if len(arrays) != len(response.outputs):
            raise ValueError("two outputs have one name")
        return [
            Output(one.name, one.datatype, tuple(one.shape), _plain(arrays[one.name], one.datatype))
            for one in response.outputs
        ]
    document = json.loads(payload[: json_length or len(payload)])
    if payload_format == PAYLOAD_FORMAT_OIP_REST:
        return list(_outputs(document["outputs"], payload[json_length:] if json_length else b""))
    return {key: value for key, value in document.items() if key not in _MAKERS}


def _outputs(outputs: list[dict[str, Any]], binary: bytes) -> Iterator[Output]:
    """Give the outputs of an answer in OIP's REST form."""
    at = 0
    for one in outputs:
        name, datatype, shape = one["name"], one["datatype"], tuple(one["shape"])
        size = one.get("parameters", {}).get("binary_data_size")
        if size is None:
            yield Output(name, datatype, shape, one["data"])
        else:
            values = decode(binary[at : at + size], datatype, shape)
            yield Output(name, datatype, shape, _plain(values, datatype))
            at += size


def _plain(values: Array, datatype: str) -> Array:
    """Return an array that numpy can reckon with, also where it has no such type itself."""
    return values.astype(np.float32) if datatype == "BF16" else values
