"""Blobs by the SHA-256 of their contents, in a local folder or an object store.

A blob lies at `blobs/sha256/ab/abcd…`. It appears there at once and whole, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from penstock_kit.artifacts.storage_errors import storage_errors, translate_storage
from penstock_kit.errors import DataLoss, InvalidArgument, Reason
from penstock_kit.threads import in_thread

CHUNK_BYTES = 1024 * 1024
# Larger than a chunk: each read costs a hop to a thread and back.
READ_BYTES = 4 * CHUNK_BYTES
READ_AHEAD = 64 * 1024
_REMOTE = frozenset({"s3", "s3a", "gs", "az", "abfs", "abfss"})


class BlobStore:
    """Where the bytes of bundles are kept.

    Args:
        url: A folder, "file:///folder", or a URL of an object store, such as "s3://bucket/prefix";
            credentials and endpoint come from the store's own environment variables (AWS_…).

    Raises:
        InvalidArgument: The URL is of no kind that is known.
        Unavailable: The folder cannot be made.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._folder: Path | None = None
        self._store: Any
        if parts.scheme in ("", "file"):
            self._folder = Path(unquote(parts.path) if parts.scheme else url).absolute()
            with storage_errors():
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._store = LocalStore(self._folder)
        elif parts.scheme in _REMOTE:
            try:
                self._store = from_url(url)
            except (BaseError, ValueError) as error:
                raise InvalidArgument(f"PENSTOCK_ARTIFACTS_URL {url!r} cannot be used: {error}") from error
        else:
            raise InvalidArgument(
                f"PENSTOCK_ARTIFACTS_URL {url!r} has an unknown scheme; use a folder, s3://, gs:// or az://."
            )

    @staticmethod
    def path_of(sha256: str) -> str:
        """Return where a blob lies, relative to the store's root."""
        return f"blobs/sha256/{sha256[:2]}/{sha256}"

    async def size(self, sha256: str) -> int | None:
        """Return the size in bytes of a blob as it is stored now; None if there is none.

        Raises:
            Unavailable: The store cannot be reached.
        """
        try:
            found = await obstore.head_async(self._store, self.path_of(sha256))
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise translate_storage(error) from error
        return int(found["size"])

    async def adopt(self, file: Path, sha256: str) -> None:
        """Take over a complete local file as a blob; the file is gone afterwards.

        The caller has checked the digest. An earlier blob of that digest is replaced.

        Raises:
            ResourceExhausted: No space is left; the file stays, and no blob appears.
            Unavailable: The store cannot be reached; likewise.
        """
        if self._folder is not None:
            with storage_errors():
                await in_thread(self._move, file, self._folder / self.path_of(sha256))
            return
        with storage_errors():
            await obstore.put_async(self._store, self.path_of(sha256), file)
            await in_thread(file.unlink, missing_ok=True)

    async def delete(self, sha256: str) -> None:
        """Remove a blob; one that is not there is none.

        Raises:
            Unavailable: The store cannot be reached.
        """
        try:
            await obstore.delete_async(self._store, self.path_of(sha256))
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise translate_storage(error) from error

    async def read(self, sha256: str, size: int, *, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield the bytes from `offset` on, in chunks of at most 1 MiB, and check all of them.

        Also the bytes before `offset` are read, because the digest is that of the whole. The last chunk
        is held back until the digest is known to be right: a reader that ignores errors still never has
        a complete file that is wrong.

        Raises:
            DataLoss: The blob is gone, or is not what its name says.
            Unavailable: The store cannot be reached.
        """
        digest = hashlib.sha256()
        position = 0
        held = b""
        try:
            found = await obstore.get_async(self._store, self.path_of(sha256))
            if int(found.meta["size"]) != size:
                raise _damaged(sha256, f"it has {found.meta['size']} bytes instead of {size}")
            async for buffer in found.stream(min_chunk_size=READ_BYTES):
                piece = bytes(buffer)
                await in_thread(digest.update, piece)
                fresh = piece[max(0, offset - position) :]
                position += len(piece)
                for start in range(0, len(fresh), CHUNK_BYTES):
                    if held:
                        yield held
                    held = fresh[start : start + CHUNK_BYTES]
        except FileNotFoundError as error:
            raise _damaged(sha256, "it is gone") from error
        except (BaseError, OSError) as error:
            raise translate_storage(error) from error
        if position != size or digest.hexdigest() != sha256:
            raise _damaged(sha256, "its contents have another SHA-256")
        if held:
            yield held

    async def verify(self, sha256: str, size: int) -> bool:
        """Return whether the stored blob is what its name says. Reads all of it.

        Raises:
            Unavailable: The store cannot be reached.
        """
        with contextlib.suppress(DataLoss):
            async for _ in self.read(sha256, size, offset=size):
                pass
            return True
        return False

    def open(self, sha256: str) -> BinaryIO:
        """Return the blob as a seekable file, read piece by piece. Blocking; for use in a thread.

        Raises:
            DataLoss: There is no such blob.
            Unavailable: The store cannot be reached.
        """
        try:
            if self._folder is not None:
                return (self._folder / self.path_of(sha256)).open("rb")
            return cast(
                "BinaryIO", io.BufferedReader(_RangeReader(self._store, self.path_of(sha256)), READ_AHEAD)
            )
        except FileNotFoundError as error:
            raise _damaged(sha256, "it is gone") from error
        except (BaseError, OSError) as error:
            raise translate_storage(error) from error

    @staticmethod
    def _move(file: Path, target: Path) -> None:
        """Move a file to its place, durably: by renaming where possible, else by a copy beside it."""
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            file.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                shutil.copyfile(file, beside)
                with beside.open("rb") as copy:
                    os.fsync(copy.fileno())
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        target.chmod(0o400)
        _sync_folder(target.parent)


class _RangeReader(io.RawIOBase):
    """A remote object as a seekable file; every read is one ranged request."""

    def __init__(self, store: Any, path: str) -> None:
        self._store = store
        self._path = path
        self._size = int(obstore.head(store, path)["size"])
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._position)
        if length <= 0:
            return 0
        with storage_errors():
            piece = obstore.get_range(self._store, self._path, start=self._position, length=length)
        view[:length] = memoryview(piece)
        self._position += length
        return length


def _damaged(sha256: str, how: str) -> DataLoss:
    return DataLoss(
        f"Stored bytes are damaged: blob {sha256[:12]}… was changed after its upload ({how}). "
        "Push the same files again to repair it.",
        reason=Reason.BUNDLE_CORRUPT,
        metadata={"sha256": sha256},
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
