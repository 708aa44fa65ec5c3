"""The tree digest: one value that stands for everything a replica loads.

It is the SHA-256 of this text, with lines ended by one newline::

    penstock-tree-v1
    manifest <sha256 of the canonical manifest>
    <sha256> <size in bytes> <path>          one line per file, sorted by the path's UTF-8 bytes

written as "sha256:" and 64 hexadecimal digits. The canonical manifest is the JSON mapping of protobuf with
the proto's field names, keys sorted, no spaces, UTF-8, integers as strings, empty values left out, and
without `metrics` and `description`: both may be written after the fact, and neither changes what is
computed. A field added to the manifest later is left out while it is empty, so old digests stay true.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_NOT_PART_OF_IDENTITY = frozenset({"metrics", "description"})


def canonical_manifest(manifest: Message | Mapping[str, Any]) -> bytes:
    """Return the bytes that stand for a manifest in the tree digest.

    Args:
        manifest: `penstock.registry.v1.Manifest`, or its JSON mapping with the proto's field names.
    """
    fields = (
        MessageToDict(manifest, preserving_proto_field_name=True)
        if isinstance(manifest, Message)
        else manifest
    )
    kept = {key: value for key, value in fields.items() if key not in _NOT_PART_OF_IDENTITY}
    return json.dumps(_plain(kept), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def tree_digest(manifest: bytes, files: Iterable[tuple[str, int, str]]) -> str:
    """Return the digest of a bundle.

    Args:
        manifest: What `canonical_manifest` returned.
        files: (path, size in bytes, SHA-256 in hexadecimal) of every file, in any order.
    """
    digest = hashlib.sha256(b"penstock-tree-v1\n")
    digest.update(f"manifest {hashlib.sha256(manifest).hexdigest()}\n".encode())
    for path, size, sha256 in sorted(files, key=lambda file: file[0].encode()):
        digest.update(f"{sha256} {size} {path}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def files_digest(files: Iterable[tuple[str, int, str]]) -> str:
    """Return the digest of an artifact, which is files and nothing else.

    It is the SHA-256 of the line ``penstock-files-v1`` and the same lines for the files as in a tree digest.

    Args:
        files: (path, size in bytes, SHA-256 in hexadecimal) of every file, in any order.
    """
    digest = hashlib.sha256(b"penstock-files-v1\n")
    for path, size, sha256 in sorted(files, key=lambda file: file[0].encode()):
        digest.update(f"{sha256} {size} {path}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal. Blocking."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in plain.items() if item not in ("", "0", False, None, [], {})}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value
