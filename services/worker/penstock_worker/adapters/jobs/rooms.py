"""What outlives a task on its node: the job's directory, its checkpoints, and their way to the registry."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from penstock.registry.v1 import artifact_pb2
from penstock_kit.errors import Unavailable
from penstock_kit.jobs.checkpoints import checkpoint_artifact
from penstock_kit.threads import in_thread
from penstock_worker.adapters.jobs.checkpoints import PART_FILE, CheckpointStore, join
from penstock_worker.adapters.jobs.config import DECODED
from penstock_worker.adapters.jobs.registry import JobRegistry
from penstock_worker.adapters.jobs.uploads import (
    Age,
    Spawn,
    Uploads,
    age_of,
    writing_of,
)
from penstock_worker.domain.checkpoint import Choice, Writing

KEPT_ROOMS = 8
"""Directories of jobs that have ended here: the last ones stay, as a job may come back for its checkpoint."""
_MADE = "made"
"""File in the directory of a job that tells it from an earlier one of its name."""


class JobRoom:
    """One task of a job on this node, over all attempts: those with the same number in their attempt.

    Args:
        directory: Its directory.
        job: Its id.
        registry: Where checkpoints go.
        spawn: Runs uploads in the background.
    """

    def __init__(self, directory: Path, job: str, registry: JobRegistry, spawn: Spawn) -> None:
        self.directory = directory
        self.job = job
        self.store = CheckpointStore(directory / "checkpoints")
        self.users = 0
        self.uploads = Uploads(job, self.store, registry, spawn, lambda: self.users > 0)
        self._registry = registry

    def prepare(self) -> None:
        """Make the directory. Blocking.

        Raises:
            OSError: It cannot be made.
        """
        for name in ("events", "logs", "scratch", "checkpoints"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        os.utime(self.directory.parent)

    def tidy(self) -> None:
        """Remove what is of use to running processes only; those that were killed have left it. Blocking."""
        for name in ("scratch", DECODED):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self.store.give_up()

    def mark_part(self, path: Path, writing: Writing, part: int) -> None:
        """Write down which part of which checkpoint this node has. Blocking."""
        (path / PART_FILE).write_text(json.dumps({**dataclasses.asdict(writing), "part": part}))

    def held(self) -> dict[tuple[Writing, int], Path]:
        """Return the complete parts of the job's checkpoints that are on this node. Blocking.

        Whichever task wrote them: tasks may have other numbers, and other nodes, in another attempt.
        """
        found = {}
        for file in self.directory.parent.glob(f"*/checkpoints/*/{PART_FILE}"):
            if not file.parent.name.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError, KeyError):
                fields = json.loads(file.read_text())
                writing = Writing(int(fields["step"]), str(fields["round"]), int(fields["parts"]))
                found[writing, int(fields["part"])] = file.parent
        return found

    def begin_gathering(self, choice: Choice, held: Mapping[tuple[Writing, int], Path]) -> Path:
        """Make the directory for a checkpoint that is gone on from, with the parts of this disk. Blocking.

        Those that were gathered before are removed.
        """
        target = self.store.restored(choice.writing.step)
        shutil.rmtree(target.parent, ignore_errors=True)
        partial = target.with_name(f"{target.name}.partial")
        partial.mkdir(parents=True)
        for part in range(choice.writing.parts):
            if path := held.get((choice.writing, part)):
                join(path, partial, link=True)
        return partial

    def end_gathering(self, step: int) -> Path:
        """Let a gathered checkpoint appear in one step; return where. Blocking."""
        target = self.store.restored(step)
        target.with_name(f"{target.name}.partial").rename(target)
        return target

    async def stored(self, parts: int, made: int = 0) -> dict[tuple[Writing, int], artifact_pb2.Artifact]:
        """Return the parts of checkpoints that the registry has.

        Args:
            parts: How many parts those on the disks of nodes have.
            made: When the job was made: what deleted ones of its name have left does not count. 0 if nobody
                knows.

        Raises:
            PenstockError: As the registry says.
        """
        found: dict[tuple[Writing, int], artifact_pb2.Artifact] = {}
        part = 0
        while part < parts:
            for one in await self._registry.artifacts_of(checkpoint_artifact(self.job, part)):
                if one.state == artifact_pb2.ARTIFACT_STATE_READY and age_of(one, made) is Age.OWN:
                    found[writing_of(one), part] = one
                    parts = max(parts, writing_of(one).parts)
            part += 1
        return found


class JobRooms:
    """All jobs of this node.

    Args:
        directory: Where their directories are.
        registry: Where checkpoints go.
        spawn: Runs uploads in the background.
    """

    def __init__(self, directory: Path, registry: JobRegistry, spawn: Spawn) -> None:
        self.directory = directory
        self._registry = registry
        self._spawn = spawn
        self._rooms: dict[tuple[str, int], JobRoom] = {}
        self._renewing = asyncio.Lock()

    async def enter(self, job: str, index: int, made: int = 0) -> JobRoom:
        """Provide the room of a job's tasks of one number, until `leave`.

        Args:
            job: Its id.
            index: The number in the attempt.
            made: When the job was made; what an earlier one of its name has left here is removed. 0 if nobody
                knows.

        Raises:
            Unavailable: The disk cannot be written to.
        """
        if made:
            async with self._renewing:
                await self._renew(job, made)
        room = self._rooms.get((job, index))
        if room is None:
            directory = self.directory / job / str(index)
            room = self._rooms[job, index] = JobRoom(directory, job, self._registry, self._spawn)
        room.users += 1
        try:
            await in_thread(room.prepare)
        except OSError as error:
            self.leave(room)
            raise Unavailable(
                f"The directory {room.directory} cannot be used: {error.strerror}. Make it writable, or set "
                "PENSTOCK_DATA_DIR to another directory."
            ) from error
        return room

    async def _renew(self, job: str, made: int) -> None:
        """Remove what a deleted job of the same name has left: its checkpoints are none of this one's."""
        own = {key: room for key, room in self._rooms.items() if key[0] == job}
        if any(room.users for room in own.values()):
            return  # tasks of this one are here already
        directory = self.directory / job
        if await in_thread(_is_of_another, directory, made):
            for key in own:
                del self._rooms[key]
            await in_thread(shutil.rmtree, directory, ignore_errors=True)
        # Without a directory that can be written to, the room cannot be entered either, and says why.
        with contextlib.suppress(OSError):
            await in_thread(_sign, directory, made)

    def leave(self, room: JobRoom) -> None:
        """A task of the job has ended here."""
        room.users -= 1

    async def clean(self) -> None:
        """Remove the oldest directories of jobs that have ended here, beyond the last few."""
        for key, room in list(self._rooms.items()):
            if not room.users and not room.uploads.sending:
                del self._rooms[key]
        await in_thread(self._clean, frozenset(job for job, _ in self._rooms))

    def _clean(self, busy: frozenset[str]) -> None:
        if not self.directory.is_dir():
            return
        idle = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.name not in busy:
                    idle.append((path.stat().st_mtime, path))
        for _, path in sorted(idle)[:-KEPT_ROOMS]:
            shutil.rmtree(path, ignore_errors=True)
        for _, path in idle:
            for left in path.glob(f"*/{DECODED}"):
                shutil.rmtree(left, ignore_errors=True)


def _is_of_another(directory: Path, made: int) -> bool:
    """Tell whether a job's directory says that it is of another; one of an earlier release says nothing."""
    try:
        return (directory / _MADE).read_text() != str(made)
    except OSError:
        return False


def _sign(directory: Path, made: int) -> None:
    """In one step: half a word would be that of another."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{_MADE}.partial"
    partial.write_text(str(made))
    partial.replace(directory / _MADE)
