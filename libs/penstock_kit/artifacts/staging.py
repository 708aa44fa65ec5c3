"""Uploads that are not complete yet: files on the local disk that grow from their beginning."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

from penstock_kit.artifacts.storage_errors import storage_errors, storage_full
from penstock_kit.artifacts.store import BlobStore
from penstock_kit.errors import Aborted, InvalidArgument, Reason
from penstock_kit.threads import in_thread

_READ_BYTES = 1024 * 1024


class PartialFile:
    """One file of which some bytes, always from the beginning on, have arrived.

    Several calls may write to it at once: a byte is taken from whoever sends it first, and what has
    arrived already is skipped. So a retry that overlaps a call which has not noticed its end is harmless.
    Whether the bytes are right is decided once, by the SHA-256 of the whole.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        self.path = path
        self.size = size
        self.sha256 = sha256
        self.received = 0
        self.finished = False
        self.users = 0
        self._handle = -1
        self._digest = hashlib.sha256()
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Open or make the file, and take up the digest where an earlier upload left it.

        Raises:
            Aborted: Another process is receiving the file.
            ResourceExhausted: The rest cannot fit on the disk.
        """
        async with self._lock:
            if self._handle < 0:
                with storage_errors():
                    await in_thread(self._open)

    async def write(self, offset: int, chunk: bytes) -> int:
        """Take a chunk that belongs at `offset`; return the offset after it.

        Raises:
            InvalidArgument: It lies beyond what has arrived, or beyond the announced size.
            ResourceExhausted: The disk is full; what arrived before is kept.
        """
        async with self._lock:
            end = offset + len(chunk)
            if end > self.size:
                raise InvalidArgument(
                    f"More bytes came than the {self.size} announced; the rest was refused. Push again.",
                    reason=Reason.BUNDLE_CORRUPT,
                )
            if self.finished:
                return end
            if offset > self.received:
                raise beyond(offset, self.received)
            if end > self.received:
                with storage_errors():
                    await in_thread(self._append, memoryview(chunk)[self.received - offset :])
            return end

    async def finish(self, store: BlobStore) -> None:
        """Check the digest of the whole and hand the file over to the store. May be called twice.

        Raises:
            InvalidArgument: The bytes are not those announced; all are forgotten.
            ResourceExhausted: The store is full; the bytes are kept here.
        """
        async with self._lock:
            if self.finished:
                return
            if self.received != self.size:
                raise InvalidArgument(
                    f"The upload ended after {self.received} of {self.size} bytes; continue from there.",
                    reason=Reason.BUNDLE_CORRUPT,
                    metadata={"received_bytes": str(self.received)},
                )
            found = self._digest.hexdigest()
            if found != self.sha256:
                with storage_errors():
                    await in_thread(self._forget)
                raise InvalidArgument(
                    f"The bytes received have SHA-256 {found}, announced was {self.sha256}; "
                    "they were discarded. Push again.",
                    reason=Reason.BUNDLE_CORRUPT,
                    metadata={"received_sha256": found, "announced_sha256": self.sha256},
                )
            with storage_errors():
                await in_thread(os.fsync, self._handle)
            await store.adopt(self.path, self.sha256)
            self.finished = True

    def close(self) -> None:
        """Let go of the file; what arrived stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Aborted(
                    "Another registry process is receiving this file now; retry shortly.",
                    reason=Reason.CONFLICT,
                    retry_after_seconds=1.0,
                ) from error
            received = os.fstat(handle).st_size
            if received > self.size:
                os.ftruncate(handle, 0)
                received = 0
            if shutil.disk_usage(self.path.parent).free < self.size - received:
                raise storage_full(self.size - received, self.path.parent)
            digest = hashlib.sha256()
            position = 0
            while position < received:
                piece = os.pread(handle, _READ_BYTES, position)
                if not piece:
                    break
                digest.update(piece)
                position += len(piece)
        except BaseException:
            os.close(handle)
            raise
        self._handle, self._digest, self.received = handle, digest, position

    def _append(self, chunk: memoryview) -> None:
        written = 0
        try:
            while written < len(chunk):
                written += os.pwrite(self._handle, chunk[written:], self.received + written)
        except OSError:
            # Keep the file as long as what was hashed.
            os.ftruncate(self._handle, self.received)
            raise
        self._digest.update(chunk)
        self.received += len(chunk)

    def _forget(self) -> None:
        os.ftruncate(self._handle, 0)
        self._digest = hashlib.sha256()
        self.received = 0


class Staging:
    """The folder of partial files.

    Args:
        folder: Made when first needed. Best on the file system of the blobs: then completing is a rename.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, PartialFile] = {}

    def received(self, key: str) -> int:
        """Return how many bytes of a file have arrived; 0 if none."""
        open_file = self._open.get(key)
        if open_file is not None:
            return open_file.received
        with contextlib.suppress(OSError):
            return (self._folder / key).stat().st_size
        return 0

    @contextlib.asynccontextmanager
    async def partial(self, key: str, size: int, sha256: str) -> AsyncIterator[PartialFile]:
        """Open the partial file `key`, shared with every other call that has it open.

        Args:
            key: A file name; one for each file of each version.
            size: Announced size in bytes.
            sha256: Announced digest in hexadecimal.

        Raises:
            Aborted: Another process is receiving it.
            ResourceExhausted: The rest cannot fit on the disk.
        """
        file = self._open.get(key)
        if file is None:
            file = self._open[key] = PartialFile(self._folder / key, size, sha256)
        file.users += 1
        try:
            await file.open()
            yield file
        finally:
            file.users -= 1
            if file.users == 0:
                file.close()
                self._open.pop(key, None)

    def discard(self, key: str) -> None:
        """Forget what arrived of a file that nobody is uploading."""
        if key not in self._open:
            with contextlib.suppress(OSError):
                (self._folder / key).unlink(missing_ok=True)

    def discard_older_than(self, seconds: float) -> int:
        """Forget files that nobody wrote to for so long; return how many. Blocking."""
        limit = time.time() - seconds
        count = 0
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.name not in self._open and path.stat().st_mtime < limit:
                        path.unlink()
                        count += 1
        return count


def beyond(offset: int, received: int) -> InvalidArgument:
    """Return the error of an upload that would leave a hole."""
    return InvalidArgument(
        f"offset {offset} lies beyond the {received} bytes received; continue from there.",
        metadata={"received_bytes": str(received)},
    )
