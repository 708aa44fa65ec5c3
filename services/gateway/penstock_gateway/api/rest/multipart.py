"""Uploaded files as input: multipart/form-data into a body of /predict (RFC 7578, RFC 2046).

A part with a file name is bytes, and goes to an input of datatype BYTES; any other part is text, and goes
in as JSON. Parts called `input_data` or `file` are for the only input, others for the input of their name.
Several files under one name are rows. As everywhere in this room, nothing large is done in one go: others
are served between.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value

from penstock_gateway.api.rest.http import dumps, loads
from penstock_kit.errors import InvalidArgument, Reason
from penstock_kit.routing.model import Description, Tensor

MULTIPART = "multipart/form-data"
_MAX_PARTS = 256
_MAX_HEAD_BYTES = 8 << 10
# A multiple of three, so that base64 of the slices is base64 of the whole.
_SLICE_BYTES = 3 << 20
# Names of parts for the only input.
_ONLY = ("input_data", "file")
_ADDRESS = ("model_name", "model_version")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an upload; a file if it came with a file's name."""

    name: str
    content: bytes
    file: bool


async def read_parts(data: bytes, content_type: bytes) -> list[Part]:
    """Return the parts of a body.

    Raises:
        InvalidArgument: It is not of that form, or has too many parts.
    """
    boundary = _headers(b"content-type: " + content_type).get_param("boundary")
    if not isinstance(boundary, str) or not boundary or not boundary.isascii() or len(boundary) > 70:
        raise _malformed("its content-type gives no boundary")
    first = b"--" + boundary.encode()
    delimiter = b"\r\n" + first
    at = 0 if data.startswith(first) else await _find(data, delimiter, 0) + 2
    if at == 1:
        raise _malformed("its boundary is not in it")
    parts: list[Part] = []
    at += len(first)
    while data[at : at + 2] != b"--":
        if len(parts) == _MAX_PARTS:
            raise _malformed(f"it has more than {_MAX_PARTS} parts")
        begin = data.find(b"\r\n", at, at + _MAX_HEAD_BYTES)
        middle = data.find(b"\r\n\r\n", at, at + _MAX_HEAD_BYTES)
        end = await _find(data, delimiter, max(middle, at))
        if begin < 0 or middle < 0 or end < 0:
            raise _malformed("a part is cut short")
        # Where a part is empty, its delimiter may begin within the line that ends its headers.
        parts.append(_part(data[begin + 2 : middle], data[min(middle + 4, end) : end]))
        at = end + len(delimiter)
    return parts


def _part(head: bytes, content: bytes) -> Part:
    headers = _headers(head)
    name = headers.get_param("name", header="content-disposition")
    if not isinstance(name, str | tuple):
        raise _malformed("a part has no name")
    file = headers.get_param("filename", header="content-disposition") is not None
    return Part(collapse_rfc2231_value(name), content, file)


def _headers(head: bytes) -> Message:
    # RFC 7578: names are UTF-8, as they are.
    return HeaderParser().parsestr(head.decode("utf-8", "replace"))


def address(parts: Sequence[Part]) -> dict[str, str]:
    """Return name and version, as far as the parts give them.

    Raises:
        InvalidArgument: One of them is not UTF-8.
    """
    return {part.name: _text(part) for part in parts if part.name in _ADDRESS}


async def to_predict(parts: Sequence[Part], model_name: str, description: Description) -> bytes:
    """Return what was uploaded as a body of /predict.

    Raises:
        InvalidArgument: There is no input, a text is no JSON, or an input does not take files.
    """
    inputs: dict[str, list[Part]] = {}
    for part in parts:
        if part.name not in _ADDRESS:
            inputs.setdefault(part.name, []).append(part)
    if not inputs:
        raise InvalidArgument("No part has input: call one input_data or file, or like an input.")
    tensors = {tensor.name: tensor for tensor in description.inputs}
    only = description.inputs[0] if len(tensors) == 1 else None
    if len(inputs) == 1 and (name := next(iter(inputs))) in _ONLY and name not in tensors:
        if only is None and inputs[name][0].file:
            raise InvalidArgument(
                f"The model takes several inputs: call the parts {', '.join(tensors) or 'like them'}."
            )
        value = await _value(inputs[name], only, description)
    else:
        members = []
        for name, given in inputs.items():
            members.append(dumps(name) + b":" + await _value(given, tensors.get(name), description))
        value = b"{" + b",".join(members) + b"}"
    return b"".join((b'{"model_name":', dumps(model_name), b',"input_data":', value, b"}"))


async def _value(parts: Sequence[Part], tensor: Tensor | None, description: Description) -> bytes:
    """Return the JSON of one input."""
    if not parts[0].file:
        if len(parts) > 1:
            raise InvalidArgument(f"The part {parts[0].name!r} is given twice.")
        return dumps(loads(_text(parts[0])))
    if tensor is None or tensor.datatype != "BYTES":
        what = "is no input of the model" if tensor is None else f"takes {tensor.datatype}"
        raise InvalidArgument(
            f"{parts[0].name!r} {what}; a file can only be given to an input of datatype BYTES.",
            reason=Reason.INVALID_TENSOR,
            metadata={"input": parts[0].name},
        )
    files = [b'{"b64":"' + await _base64(part.content) + b'"}' for part in parts]
    rank = len(tensor.shape)
    batched = description.max_batch_size > 0
    inner = max(rank - 1, 0)
    if batched:  # each file is a row; one alone is given without the batch dimension
        rows = [b"[" * inner + file + b"]" * inner for file in files]
        return rows[0] if len(rows) == 1 else b"[" + b",".join(rows) + b"]"
    if not rank:
        return files[0]
    return b"[" * rank + b",".join(files) + b"]" * rank


def _text(part: Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError:
        raise _malformed(f"the part {part.name!r} is neither a file nor UTF-8") from None


async def _find(data: bytes, wanted: bytes, at: int) -> int:
    while at < len(data):
        found = data.find(wanted, at, at + _SLICE_BYTES + len(wanted) - 1)
        if found >= 0:
            return found
        at += _SLICE_BYTES
        await asyncio.sleep(0)
    return -1


async def _base64(data: bytes) -> bytes:
    if len(data) <= _SLICE_BYTES:
        return binascii.b2a_base64(data, newline=False)
    view = memoryview(data)
    parts = []
    for at in range(0, len(data), _SLICE_BYTES):
        parts.append(binascii.b2a_base64(view[at : at + _SLICE_BYTES], newline=False))
        await asyncio.sleep(0)
    return b"".join(parts)


def _malformed(why: str) -> InvalidArgument:
    return InvalidArgument(f"The body is not multipart/form-data: {why}.", reason=Reason.MALFORMED_BODY)
