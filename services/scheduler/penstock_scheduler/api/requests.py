"""Keys of callers that make a retry safe."""

from __future__ import annotations

import hashlib

from google.protobuf.message import Message

from penstock_kit.errors import InvalidArgument

MAX_REQUEST_ID = 128


def request_id(text: str) -> str:
    """Returns the key.

    Raises:
        InvalidArgument: it is too long or cannot be printed.
    """
    if len(text) > MAX_REQUEST_ID or not text.isprintable():
        raise InvalidArgument(
            f"request_id must be at most {MAX_REQUEST_ID} printable characters, such as a UUID.",
            metadata={"field": "request_id"},
        )
    return text


def fingerprint(request: Message) -> str:
    """What a request asks for, in short: a repeated request_id must ask for the same."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("request_id")
    kind = type(request).__name__.encode()
    return hashlib.blake2b(kind + content.SerializeToString(deterministic=True), digest_size=16).hexdigest()
