"""A disk without room: how it is told from other errors, and what is said of it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from penstock_kit.errors import PenstockError, Reason
from penstock_worker.adapters import bundle_files
from penstock_worker.domain.task import megabytes

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What libraries in C++ and Rust make of it, which know no errno.
_WORDS = ("No space left on device", "StorageFull", "Disk quota exceeded", "File too large")
# torch says the same of a full disk and of one that is broken.
_PERHAPS = ("PytorchStreamWriter failed", "file write failed", "unexpected pos")
_NEARLY_NOTHING = 0.02


def full_disk(chain: Iterable[BaseException], directory: Path | None) -> str:
    """Return what to say if one of these errors came of a disk without room; empty if none did.

    Args:
        chain: An exception and those that it came from.
        directory: Where the job writes; None if nobody knows.
    """
    for error in chain:
        if isinstance(error, PenstockError) and error.reason is Reason.STORAGE_FULL:
            return str(error)
        words = str(error)
        path = _named(error) or directory
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            return f"A file is larger than the node allows, {_where(path, directory)}."
        known = isinstance(error, OSError) and error.errno in FULL
        known = known or (isinstance(error, Exception) and any(full in words for full in _WORDS))
        if known or (any(may in words for may in _PERHAPS) and _is_full(directory)):
            return (
                f"No space is left on the node's disk: {_where(path, directory)}. Free or add space there, "
                "or write less; the last good checkpoint is kept."
            )
    return ""


def _named(error: BaseException) -> Path | None:
    """Return the file that an error names; some name a descriptor."""
    name = error.filename if isinstance(error, OSError) else None
    return Path(os.fsdecode(name)) if name and isinstance(name, (str, bytes, os.PathLike)) else None


def _is_full(directory: Path | None) -> bool:
    if directory is None:
        return False
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return False
    # What could not be written may be gone by now, with the directory that it was written to.
    return usage.free <= max(_NEARLY_NOTHING * usage.total, bundle_files.size(directory))


def _where(path: Path | None, directory: Path | None) -> str:
    """Return a path with what the job has there, and what the disk has."""
    found = str(path or directory or "where this job writes")
    nearest = path or directory
    while nearest is not None and not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    with contextlib.suppress(OSError):
        if directory is not None:
            found += f"; the job has {megabytes(bundle_files.size(directory))} in {directory}"
        if nearest is not None:
            usage = shutil.disk_usage(nearest)
            found += f"; of {megabytes(usage.total)} that the disk has, {megabytes(usage.free)} are free"
    return found
