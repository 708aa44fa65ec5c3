"""Uploads under way, as partial files on the local disk."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from penstock_kit.artifacts.staging import PartialFile, Staging
from penstock_kit.artifacts.store import BlobStore
from penstock_registry.usecases.ports import Receiver, Upload


class StagedUpload:
    """See `usecases.ports.Upload`."""

    def __init__(self, file: PartialFile, blobs: BlobStore) -> None:
        self._file = file
        self._blobs = blobs

    @property
    def received(self) -> int:
        """Bytes that have arrived."""
        return self._file.received

    async def write(self, offset: int, chunk: bytes) -> int:
        """Take a chunk; return the offset after it."""
        return await self._file.write(offset, chunk)

    async def complete(self) -> None:
        """Check the whole and store it as a blob."""
        await self._file.finish(self._blobs)


class StagedUploads:
    """See `usecases.ports.Uploads`. A file's key is its receiver's and a digest of its path."""

    def __init__(self, staging: Staging, blobs: BlobStore) -> None:
        self._staging = staging
        self._blobs = blobs

    def received(self, receiver: Receiver, path: str) -> int:
        """Return how many bytes have arrived."""
        return self._staging.received(_key(receiver, path))

    @asynccontextmanager
    async def open(self, receiver: Receiver, path: str) -> AsyncIterator[Upload]:
        """Take up an upload where it ended."""
        file = receiver.file(path)
        if file is None:
            raise ValueError(f"{receiver.name} has no file {path!r}")
        async with self._staging.partial(_key(receiver, path), file.size_bytes, file.sha256) as partial:
            yield StagedUpload(partial, self._blobs)

    def discard(self, receiver: Receiver) -> None:
        """Forget what arrived."""
        for file in receiver.files:
            self._staging.discard(_key(receiver, file.path))


def _key(receiver: Receiver, path: str) -> str:
    return f"{receiver.upload_key}-{hashlib.sha256(path.encode()).hexdigest()[:32]}.part"
