"""A few members of a large JSON object, read without reading the rest.

Python's JSON reader would take a second for 64 MiB, and nobody else is served meanwhile: not on a thread
either, as it holds the interpreter all the while. Here the object is stepped through from string to string,
a slice in each turn of the loop; what lies between strings is only searched for brackets. Whether the whole
is well-formed is the replica's to judge, which reads it anyway.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from penstock_kit.errors import InvalidArgument, Reason

# Two milliseconds or so: bytes searched for brackets, and in such bytes what else is done.
_SLICE_BYTES = 2 << 20
_BYTES_A_STRING = 1000
_BYTES_A_MATCHED = 16
# Names and versions are short; a longer value is none that anybody looks for.
_LONGEST_VALUE = 4096
_SPACE = b" \t\r\n"
_VALUE = re.compile(rb'[ \t\r\n]*("(?:[^"\\]|\\.)*"|[^ \t\r\n",\[\]{}]+)')
# Strings in a row with no brackets between them; possessive, so that nothing is remembered for going back.
_MORE_STRINGS = re.compile(rb'(?:[^"\[\]{}]*+"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_COLON, _BACKSLASH = b":\\"


async def members(data: bytes, wanted: Collection[str]) -> dict[str, Any]:
    """Return those of the wanted members that a JSON object has; of repeated ones the last.

    A member whose value is an object or a list comes back as an empty list: it is there, and no text.

    Raises:
        InvalidArgument: A string of the object does not end, or a wanted member cannot be read.
    """
    found: dict[str, Any] = {}
    for member in _walk(data, frozenset(wanted)):
        if member is None:
            await asyncio.sleep(0)
        else:
            found[member[0]] = member[1]
    return found


def _walk(data: bytes, wanted: frozenset[str]) -> Iterator[tuple[str, Any] | None]:
    """Give the wanted members, and None after each slice."""
    depth = at = spent = 0
    end = len(data)
    while at < end:
        quote = data.find(b'"', at, at + _SLICE_BYTES)
        until = quote if quote >= 0 else min(at + _SLICE_BYTES, end)
        depth += data.count(b"{", at, until) + data.count(b"[", at, until)
        depth -= data.count(b"}", at, until) + data.count(b"]", at, until)
        spent += until - at
        at = until
        if quote >= 0:
            at = _string_end(data, quote)
            spent += _BYTES_A_STRING
            if depth == 1:
                name = _name(data, quote, at, wanted)
                if name is not None:
                    value, at = _value(data, at)
                    yield name, value
            elif depth > 1 and (more := _MORE_STRINGS.match(data, at, at + _SLICE_BYTES // _BYTES_A_MATCHED)):
                spent += (more.end() - at) * _BYTES_A_MATCHED
                at = more.end()
        if spent >= _SLICE_BYTES:
            spent = 0
            yield None


def _string_end(data: bytes, quote: int) -> int:
    """Return where the string that begins with this quote has ended."""
    at = quote + 1
    while True:
        at = data.find(b'"', at)
        if at < 0:
            raise InvalidArgument(
                "The body is not JSON: a string does not end.", reason=Reason.MALFORMED_BODY
            )
        before = at - 1
        while data[before] == _BACKSLASH:
            before -= 1
        at += 1
        if (at - before) % 2 == 0:  # an even number of backslashes stands before it
            return at


def _name(data: bytes, quote: int, end: int, wanted: frozenset[str]) -> str | None:
    """Return the name of a wanted member; None if the string is a value, or another one's name."""
    if end - quote > _LONGEST_VALUE:
        return None
    at = end
    while at < len(data) and data[at] in _SPACE:
        at += 1
    if at >= len(data) or data[at] != _COLON:
        return None
    name = _read(data[quote:end])
    return name if name in wanted else None


def _value(data: bytes, end: int) -> tuple[Any, int]:
    """Return the value after a name, and where it ends; [] for what is no text and no number."""
    at = data.index(b":", end) + 1
    match = _VALUE.match(data, at, at + _LONGEST_VALUE)
    if match is None:
        return [], at
    return _read(match[1]), match.end()


def _read(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"The body is not JSON: {error}.", reason=Reason.MALFORMED_BODY) from None
