"""What a push sends: a manifest and files, hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from penstock.errors import InvalidArgument
from penstock.registry.v1 import manifest_pb2, version_pb2

_HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of a bundle where it lies now.

    Attributes:
        path: Its path inside the bundle, with '/' separators.
        source: Where it is on this machine.
        size_bytes: Its size.
        sha256: SHA-256 of its contents in hexadecimal digits; empty until `Bundle.hashed`.
    """

    path: str
    source: Path
    size_bytes: int
    sha256: str = ""

    def to_proto(self) -> version_pb2.BundleFile:
        """Return what the registry is told about the file."""
        return version_pb2.BundleFile(path=self.path, size_bytes=self.size_bytes, sha256=self.sha256)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model ready to be announced to a registry.

    Attributes:
        name: A name for the model, after the file it came from; the caller may choose another.
        manifest: The standard model description.
        files: Every file, sorted by path.
        notes: What was decided while packaging that a person may want to know.
    """

    name: str
    manifest: manifest_pb2.Manifest
    files: tuple[LocalFile, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(file.size_bytes for file in self.files)

    def hashed(self, progress: Callable[[int], None] | None = None) -> Bundle:
        """Return the bundle with the SHA-256 of every file.

        Args:
            progress: Told the number of bytes read since it was last told.

        Raises:
            InvalidArgument: A file vanished or changed its size since the bundle was made.
        """
        return replace(self, files=tuple(hashed_files(self.files, progress)))


def local_files(root: Path, sources: Iterable[Path]) -> tuple[LocalFile, ...]:
    """Return files below `root` as files of a bundle, sorted by path.

    Raises:
        InvalidArgument: One is a link that leads out of `root`, or no regular file, or has a name that
            no bundle can hold.
    """
    top = root.resolve()
    files = []
    for source in sources:
        path = source.relative_to(root).as_posix()
        resolved = source.resolve()
        if not resolved.is_relative_to(top):
            raise InvalidArgument(
                f"{source} is a link to {resolved}, outside of what is pushed. Put a copy of the file there."
            )
        if not resolved.is_file():
            raise InvalidArgument(f"{source} is not a regular file; remove it from what is pushed.")
        if "\\" in path or any(ord(character) < 32 for character in path):
            raise InvalidArgument(f"{path!r} cannot be a path in a bundle; rename the file.")
        files.append(LocalFile(path, source, resolved.stat().st_size))
    return tuple(sorted(files, key=lambda file: file.path))


def hashed_files(
    files: Iterable[LocalFile], progress: Callable[[int], None] | None = None
) -> list[LocalFile]:
    """Return files with their SHA-256; else as `Bundle.hashed`."""
    return [_hashed(file, progress) for file in files]


def _hashed(file: LocalFile, progress: Callable[[int], None] | None) -> LocalFile:
    digest = hashlib.sha256()
    size = 0
    try:
        with file.source.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if progress is not None:
                    progress(len(chunk))
    except FileNotFoundError as error:
        raise InvalidArgument(f"{file.source} vanished while it was being pushed.") from error
    if size != file.size_bytes:
        raise InvalidArgument(
            f"{file.source} changed while it was being pushed ({file.size_bytes} bytes, then {size}). "
            "Push again when nothing writes to it."
        )
    return replace(file, sha256=digest.hexdigest())
