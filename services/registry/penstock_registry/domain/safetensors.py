"""Whether a file is one of safetensors: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

from penstock_kit.errors import InvalidArgument, Reason

# The library's own limit.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


def check_safetensors(file: BinaryIO, path: str, size: int) -> None:
    """Return if the file's header describes all of its bytes, each once.

    Args:
        file: The file.
        path: Its path in the bundle.
        size: Its size in bytes.

    Raises:
        InvalidArgument: It does not; reason MANIFEST_MISMATCH.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise _mismatch(path, "its header is longer than the file")
    try:
        header = json.loads(file.read(length))
        spans = sorted(_span(entry) for name, entry in header.items() if name != _METADATA)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _mismatch(path, "its header is not one of tensors") from error
    end = 0
    for begin, stop in spans:
        if begin != end or stop < begin:
            raise _mismatch(path, "its tensors overlap or leave gaps")
        end = stop
    if end != size - _LENGTH_BYTES - length:
        raise _mismatch(path, "its tensors are not as long as the file")


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    begin, stop = entry["data_offsets"]
    if not isinstance(begin, int) or not isinstance(stop, int) or not isinstance(entry["shape"], list):
        raise TypeError(entry)
    return begin, stop


def _mismatch(path: str, words: str) -> InvalidArgument:
    return InvalidArgument(
        f"{path!r} is no file of safetensors: {words}.",
        reason=Reason.MANIFEST_MISMATCH,
        metadata={"path": path},
    )
