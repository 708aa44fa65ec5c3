"""The parts of an upload and a download that do no network I/O, shared by both clients."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock.errors import DataLoss, InvalidArgument
from penstock.packaging.bundle import LocalFile
from penstock.registry.v1 import artifact_service_pb2 as artifacts
from penstock.registry.v1 import registry_service_pb2 as registry
from penstock.registry.v1 import version_pb2

# registry_service.proto: a chunk is at most 1 MiB.
CHUNK_BYTES = 1 << 20
# Enough to fill a link with files of any size without holding many chunks in memory.
PARALLEL_FILES = 4
# Attempts that brought no further byte before an upload or download is given up.
MAX_FRUITLESS_ATTEMPTS = 5


Phase = Literal["check", "hash", "upload", "download"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a push or download is.

    Attributes:
        phase: check (looking through a dataset), hash (reading the files), upload or download.
        done_bytes: Bytes done in this phase; what the server had already counts.
        total_bytes: Bytes in this phase.
        path: The file last worked on.
    """

    phase: Phase
    done_bytes: int
    total_bytes: int
    path: str = ""


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts the bytes of one phase, file by file and from any thread, and reports each step."""

    def __init__(self, phase: Phase, total: int, callback: ProgressCallback | None) -> None:
        self._phase: Phase = phase
        self._total = total
        self._callback = callback
        self._done: dict[str, int] = {}
        self._sum = 0
        self._lock = threading.Lock()
        self._report("")

    def add(self, count: int, path: str = "") -> None:
        """Count bytes of a file."""
        with self._lock:
            self._done[path] = self._done.get(path, 0) + count
            self._sum += count
            self._report(path)

    def finish(self) -> None:
        """Count all that is left."""
        with self._lock:
            self._sum = self._total
            self._report("")

    def resume_at(self, offset: int, path: str) -> None:
        """Correct the count of a file of which only `offset` bytes arrived."""
        with self._lock:
            self._sum += offset - self._done.get(path, 0)
            self._done[path] = offset
            self._report(path)

    def _report(self, path: str) -> None:
        if self._callback is not None:
            self._callback(Progress(self._phase, self._sum, self._total, path))


def upload_messages(
    version: str, file: LocalFile, offset: int, meter: Meter
) -> Iterator[registry.UploadArtifactRequest]:
    """Yield the messages that send a file from `offset` on.

    Raises:
        InvalidArgument: The file became shorter since it was hashed.
    """
    header = registry.UploadArtifactRequest.Header(version=version, path=file.path, offset=offset)
    yield registry.UploadArtifactRequest(header=header)
    for chunk in _chunks(file, offset, meter):
        yield registry.UploadArtifactRequest(chunk=chunk)


def file_messages(
    artifact: str, file: LocalFile, offset: int, meter: Meter
) -> Iterator[artifacts.UploadFileRequest]:
    """Yield the messages that send a file of an artifact from `offset` on.

    Raises:
        InvalidArgument: The file became shorter since it was hashed.
    """
    header = artifacts.UploadFileRequest.Header(artifact=artifact, path=file.path, offset=offset)
    yield artifacts.UploadFileRequest(header=header)
    for chunk in _chunks(file, offset, meter):
        yield artifacts.UploadFileRequest(chunk=chunk)


def received(files: Iterable[version_pb2.BundleFile], path: str) -> int:
    """Return how many bytes of a file the registry holds."""
    return next((file.received_bytes for file in files if file.path == path), 0)


def _chunks(file: LocalFile, offset: int, meter: Meter) -> Iterator[bytes]:
    left = file.size_bytes - offset
    with file.source.open("rb") as stream:
        stream.seek(offset)
        while left > 0:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise InvalidArgument(
                    f"{file.source} became shorter while it was being pushed; push it again."
                )
            left -= len(chunk)
            yield chunk
            meter.add(len(chunk), file.path)


class PartialFile:
    """A file on its way in: written beside its place, checked, then moved there."""

    def __init__(self, directory: Path, file: version_pb2.BundleFile) -> None:
        parts = file.path.split("/")
        if file.path.startswith("/") or any(part in {"", ".", ".."} for part in parts):
            raise DataLoss(f"The server sent the file name {file.path!r}, which leads out of the bundle.")
        self.file = file
        self.target = directory.joinpath(*parts)
        self._part = self.target.with_name(self.target.name + ".part")

    def is_complete(self) -> bool:
        """Whether the file is in its place with the right contents."""
        return (
            self.target.is_file()
            and self.target.stat().st_size == self.file.size_bytes
            and _sha256(self.target) == self.file.sha256
        )

    def offset(self) -> int:
        """Return the number of bytes already here from an earlier attempt."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        size = self._part.stat().st_size if self._part.exists() else 0
        if size > self.file.size_bytes:
            self._part.unlink()
            size = 0
        return size

    def append(self, chunk: bytes) -> None:
        """Add bytes after those before."""
        with self._part.open("ab") as stream:
            stream.write(chunk)

    def finish(self) -> None:
        """Check the contents and move the file to its place.

        Raises:
            DataLoss: The contents are not what the registry recorded; the partial file is removed.
        """
        if not self._part.exists():
            self._part.touch()
        if _sha256(self._part) != self.file.sha256:
            self._part.unlink()
            raise DataLoss(f"{self.file.path} arrived with another SHA-256 than recorded; download it again.")
        self._part.replace(self.target)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
