"""Messages between an agent and its fork server: a length (4 bytes, little endian) and JSON.

Agent to server:

    {"op": "fork", "id": …, "config": "<ReplicaConfig as JSON>", "title": …, "env": {…}, "rlimits": {…}}
        followed in the same write by two file descriptors: status pipe, log file
        with "entry": "module:function" that is called with the config as it is, not with a ReplicaConfig
    {"op": "signal", "id": …, "signal": 15}     9 goes to the whole process group

Server to agent:

    {"op": "ready", "pid": …, "threads": 1, "seconds": 2.1, "preloaded": {module: "" or its error}}
    {"op": "warm", "seconds": 3.2, "preloaded": {as above}}     when all is warmed up, once
    {"op": "started", "id": …, "pid": …} or {"op": "refused", "id": …, "error": …}
    {"op": "exited", "id": …, "pid": …, "status": 0 or null, "signal": null or 9, "peak_memory_bytes": …}

`id` is the consumer name of a process (`<replica>.<incarnation>`), which is never used twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

FDS_PER_FORK = 2
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct("<I")

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """Return the frame of a message.

    Raises:
        ValueError: it is longer than MAX_MESSAGE_BYTES.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"A message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}.")
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete after `data`.

        Raises:
            ValueError: the stream is not made of such frames; it cannot be read any further.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"A frame announces {length} bytes; the limit is {MAX_MESSAGE_BYTES}.")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            message = json.loads(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
            if not isinstance(message, dict):
                raise ValueError("A frame holds JSON that is not an object.")
            yield message
