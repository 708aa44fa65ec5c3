"""What the ranks of a node make once and all use: files that the first to come writes.

    <directory>/<boot>/<name>/        whole; it appears in one step
    <directory>/<boot>/<name>.lock    held by whoever writes it; the kernel lets go of it when that one dies
    <directory>/<boot>/<name>.partial/

Nothing is forced to the disk: what an earlier start of the machine has left is not looked at, as a power cut
could have taken parts of it.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from penstock_worker.usecases.job_context import JobFailure

WAIT_SECONDS = 4 * 3600.0
"""For another rank that writes: tables of a terabyte take an hour or two to read."""
_POLL_SECONDS = 0.02
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Shared:
    """A directory of such files.

    Args:
        directory: Of all ranks of the node; None for one of this process's own, which goes away with it.
        scratch: Where that one is made; None means the usual place of temporary files.
    """

    def __init__(self, directory: Path | None, scratch: Path | None = None) -> None:
        if directory is None:
            directory = Path(tempfile.mkdtemp(dir=scratch))
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._directory = directory / (_BOOT.read_text().strip()[:13] if _BOOT.exists() else "0")

    def once(self, name: str, write: Callable[[Path], None]) -> Path:
        """Return the directory of a name, after it was written if it was not there.

        Args:
            name: Of what it holds; whatever that depends on is part of it.
            write: Is given an empty directory; what it raises is raised here, and the next one tries again.

        Raises:
            JobFailure: Another rank has been writing for hours; it may be better the next time.
            OSError: The disk does not take it.
        """
        final = self._directory / name
        if final.is_dir():
            return final
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"{name}.lock").open("ab") as lock:
            _wait_for(lock.fileno(), name)
            if final.is_dir():
                return final
            partial = self._directory / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(final)
        return final


def _wait_for(fd: int, name: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise JobFailure(
                    f"Another rank has been preparing {name} for {WAIT_SECONDS / 3600:.0f} hours.",
                    "UNAVAILABLE",
                    permanent=False,
                ) from None
            time.sleep(_POLL_SECONDS)
        else:
            return
