"""What the desk does for one task: fetches, keeps checkpoints, publishes, passes events on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from penstock.registry.v1 import artifact_pb2, manifest_pb2, version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import InvalidArgument, PenstockError, ResourceExhausted
from penstock_kit.threads import in_thread
from penstock_worker.adapters.jobs.agreement import choice_from, to_fields
from penstock_worker.adapters.jobs.checkpoints import join
from penstock_worker.adapters.jobs.events import EventSender
from penstock_worker.adapters.jobs.lineage import code_digest, environment, joined_digest
from penstock_worker.adapters.jobs.registry import JobRegistry, described
from penstock_worker.adapters.jobs.rooms import JobRoom
from penstock_worker.adapters.jobs.spool import EventSpool
from penstock_worker.adapters.jobs.uploads import Part
from penstock_worker.domain.checkpoint import Choice, Writing, newest
from penstock_worker.domain.supervision import BundleFile, WantedFiles
from penstock_worker.domain.task import DesiredTask, End, EndKind, worst
from penstock_worker.usecases.job_context import JobFailure
from penstock_worker.usecases.ports import BundleStore

LOOK_SECONDS = 5.0
"""How long the registry is asked for a newer checkpoint where there is one on this disk."""
GENERATIONS = 1_000_000
"""More than one launcher starts its ranks: generations of different launchers are told apart."""
MAX_LINE_CHARACTERS = 4_000
MAX_METRICS = 256
MAX_RESULTS = 64


class TaskClerk:
    """Serves the processes of one task; see `penstock_worker.adapters.jobs.desk.Clerk`.

    Args:
        desired: The task.
        room: Its job on this node.
        spool: Where its events go.
        sender: Sends them.
        registry: For what is published.
        bundles: For what is fetched.
        processor: The maker's name of this node's processor.
        changed: Called when something that the scheduler should know has changed.
    """

    def __init__(
        self,
        desired: DesiredTask,
        room: JobRoom,
        spool: EventSpool,
        *,
        sender: EventSender,
        registry: JobRegistry,
        bundles: BundleStore,
        processor: str,
        changed: Callable[[], None],
    ) -> None:
        self.running = False
        self.rendezvous = ""
        self.memory_bytes = 0
        self.results: list[str] = []
        self.report = b""
        self.end: End | None = None
        self.spool = spool
        self._desired = desired
        self._job = job_pb2.Job.FromString(desired.spec)
        self._room = room
        self._sender = sender
        self._registry = registry
        self._bundles = bundles
        self._processor = processor
        self._changed = changed
        self._leases = contextlib.AsyncExitStack()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._paths: dict[str, Path] = {}
        self._artifacts: dict[str, artifact_pb2.Artifact] = {}
        self._versions: dict[str, version_pb2.Version] = {}
        self._ends: dict[int, dict[int, End]] = defaultdict(dict)
        self._restored: dict[int, tuple[int, Path] | None] = {}
        self._stored_parts: Mapping[tuple[Writing, int], artifact_pb2.Artifact] = {}
        self._starts = 0
        self._held: list[int] = []
        self._progress_from: tuple[float, int] | None = None
        self._said = job_pb2.JobProgress()

    def begin(self) -> None:
        """A launcher starts, perhaps after the end of one before."""
        self.end, self.running, self.rendezvous = None, False, ""
        self._starts += 1

    # What the processes say.

    def note(self, op: str, rank: int, generation: int, fields: Mapping[str, Any]) -> None:
        """See `Clerk`."""
        match op:
            case "log":
                text = str(fields["text"])[:MAX_LINE_CHARACTERS]
                self.say(text, rank=int(fields["rank"]), error=bool(fields["error"]))
            case "progress":
                self._said = self._progress(fields)
                self._add(job_pb2.JobEvent(progress=self._said))
            case "metrics":
                values = dict(list(fields["values"].items())[:MAX_METRICS])
                self._add(
                    job_pb2.JobEvent(metrics=job_pb2.MetricPoint(step=int(fields["step"]), values=values))
                )
            case "running":
                self.running = True
                self._progress_from = None
                self._changed()
            case "checkpoint":
                self._note_checkpoint(int(fields["step"]), "")
            case "memory":
                self.memory_bytes = int(fields["bytes"])

    async def call(self, op: str, rank: int, generation: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """See `Clerk`."""
        generation += self._starts * GENERATIONS
        match op:
            case "artifact":
                return await self._artifact(str(fields["name"]), int(fields.get("most_bytes", 0)))
            case "version":
                return await self._version(str(fields["name"]))
            case "new_checkpoint":
                path = await in_thread(self._room.store.begin, int(fields["step"]), self._group(generation))
                return {"path": str(path)}
            case "commit_checkpoint":
                # A group may be smaller than the attempt: its parts are as many as it has places.
                writing = Writing(int(fields["step"]), str(fields["round"]), int(fields["places"]))
                return await self._commit(writing, int(fields["place"]), rank, generation)
            case "last_checkpoint":
                found = await self._last(generation)
                return {"step": found[0], "path": str(found[1])} if found else {}
            case "held_parts":
                return {"parts": to_fields(await in_thread(self._room.held))}
            case "stored_parts":
                return {
                    "parts": to_fields(await self._stored(int(fields["parts"]), bool(fields["optional"])))
                }
            case "gather":
                choice = choice_from(fields["choice"])
                # Parts of newer ones cannot be completed: all go on from before them.
                await in_thread(self._room.store.forget_after, choice.writing.step)
                return await self._begin_gathering(choice)
            case "gathered":
                step = int(fields["step"])
                path = await in_thread(self._room.end_gathering, step)
                # Who asks again while others read it gets the same, and no new one in its place.
                self._restored[generation] = step, path
                return {"path": str(path)}
            case "start_anew":
                await in_thread(self._room.store.forget_after, -1)
                self._restored[generation] = None
                return {}
            case "publish_version":
                return await self._publish_version(fields)
            case "publish_artifact":
                return await self._publish_artifact(fields)
            case "record_profile":
                profile = version_pb2.DeviceProfile.FromString(base64.b64decode(fields["profile"]))
                profile.job = self._job.name
                profile.time.GetCurrentTime()
                await self._registry.record_profile(str(fields["version"]), profile)
                return {}
            case "record_metrics":
                await self._registry.record_metrics(str(fields["version"]), fields["metrics"])
                return {}
            case "report":
                self.report = base64.b64decode(fields["report"])
                return {}
            case "rendezvous":
                self.rendezvous = str(fields["address"])
                self._changed()
                return {}
            case "end":
                self._ends[generation][rank] = End.from_fields(fields["end"])
                return {}
            case "ended":
                self.end = self._judge(
                    End.from_fields(fields["end"]), int(fields["generation"]) + self._starts * GENERATIONS
                )
                self._changed()
                return {}
        raise InvalidArgument(f"There is no call {op!r}.")

    def _group(self, generation: int) -> tuple[int, int]:
        """Return what tells a start of ranks from all others of the job on this node."""
        return self._desired.number, generation

    def say(self, text: str, *, rank: int = 0, error: bool = False) -> None:
        """Put a line into the events."""
        self._add(job_pb2.JobEvent(log=job_pb2.LogLine(text=text, rank=rank, error=error)))

    async def close(self) -> None:
        """Let go of what was fetched."""
        for step in self._held:
            self._room.store.release(step)
        await self._leases.aclose()

    def _add(self, event: job_pb2.JobEvent) -> None:
        self.spool.add(event)
        self._sender.kick()

    def _progress(self, fields: Mapping[str, Any]) -> job_pb2.JobProgress:
        done, total = int(fields["done"]), int(fields["total"])
        found = job_pb2.JobProgress(done=done, total=total, unit=fields["unit"], phase=fields["phase"])
        now = time.monotonic()
        if self._progress_from is None or done < self._progress_from[1]:
            self._progress_from = now, done
        began, first = self._progress_from
        if total >= done > first:
            found.remaining.FromSeconds(int((now - began) * (total - done) / (done - first)))
        return found

    def _judge(self, end: End, generation: int) -> End:
        """Put what the ranks said to what the launcher saw: the words of a rank that failed say more."""
        if end.kind is EndKind.FAILED and not end.message:
            worst_said = worst(self._ends[generation].values())
            if worst_said is not None and worst_said.kind is EndKind.FAILED:
                return worst_said
            return End(EndKind.FAILED, "A rank ended without a word.", "ERROR")
        said = self._ends[generation]
        if end.kind is EndKind.SUCCEEDED and len(said) < self._desired.ranks:
            # os._exit(0) in a program, say: nobody knows whether it has done its work.
            words = "A rank ended with status 0 before its work was done, and without a model."
            cause = "NO_MODEL" if self._desired.user_code else "ERROR"
            return End(EndKind.FAILED, words, cause, permanent=self._desired.user_code)
        return end

    # Fetching.

    async def _artifact(self, name: str, most_bytes: int = 0) -> dict[str, Any]:
        async with self._locks[name]:
            if name not in self._artifacts:
                full = name if "/" in name else f"artifacts/{name}"
                found = await self._registry.artifact(full)
                if most_bytes and found.size_bytes > most_bytes:
                    raise ResourceExhausted(
                        f"{found.name} has {found.size_bytes:,} bytes, over {most_bytes:,}."
                    )
                self._paths[name] = await self._lease(found.name, found.digest, b"", found.files)
                self._artifacts[name] = found
        packed = base64.b64encode(self._artifacts[name].SerializeToString()).decode()
        return {"path": str(self._paths[name]), "artifact": packed}

    async def _version(self, name: str) -> dict[str, Any]:
        async with self._locks[name]:
            if name not in self._versions:
                found = await self._registry.version(name)
                manifest = found.manifest.SerializeToString(deterministic=True)
                self._paths[name] = await self._lease(found.name, found.digest, manifest, found.files)
                self._versions[name] = found
        packed = base64.b64encode(self._versions[name].SerializeToString()).decode()
        return {"path": str(self._paths[name]), "version": packed}

    async def _lease(self, name: str, digest: str, manifest: bytes, files: Any) -> Path:
        """Fetch files through the cache of bundles, and keep them there until the task has ended."""
        wanted = WantedFiles(
            name,
            digest,
            manifest,
            tuple(BundleFile(file.path, file.size_bytes, file.sha256) for file in files),
        )

        fetched = False

        def say(words: str) -> None:
            nonlocal fetched
            fetched = True
            phase = f"{name}: {words}"
            self._add(job_pb2.JobEvent(progress=job_pb2.JobProgress(phase=phase)))

        path = await self._leases.enter_async_context(self._bundles.lease(wanted, say))
        if fetched:
            # What the ranks said before stands again: nothing is fetched any more.
            self._add(job_pb2.JobEvent(progress=self._said))
        return path

    # Checkpoints.

    async def _commit(self, writing: Writing, part: int, rank: int, generation: int) -> dict[str, Any]:
        desired, room, step = self._desired, self._room, writing.step
        path = room.store.directory / f"{step}.partial"
        await in_thread(room.mark_part, path, writing, part)
        complete = await in_thread(room.store.commit, step, rank, desired.ranks, self._group(generation))
        if complete:
            self._restored.clear()
            final = room.store.directory / str(step)
            if desired.tasks == 1:
                self._note_checkpoint(step, "")
            note = self._note_checkpoint
            room.uploads.send(Part(writing, part, final, desired.attempt, note, desired.made))
        return {"complete": complete}

    def _note_checkpoint(self, step: int, artifact: str) -> None:
        self._add(job_pb2.JobEvent(checkpoint=job_pb2.CheckpointNote(step=step, artifact=artifact)))

    async def _last(self, generation: int) -> tuple[int, Path] | None:
        """Return the last checkpoint; all ranks of a generation get the same."""
        async with self._locks["checkpoint"]:
            if generation not in self._restored:
                self._restored[generation] = await self._find(generation)
        return self._restored[generation]

    async def _find(self, generation: int) -> tuple[int, Path] | None:
        room = self._room
        held = await in_thread(room.held)
        choice = newest([held])
        if choice is None or generation <= GENERATIONS:
            # The first ranks here: another node may have been further.
            parts = max((writing.parts for writing, _ in held), default=1)
            stored = await self._stored(parts, choice is not None)
            choice = newest([held], stored)
        if choice is None:
            return None
        step = choice.writing.step
        path = held.get((choice.writing, 0))
        if choice.writing.parts > 1 or path is None:
            await self._begin_gathering(choice)
            return step, await in_thread(room.end_gathering, step)
        # Read at leisure: newer ones may come before all ranks have.
        room.store.hold(step)
        self._held.append(step)
        return step, path

    async def _stored(
        self, parts: int, optional: bool
    ) -> Mapping[tuple[Writing, int], artifact_pb2.Artifact]:
        """Return the parts that the registry has; none if it is away and there is another way."""
        try:
            async with asyncio.timeout(LOOK_SECONDS if optional else None):
                self._stored_parts = await self._room.stored(parts, self._desired.made)
        except (PenstockError, TimeoutError):
            if not optional:
                raise
            self._stored_parts = {}
        return self._stored_parts

    async def _begin_gathering(self, choice: Choice) -> dict[str, Any]:
        """Bring the parts of this node and of the registry into one directory; say which were here."""
        held = await in_thread(self._room.held)
        target = await in_thread(self._room.begin_gathering, choice, held)
        lacking = [
            part
            for part, source in enumerate(choice.sources)
            if source < 0 and (choice.writing, part) not in held
        ]
        if lacking:
            self.say(f"Fetching {len(lacking)} parts of the checkpoint of step {choice.writing.step}.")
            if any((choice.writing, part) not in self._stored_parts for part in lacking):
                self._stored_parts = await self._room.stored(choice.writing.parts, self._desired.made)
        for part in lacking:
            artifact = self._stored_parts.get((choice.writing, part))
            if artifact is None:
                raise JobFailure(
                    f"Part {part} of the checkpoint of step {choice.writing.step} is not in the registry any "
                    "more.",
                    "NO_CHECKPOINT",
                    permanent=False,
                )
            path = await self._lease(artifact.name, artifact.digest, b"", artifact.files)
            await in_thread(join, path, target)
        here = {str(part): str(path) for (writing, part), path in held.items() if writing == choice.writing}
        return {"path": str(target), "here": here}

    # Publishing.

    async def _publish_version(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        manifest = manifest_pb2.Manifest.FromString(base64.b64decode(fields["manifest"]))
        await self._complete_lineage(manifest.lineage, int(fields["seed"]))
        model = str(fields["model"])
        made = await self._registry.upload_version(
            model if model.startswith("models/") else f"models/{model}",
            Path(fields["directory"]),
            manifest,
            fields["labels"],
            job=self._key,
        )
        return self._made(made.name)

    async def _publish_artifact(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        announced = described(fields["description"])
        announced.kind = fields["kind"]
        announced.format = fields["format"]
        announced.job = self._job.name
        name = str(fields["artifact"])
        made = await self._registry.upload_artifact(
            announced,
            name if name.startswith("artifacts/") else f"artifacts/{name}",
            Path(fields["directory"]),
            key=self._key,
        )
        return self._made(made.name)

    @property
    def _key(self) -> str:
        """What tells the job from all others: all its attempts have it, and no other job of its name."""
        return f"{self._job.name} {self._desired.made}"

    def _made(self, name: str) -> dict[str, Any]:
        if name not in self.results:
            if len(self.results) >= MAX_RESULTS:
                raise JobFailure(
                    f"It has published {MAX_RESULTS} versions and artifacts; no more are taken.",
                    "UNSUPPORTED",
                )
            self.results.append(name)
        return {"name": name}

    async def _complete_lineage(self, lineage: manifest_pb2.Lineage, seed: int) -> None:
        lineage.job = self._job.name
        lineage.operation = lineage.operation or self._desired.kind
        digests = []
        for at, name in enumerate(lineage.datasets):
            if name not in self._artifacts:
                await self._artifact(name)
            lineage.datasets[at] = self._artifacts[name].name
            digests.append(self._artifacts[name].digest)
        code = self._artifacts.get(self._job.train.script.code) if self._desired.user_code else None
        if self._desired.user_code:
            # A program may ask for more than the job names; what its ranks were given here is its data, too.
            given = {one.name: one.digest for one in self._artifacts.values() if one != code}
            for name in sorted(given.keys() - set(lineage.datasets)):
                lineage.datasets.append(name)
                digests.append(given[name])
        if digests:
            lineage.data_digest = joined_digest(digests)
        lineage.code_digest = code.digest if code is not None else await in_thread(code_digest)
        lineage.seed = lineage.seed or seed
        for key, value in environment(self._processor).items():
            if key not in lineage.environment:
                lineage.environment[key] = value
