"""What outlives a task on its node: the job's directory, its checkpoints, and their way to the registry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from penstock.registry.v1 import artifact_pb2
from penstock_kit.errors import PenstockError, Unavailable
from penstock_kit.threads import in_thread
from penstock_worker.adapters.jobs.checkpoints import CheckpointStore
from penstock_worker.adapters.jobs.registry import JobRegistry, described

log = logging.getLogger(__name__)

PART_FILE = "penstock-part.json"
"""Beside the files of a checkpoint: which part of how many it is. It makes that no part is empty."""
KEPT_ROOMS = 8
"""Directories of jobs that have ended here: the last ones stay, as a job may come back for its checkpoint."""
FIRST_PAUSE_SECONDS = 1.0
LAST_PAUSE_SECONDS = 30.0

Spawn = Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]
Sent = Callable[[int, str], None]
"""Takes a step and the artifact that holds its checkpoint."""


def checkpoint_artifact(job: str, part: int) -> str:
    """Return the name of the artifact that part `part` of a job's checkpoints are versions of."""
    return f"artifacts/job-{job}-checkpoint" + (f"-{part}" if part else "")


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
        self.away = False
        """The registry could not be reached at the last try."""
        self._registry = registry
        self._spawn = spawn
        self._pending: tuple[int, Path, int, int, int, Sent] | None = None
        self._task: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Make the directory. Blocking.

        Raises:
            OSError: It cannot be made.
        """
        for name in ("events", "logs", "scratch", "checkpoints"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        os.utime(self.directory.parent)

    def mark_part(self, path: Path, step: int, part: int, parts: int) -> None:
        """Write down which part of a checkpoint this node has. Blocking."""
        (path / PART_FILE).write_text(json.dumps({"step": step, "part": part, "parts": parts}))

    def parts_of(self, path: Path) -> int:
        """Return of how many parts a local checkpoint is one. Blocking."""
        try:
            return int(json.loads((path / PART_FILE).read_text())["parts"])
        except (OSError, ValueError, KeyError):
            return 0

    def send(self, step: int, path: Path, *, part: int, parts: int, attempt: int, sent: Sent) -> None:
        """Upload a checkpoint in the background; of several that wait only the newest goes."""
        if self._pending is not None:
            self.store.release(self._pending[0])
        self.store.hold(step)
        self._pending = (step, path, part, parts, attempt, sent)
        if self._task is None or self._task.done():
            self._task = self._spawn(f"checkpoints of {self.job}", self._send_all())

    @property
    def sending(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._task is not None and not self._task.done()

    async def settle(self, seconds: float) -> None:
        """Wait until nothing is on its way, within bounds; not while the registry is away."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while (task := self._task) is not None and not self.away and loop.time() < deadline:
            if task.done():
                return
            await asyncio.wait({task}, timeout=0.1)

    async def _send_all(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while self._pending is not None:
            step, path, part, parts, attempt, sent = self._pending
            self._pending = None
            try:
                name = await self._send(step, path, part, parts, attempt)
            except (PenstockError, OSError) as error:
                self.away = isinstance(error, Unavailable)
                log.warning(
                    "a checkpoint is not in the registry yet",
                    extra={"job": self.job, "step": step, "why": str(error)},
                )
                if self._pending is None and path.exists():
                    self._pending = (step, path, part, parts, attempt, sent)
                else:
                    self.store.release(step)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            else:
                self.away, pause = False, FIRST_PAUSE_SECONDS
                self.store.release(step)
                sent(step, name)

    async def _send(self, step: int, path: Path, part: int, parts: int, attempt: int) -> str:
        """Upload one checkpoint, make it READY, and delete those before it."""
        target = checkpoint_artifact(self.job, part)
        announced = described({"step": step})
        announced.kind = artifact_pb2.ARTIFACT_KIND_CHECKPOINT
        announced.job = f"jobs/{self.job}"
        labels = {"step": step, "part": part, "parts": parts, "attempt": attempt}
        announced.labels.update({key: str(value) for key, value in labels.items()})
        made = await self._registry.upload_artifact(
            announced, target, path, key=f"{self.job} {attempt} {step}"
        )
        await self._registry.finalize_artifact(made.name)
        older = [old for old in await self._registry.artifacts_of(target) if _step(old) < step]
        # With several parts the one before stays, as the other parts of this one may not be there yet.
        for old in sorted(older, key=_step, reverse=True)[0 if parts == 1 else 1 :]:
            with contextlib.suppress(PenstockError):
                await self._registry.delete_artifact(old.name)
        return made.name

    async def stored(self) -> list[tuple[int, list[artifact_pb2.Artifact]]]:
        """Return the complete checkpoints in the registry, the newest first: the step and all parts.

        Raises:
            PenstockError: As the registry says.
        """
        first = await self._registry.artifacts_of(checkpoint_artifact(self.job, 0))
        ready = [one for one in first if one.state == artifact_pb2.ARTIFACT_STATE_READY]
        others: dict[int, list[artifact_pb2.Artifact]] = {}
        found = []
        for one in sorted(ready, key=_step, reverse=True):
            parts = [one]
            for part in range(1, int(one.labels.get("parts", "1"))):
                if part not in others:
                    others[part] = await self._registry.artifacts_of(checkpoint_artifact(self.job, part))
                parts += [other for other in others[part] if _same(other, one)][:1]
            if len(parts) == int(one.labels.get("parts", "1")):
                found.append((_step(one), parts))
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

    async def enter(self, job: str, index: int) -> JobRoom:
        """Provide the room of a job's tasks of one number, until `leave`.

        Raises:
            Unavailable: The disk cannot be written to.
        """
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

    def leave(self, room: JobRoom) -> None:
        """A task of the job has ended here."""
        room.users -= 1

    async def clean(self) -> None:
        """Remove the oldest directories of jobs that have ended here, beyond the last few."""
        for key, room in list(self._rooms.items()):
            if not room.users and not room.sending:
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


def _step(artifact: artifact_pb2.Artifact) -> int:
    return int(artifact.labels.get("step", "0"))


def _same(other: artifact_pb2.Artifact, one: artifact_pb2.Artifact) -> bool:
    return other.state == artifact_pb2.ARTIFACT_STATE_READY and all(
        other.labels.get(key) == one.labels.get(key) for key in ("step", "attempt", "parts")
    )
