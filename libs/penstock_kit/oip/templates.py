"""What repeats in serialized ModelInferRequests: all but the caller's id and the elements of the tensors.

A client sends the same model name, tensor names, datatypes and shapes again and again. A request is a
template with two kinds of holes:

    head (model name, version) · id · middle (parameters, inputs, outputs, length) · raw · length · raw …

One that fits a known template is read by comparing bytes; nothing in it is parsed but the id. Templates are
made of requests that were parsed and checked, so that what fits is as good as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from penstock_kit.oip.datatypes import OBJECT, Array
from penstock_kit.oip.request import Form, InferRequest, malformed

ID_TAG = 3 << 3 | 2
RAW_TAG = 7 << 3 | 2
_NAME_TAG, _VERSION_TAG = 1 << 3 | 2, 2 << 3 | 2
_LENGTH_DELIMITED = 2
_KEPT = 256


@dataclasses.dataclass(frozen=True, slots=True)
class _Template:
    """Offsets count from the end of the id."""

    middle: bytes
    gaps: tuple[tuple[int, bytes], ...]
    """What stands between the tensors: offset and bytes."""
    tensors: tuple[tuple[str, np.dtype[np.generic], int, int, tuple[int, ...]], ...]
    """In the signature's order: name, type, elements, offset, shape."""
    rows: int
    outputs: tuple[str, ...] | None
    parameters: dict[str, bool | int | float | str]


class Templates:
    """The templates of the requests to one version."""

    def __init__(self) -> None:
        # By the head and the number of bytes after the id.
        self._known: dict[tuple[bytes, int], _Template] = {}

    def read(self, payload: bytes) -> InferRequest | None:
        """Return what a request asks for; None if it fits no template.

        Raises:
            InvalidArgument: Its id is not UTF-8, which makes it no such message.
        """
        split = _split(payload)
        if split is None:
            return None
        at, end = split
        template = self._known.get((payload[:at], len(payload) - end))
        if template is None or not payload.startswith(template.middle, end):
            return None
        for offset, gap in template.gaps:
            if not payload.startswith(gap, end + offset):
                return None
        inputs: dict[str, Array] = {}
        for name, dtype, count, offset, shape in template.tensors:
            inputs[name] = np.frombuffer(payload, dtype, count, end + offset).reshape(shape)
        caller_id = ""
        if end > at + 2:
            try:
                caller_id = payload[at + 2 : end].decode()
            except UnicodeDecodeError as error:
                raise malformed("The body is not a serialized ModelInferRequest.") from error
        # By position: by name they take twice as long.
        return InferRequest(
            inputs,
            template.rows,
            Form.RAW,
            caller_id,
            template.outputs,
            frozenset(),
            False,
            template.parameters,
        )

    def learn(self, payload: bytes, names: Sequence[str], request: InferRequest) -> None:
        """Make a template of a request that was parsed, if it can be one.

        Args:
            payload: The message.
            names: Its inputs, in its order.
            request: What it asks for. Nobody changes its parameters, which all that follow share.
        """
        split = _split(payload)
        if split is None or request.form is not Form.RAW:
            return
        at, end = split
        fields = list(walk(payload))
        tags = [tag for tag, _, _, _ in fields]
        raws = [(start, value, stop) for tag, start, value, stop in fields if tag == RAW_TAG]
        ids = [(start, stop) for tag, start, _, stop in fields if tag == ID_TAG]
        # As protobuf's own writers have it: in order, the tensors last, and the id where it is looked for.
        if tags != sorted(tags) or not raws or tags[-1] != RAW_TAG or ids not in ([], [(at, end)]):
            return
        if tags.count(_NAME_TAG) > 1 or tags.count(_VERSION_TAG) > 1 or len(raws) != len(names):
            return
        if any(array.dtype == OBJECT for array in request.inputs.values()):
            return
        starts = {name: value - end for name, (_, value, _) in zip(names, raws, strict=True)}
        template = _Template(
            middle=payload[end : raws[0][1]],
            gaps=tuple((start - end, payload[start:value]) for start, value, _ in raws[1:]),
            tensors=tuple(
                (name, array.dtype, array.size, starts[name], array.shape)
                for name, array in request.inputs.items()
            ),
            rows=request.rows,
            outputs=request.outputs,
            parameters=request.parameters,
        )
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[payload[:at], len(payload) - end] = template


def walk(payload: bytes | memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Walk over the fields of a serialized message: tag, where it starts, where its value starts and ends.

    Raises:
        DecodeError, IndexError: The message is cut short or no protobuf message.
    """
    at, end = 0, len(payload)
    while at < end:
        start = at
        tag, value = read_varint(payload, at)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            length, value = read_varint(payload, value)
            at = value + length
        elif kind == 0:
            _, at = read_varint(payload, value)
        elif kind in (1, 5):
            at = value + (8 if kind == 1 else 4)
        else:
            raise DecodeError("Unknown wire type.")
        if at > end:
            raise DecodeError("Truncated message.")
        yield tag, start, value, at


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it.

    Raises:
        DecodeError, IndexError: There is none.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise DecodeError("A number is too long.")


def _split(payload: bytes) -> tuple[int, int] | None:
    """Return where the id begins (with its tag) and ends, both the same if there is none."""
    at = 0
    try:
        if payload[0] == _NAME_TAG:
            length = payload[1]
            if length >= 0x80:
                return None
            at = length + 2
        if payload[at] == _VERSION_TAG:
            length = payload[at + 1]
            if length >= 0x80:
                return None
            at += length + 2
        if payload[at] != ID_TAG:
            return at, at
        length = payload[at + 1]
    except IndexError:
        return None
    return None if length >= 0x80 else (at, at + 2 + length)
