"""From what the file system and obstore raise to the one error tree."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obstore.exceptions import BaseError

from penstock_kit.errors import PenstockError, Reason, ResourceExhausted, Unavailable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FULL_WORDS = ("no space left", "quota exceeded", "file too large")


def storage_full(needed: int = 0, folder: Path | None = None) -> ResourceExhausted:
    """Return the error of a store that has no space left.

    Args:
        needed: Bytes that a file still takes; 0 if nobody knows.
        folder: Where it was to be written; None if that is on no disk of this machine.
    """
    numbers = ""
    if needed and folder is not None:
        free = shutil.disk_usage(folder).free
        numbers = f" ({needed:,} bytes more are needed, and {free:,} are free in {folder} of the registry)"
    return ResourceExhausted(
        f"No space is left where artifacts are kept{numbers}, so this version is not READY. "
        "Free or add space, then push again.",
        reason=Reason.STORAGE_FULL,
    )


def translate_storage(error: Exception) -> PenstockError:
    """Return the error of our tree that a failed read or write of artifacts means."""
    words = str(error)
    if (isinstance(error, OSError) and error.errno in _FULL) or any(
        full in words.lower() for full in _FULL_WORDS
    ):
        return storage_full()
    first = words.splitlines()[0] if words else type(error).__name__
    return Unavailable(
        f"The artifact store cannot be used now ({first[:200]}); retry once it is back.",
        reason=Reason.DEPENDENCY_UNAVAILABLE,
        retry_after_seconds=1.0,
    )


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise errors of files and stores inside the block as errors of our tree."""
    try:
        yield
    except (OSError, BaseError) as error:
        raise translate_storage(error) from error
