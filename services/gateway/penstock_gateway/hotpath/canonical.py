"""What of a request decides its answer, as a key; and answers without their caller's id.

Two requests get the same key only if the replica cannot tell them apart but by what it repeats in the
answer and nothing else: the caller's id. Of a ModelInferRequest the name, the version and the id are left
out (the target says better what is asked), and of its parameters those about time and order. A JSON body
is taken whole: a caller who puts another id into each gets a key for each.
"""

from __future__ import annotations

import hashlib

from google.protobuf.message import DecodeError

from penstock.oip.v2.inference_pb2 import ModelInferRequest
from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC
from penstock_gateway.hotpath.scan import encode_varint
from penstock_kit.routing.table import Target

# SHA-256 takes 0.6 ms for it (with the processor's instructions), in which nobody else is served.
MAX_KEYED_BYTES = 1 << 20
# Parameters of a request that say when and in which order it is computed, not what.
_TIMING = ("timeout", "priority")
_ID = 0x1A
_PARAMETERS = 0x22
_ID_TAG = bytes((_ID,))


class Unusual(Exception):
    """A message of a form that no library writes; it is not worth a cache."""


def key_of(
    target: Target, name: str, payload_format: int, json_length: int, payload: bytes
) -> tuple[bytes, bytes] | None:
    """Return the key of a request to a target, and the caller's id; None if it shall have no key.

    Args:
        target: The version that answers.
        name: The model name as the caller wrote it, which the answer repeats.
        payload_format: How the payload is written.
        json_length: Length of its JSON part, where binary tensors follow it.
        payload: What the caller sent. For gRPC, the id comes back as its UTF-8 bytes; else it is empty,
            because it is a part of the key.
    """
    if len(payload) > MAX_KEYED_BYTES:
        return None
    request_id = parameters = b""
    rest: bytes = payload
    if payload_format == PAYLOAD_FORMAT_OIP_GRPC:
        try:
            request_id, parameters, rest = split(payload)
            if parameters:
                parameters = _deciding(parameters)
        except (Unusual, DecodeError):
            return None
    head = f"{target.queue}\0{target.digest}\0{name}\0{payload_format}\0{json_length}\0{len(parameters)}\0"
    key = hashlib.sha256(head.encode())
    key.update(parameters)
    key.update(rest)
    return key.digest(), request_id


def split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return id, parameters (with their tags) and the fields from the inputs on of a ModelInferRequest.

    Raises:
        Unusual: It is malformed, or has fields that this release does not know.
    """
    request_id = b""
    parameters: list[bytes] = []
    rest: list[bytes] = []
    begun = -1  # where the present row of fields from the inputs on began
    at, end = 0, len(data)
    while at < end:
        start = at
        tag, body, at = _field(data, at)
        if tag > _PARAMETERS:
            if begun < 0:
                begun = start
            continue
        if begun >= 0:
            rest.append(data[begun:start])
            begun = -1
        if tag == _ID:
            request_id = data[body:at]
        elif tag == _PARAMETERS:
            parameters.append(data[start:at])
    if begun >= 0:
        rest.append(data[begun:end])
    return request_id, b"".join(parameters), rest[0] if len(rest) == 1 else b"".join(rest)


def without_id(data: bytes) -> bytes:
    """Return a ModelInferResponse without its id.

    Raises:
        Unusual: It is malformed, or has fields that this release does not know.
    """
    rest: list[bytes] = []
    kept = at = 0
    end = len(data)
    while at < end:
        start = at
        tag, _, at = _field(data, at)
        if tag == _ID:
            rest.append(data[kept:start])
            kept = at
    rest.append(data[kept:])
    return b"".join(rest)


def with_id(data: bytes, request_id: bytes) -> bytes:
    """Return a ModelInferResponse (or a request) with this id: of several, the last one counts."""
    return b"".join((data, _ID_TAG, encode_varint(len(request_id)), request_id))


def _field(data: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, beginning of the body, and end of the field that begins at `at`."""
    tag = data[at]
    if tag & 7 != 2 or tag >= 0x80 or tag < 8:
        raise Unusual
    try:
        length = data[at + 1]
        at += 2
        if length >= 0x80:
            length &= 0x7F
            shift = 7
            while True:
                byte = data[at]
                at += 1
                length |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > 63:
                    raise Unusual
    except IndexError:
        raise Unusual from None
    if at + length > len(data):
        raise Unusual
    return tag, at, at + length


def _deciding(serialized: bytes) -> bytes:
    """Return the parameters that may decide the answer, in one order and unmistakably.

    Raises:
        DecodeError: They are malformed.
    """
    parts: list[bytes] = []
    parameters = ModelInferRequest.FromString(serialized).parameters
    for name in sorted(parameters):
        if name not in _TIMING:
            for part in (name.encode(), parameters[name].SerializeToString()):
                parts += (len(part).to_bytes(4, "big"), part)
    return b"".join(parts)
