"""The way of a job's checkpoints into the registry, from one node, in the background.

With several tasks a checkpoint is of use there only with all its parts, and their nodes are not equally fast.
So task 0 leads: it takes the newest that it has, and no other before that is complete; the other tasks send
what task 0 has announced. What the registry has is so never older than two uploads of the slowest node take.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from penstock.registry.v1 import artifact_pb2
from penstock_kit.errors import PenstockError, Unavailable
from penstock_kit.jobs.checkpoints import MADE, checkpoint_artifact, made_of
from penstock_worker.adapters.jobs.checkpoints import CheckpointStore
from penstock_worker.adapters.jobs.registry import JobRegistry, described
from penstock_worker.domain.checkpoint import Writing

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LAST_PAUSE_SECONDS = 30.0
FIRST_LOOK_SECONDS = 0.1
LAST_LOOK_SECONDS = 2.0
"""How often a task looks what the others have sent."""
ANNOUNCED_SECONDS = 30.0
"""How long task 0 waits for the others to begin; one whose agent was restarted never does."""
COMPLETE_SECONDS = 600.0
"""How long it waits for them to end."""
FOLLOWED = 4
"""Checkpoints that a task keeps for task 0 to choose from."""

Spawn = Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]
Sent = Callable[[int, str], None]
"""Takes a step and the artifact that holds a part of its checkpoint: it is deleted with the job."""

READY = artifact_pb2.ARTIFACT_STATE_READY
UPLOADING = artifact_pb2.ARTIFACT_STATE_UPLOADING


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a checkpoint that is complete on this disk."""

    writing: Writing
    number: int
    path: Path
    attempt: int
    sent: Sent
    made: int = 0
    """When the job was made, in nanoseconds of Unix time; 0 if nobody knows."""

    @property
    def step(self) -> int:
        """Of its checkpoint."""
        return self.writing.step


class Age(enum.Enum):
    """Of which of all jobs of one name a checkpoint in the registry is."""

    EARLIER = enum.auto()
    OWN = enum.auto()
    LATER = enum.auto()


class Uploads:
    """What one task of a job sends, over all attempts.

    Args:
        job: Its id.
        store: Where the checkpoints are.
        registry: Where they go.
        spawn: Runs this in the background.
        used: Whether the task is still wanted here.
    """

    def __init__(
        self,
        job: str,
        store: CheckpointStore,
        registry: JobRegistry,
        spawn: Spawn,
        used: Callable[[], bool],
    ) -> None:
        self.away = False
        """The registry could not be reached at the last try."""
        self._job = job
        self._store = store
        self._registry = registry
        self._spawn = spawn
        self._used = used
        self._waiting: list[Part] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def sending(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._task is not None and not self._task.done()

    def send(self, part: Part) -> None:
        """Upload a checkpoint in the background; of several that wait not all go."""
        self._store.hold(part.step)
        self._waiting.append(part)
        for old in self._waiting[: -FOLLOWED if part.number else -1]:
            self._drop(old)
        if not self.sending:
            self._task = self._spawn(f"checkpoints of {self._job}", self._send_all())

    async def settle(self, seconds: float) -> None:
        """Wait until nothing is on its way, within bounds; not while the registry is away."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while (task := self._task) is not None and not self.away and loop.time() < deadline:
            if task.done():
                return
            await asyncio.wait({task}, timeout=0.1)

    def _drop(self, part: Part) -> None:
        self._waiting.remove(part)
        self._store.release(part.step)

    def _drop_all(self) -> None:
        for part in list(self._waiting):
            self._drop(part)

    async def _send_all(self) -> None:
        pause, look = FIRST_PAUSE_SECONDS, FIRST_LOOK_SECONDS
        while self._waiting:
            part: Part | None = None
            try:
                part = await self._next()
                if part is not None:
                    self._waiting.remove(part)
                    await self._send(part)
            except (PenstockError, OSError) as error:
                self.away = isinstance(error, Unavailable)
                log.warning(
                    "a checkpoint is not in the registry yet", extra={"job": self._job, "why": str(error)}
                )
                if not self.away and not self._used():
                    # It was deleted with the job, say; the attempts that may follow find it on this disk.
                    self._drop_all()
                    if part is not None:
                        self._store.release(part.step)
                    return
                # Task 0 goes on with what is newer; the others owe it what it has announced.
                if part is not None and (part.number or not self._waiting) and part.path.exists():
                    self._waiting.insert(0, part)
                elif part is not None:
                    self._store.release(part.step)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
                continue
            self.away, pause = False, FIRST_PAUSE_SECONDS
            if part is not None:
                self._store.release(part.step)
                look = FIRST_LOOK_SECONDS
            elif self._used():
                await asyncio.sleep(look)
                look = min(1.5 * look, LAST_LOOK_SECONDS)
            else:
                # Task 0 sends nothing more; the attempts that follow find it on this disk.
                self._drop_all()

    async def _next(self) -> Part | None:
        """Return what goes next: the newest, or the newest that task 0 has announced."""
        part = self._waiting[-1]
        if not part.number:
            return part
        leading = await self._registry.artifacts_of(checkpoint_artifact(self._job, 0))
        announced = {
            writing_of(one)
            for one in leading
            if one.state in (UPLOADING, READY) and age_of(one, part.made) is Age.OWN
        }
        found = next((each for each in reversed(self._waiting) if each.writing in announced), None)
        if found is not None:
            for old in self._waiting[: self._waiting.index(found)]:
                self._drop(old)
        return found

    async def _send(self, part: Part) -> None:
        """Upload one part, make it READY, and delete what is older and of no use any more."""
        target = checkpoint_artifact(self._job, part.number)
        announced = described({"step": part.step})
        announced.kind = artifact_pb2.ARTIFACT_KIND_CHECKPOINT
        announced.job = f"jobs/{self._job}"
        announced.labels.update(
            step=str(part.step),
            round=part.writing.round,
            parts=str(part.writing.parts),
            part=str(part.number),
            attempt=str(part.attempt),
        )
        if part.made:
            announced.labels[MADE] = str(part.made)
        key = f"{self._job} {part.made} {part.attempt} {part.writing.round} {part.step}"
        made = await self._registry.upload_artifact(announced, target, part.path, key=key)
        await self._registry.finalize_artifact(made.name)
        part.sent(part.step, made.name)
        if part.number == 0 and not await self._others_came(part):
            return
        mine = await self._registry.artifacts_of(target)
        own = [one for one in mine if age_of(one, part.made) is Age.OWN]
        older = sorted((writing_of(old).step, old.name) for old in own if writing_of(old).step < part.step)
        # Deleted jobs of this name have left it, and nobody else knows of it.
        left = [(0, one.name) for one in mine if age_of(one, part.made) is Age.EARLIER]
        # Whether all parts of this one are there is for task 0 to know: the one before stays until the next.
        for _, name in [*left, *(older if part.number == 0 else older[:-1])]:
            with contextlib.suppress(PenstockError):
                await self._registry.delete_artifact(name)

    async def _others_came(self, part: Part) -> bool:
        """Wait until the registry has all parts; give up when they do not come, or ranks went back."""
        loop = asyncio.get_running_loop()
        began, look = loop.time(), FIRST_LOOK_SECONDS
        missing = set(range(1, part.writing.parts))
        while True:
            begun = True
            for number in sorted(missing):
                found = await self._registry.artifacts_of(checkpoint_artifact(self._job, number))
                states = {
                    one.state
                    for one in found
                    if writing_of(one) == part.writing and age_of(one, part.made) is Age.OWN
                }
                begun = begun and bool(states & {UPLOADING, READY})
                if READY in states:
                    missing.remove(number)
            if not missing:
                return True
            over = loop.time() - began > (COMPLETE_SECONDS if begun else ANNOUNCED_SECONDS)
            anew = any(each.writing.round != part.writing.round for each in self._waiting)
            if over or anew or not self._used():
                return False
            await asyncio.sleep(look)
            look = min(1.5 * look, LAST_LOOK_SECONDS)


def writing_of(artifact: artifact_pb2.Artifact) -> Writing:
    """Return of which checkpoint an artifact is a part."""
    labels = artifact.labels
    return Writing(int(labels.get("step", "0")), labels.get("round", ""), int(labels.get("parts", "1")))


def age_of(artifact: artifact_pb2.Artifact, made: int) -> Age:
    """Tell whether a checkpoint in the registry is of the job of its name that was made then.

    Those of earlier releases do not say of which they are: they are its own unless they are older than it.

    Args:
        artifact: The checkpoint, or a part of one.
        made: When the job was made, in nanoseconds of Unix time; 0 if nobody knows, and all are its own.
    """
    said = made_of(artifact.labels)
    if not made or said == made:
        return Age.OWN
    if said:
        return Age.EARLIER if said < made else Age.LATER
    older = artifact.HasField("create_time") and artifact.create_time.ToNanoseconds() < made
    return Age.EARLIER if older else Age.OWN
