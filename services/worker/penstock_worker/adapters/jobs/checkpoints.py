"""Checkpoints of a job on this node's disk. All of it blocks.

    <directory>/<step>.partial/   being written, by all ranks of this node; <step>.gone.partial/ is removed
    <directory>/<step>/           complete; it appears in one step, after its files were forced to the disk
    <directory>/restored/<step>/  gathered from other nodes and the registry

What must always hold: `last` names a directory that is complete, however the processes and the machine died.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

from penstock_worker.adapters import bundle_files
from penstock_worker.domain.task import megabytes
from penstock_worker.usecases.job_context import JobFailure

KEPT = 2
"""The last one, and the one before while that is sent or read."""
PARTIAL = ".partial"
PART_FILE = "penstock-part.json"
"""Beside the files of a checkpoint: which part of how many it is. It makes that no part is empty."""
ROOM = 1.05
"""A checkpoint may write so many times as much as the one before without being refused beforehand."""


class CheckpointStore:
    """The checkpoints of one job.

    Args:
        directory: Where they are; made when needed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._begun: dict[int, Hashable] = {}
        self._committed: dict[int, set[int]] = {}
        self._in_use: Counter[int] = Counter()
        # Ranks come at the same time, each in a thread.
        self._lock = threading.Lock()

    def begin(self, step: int, generation: Hashable) -> Path:
        """Return the directory of a checkpoint: empty for the first rank, the same for the others.

        Raises:
            JobFailure: The disk has no room for as much as was written for the last one; OUT_OF_DISK.
        """
        with self._lock:
            return self._begin(step, generation)

    def _begin(self, step: int, generation: Hashable) -> Path:
        path = self.directory / f"{step}{PARTIAL}"
        if self._begun.get(step) != generation or not path.exists():
            self._clean()
            self._check_room()
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            self._begun[step] = generation
            self._committed[step] = set()
        return path

    def commit(self, step: int, rank: int, ranks: int, generation: Hashable) -> bool:
        """Take note that a rank has written its files; true if that was the last one and it is complete now.

        Args:
            step: Whose checkpoint.
            rank: Which.
            ranks: How many of this node must say so.
            generation: Of the rank; one of an earlier generation has nothing to say.

        Raises:
            OSError: The disk does not take it.
        """
        with self._lock:
            return self._commit(step, rank, ranks, generation)

    def _commit(self, step: int, rank: int, ranks: int, generation: Hashable) -> bool:
        if self._begun.get(step) != generation:
            return False
        committed = self._committed[step]
        committed.add(rank)
        if len(committed) < ranks:
            return False
        self._publish(step)
        del self._begun[step], self._committed[step]
        return True

    def give_up(self) -> None:
        """Remove what was begun: nobody writes any more."""
        with self._lock:
            self._begun.clear()
            self._committed.clear()
            self._clean()

    def last(self) -> tuple[int, Path] | None:
        """Return the step and directory of the last complete checkpoint."""
        steps = self._steps()
        return (steps[-1], self.directory / str(steps[-1])) if steps else None

    def hold(self, step: int) -> None:
        """Keep a checkpoint although there are newer ones, until as many calls of `release`."""
        self._in_use[step] += 1

    def release(self, step: int) -> None:
        """Let it go when there are newer ones."""
        self._in_use[step] -= 1
        if self._in_use[step] <= 0:
            del self._in_use[step]

    def forget_after(self, step: int) -> None:
        """Remove those of later steps: the ranks go on from before them."""
        with self._lock:
            for newer in self._steps():
                if newer > step:
                    self._remove(newer)

    def restored(self, step: int) -> Path:
        """Return where one that is gathered from the registry belongs."""
        return self.directory / "restored" / str(step)

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def _publish(self, step: int) -> None:
        partial, final = self.directory / f"{step}{PARTIAL}", self.directory / str(step)
        for path, _ in bundle_files.walk(partial):
            _force(partial / path)
        for folder, _, _ in os.walk(partial):
            _force(Path(folder))
        if final.exists():
            # Written again after the ranks had to go back behind it; the one before it is still there.
            self._remove(step)
        partial.rename(final)
        _force(self.directory)
        self._clean()

    def _clean(self) -> None:
        """Remove what is older than the last ones, and what was begun and given up."""
        for old in self._steps()[:-KEPT]:
            if self._in_use[old] <= 0:
                with contextlib.suppress(OSError):
                    self._remove(old)
        if self.directory.is_dir():
            for path in self.directory.glob(f"*{PARTIAL}"):
                step = path.name.removesuffix(PARTIAL)
                if not step.isdigit() or int(step) not in self._begun:
                    shutil.rmtree(path, ignore_errors=True)

    def _remove(self, step: int) -> None:
        """Remove a complete one: its name first, as half of it must not lie there if this process is killed.

        Raises:
            OSError: It cannot be renamed, and is there as before.
        """
        gone = self.directory / f"{step}.gone{PARTIAL}"
        shutil.rmtree(gone, ignore_errors=True)
        (self.directory / str(step)).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _check_room(self) -> None:
        last = self.last()
        if last is None:
            return
        need = int(self._written_for(*last) * ROOM)
        free = bundle_files.free_bytes(self.directory)
        if free < need:
            raise JobFailure(
                f"A checkpoint takes about {megabytes(need)}, and the disk of {self.directory} has "
                f"{megabytes(free)} left. Free or add space there; the last good one, of step {last[0]}, is "
                "kept.",
                "OUT_OF_DISK",
                permanent=False,
            )

    def _written_for(self, step: int, path: Path) -> int:
        """Return the bytes of a checkpoint's files, but for those that it shares with an earlier one.

        What only grows, as the answers of a batch prediction, is linked from one to the next: that takes
        room once.
        """
        earlier = [self.directory / str(old) for old in self._steps()]
        if self.restored(step).parent.is_dir():
            earlier += [old for old in self.restored(step).parent.iterdir() if old.name.isdigit()]
        known: set[tuple[int, int]] = set()
        for old in earlier:
            # One of the same step is gathered from this one.
            if int(old.name) < step:
                with contextlib.suppress(FileNotFoundError):  # the next one is being gathered
                    known.update((facts.st_dev, facts.st_ino) for _, facts in bundle_files.walk(old))
        return sum(
            facts.st_size for _, facts in bundle_files.walk(path) if (facts.st_dev, facts.st_ino) not in known
        )


def _force(path: Path) -> None:
    """Force a file or directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(NotADirectoryError):
            os.fsync(fd)
    finally:
        os.close(fd)


def join(source: Path, target: Path, *, link: bool = False) -> None:
    """Put the files of a part beside those of others; by links to them where that is safe. Blocking."""
    for path in files_of(source):
        name = target / path
        name.parent.mkdir(parents=True, exist_ok=True)
        # Another part may have a file of that name here: a link to what must not be written to.
        name.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if link:
                os.link(source / path, name)
                continue
        shutil.copyfile(source / path, name)


def files_of(part: Path) -> list[str]:
    """Return the files of a part, without what says which part it is. Blocking."""
    return sorted(
        str(path.relative_to(part)) for path in part.rglob("*") if path.is_file() and path.name != PART_FILE
    )
