"""What the desk does for one task: fetches, keeps checkpoints, publishes, passes events on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from penstock.registry.v1 import artifact_pb2, manifest_pb2, version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import InvalidArgument, PenstockError
from penstock_kit.threads import in_thread
from penstock_worker.adapters.jobs.events import EventSender
from penstock_worker.adapters.jobs.lineage import code_digest, environment, joined_digest
from penstock_worker.adapters.jobs.registry import JobRegistry, described
from penstock_worker.adapters.jobs.rooms import PART_FILE, JobRoom
from penstock_worker.adapters.jobs.spool import EventSpool
from penstock_worker.domain.supervision import BundleFile, WantedFiles
from penstock_worker.domain.task import DesiredTask, End, EndKind, worst
from penstock_worker.usecases.job_context import JobFailure
from penstock_worker.usecases.ports import BundleStore

SETTLE_SECONDS = 60.0
"""How long a group over several nodes waits for the upload of its last checkpoint before it goes on."""
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
        self._restored: dict[tuple[int, int], tuple[int, Path] | None] = {}
        self._starts = 0
        self._held: set[int] = set()
        self._progress_from: tuple[float, int] | None = None

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
                self._add(job_pb2.JobEvent(progress=self._progress(fields)))
            case "metrics":
                values = dict(list(fields["values"].items())[:MAX_METRICS])
                self._add(
                    job_pb2.JobEvent(metrics=job_pb2.MetricPoint(step=int(fields["step"]), values=values))
                )
            case "running":
                self.running = True
                self._progress_from = None
                self._changed()
            case "rendezvous":
                self.rendezvous = str(fields["address"])
                self._changed()
            case "memory":
                self.memory_bytes = int(fields["bytes"])

    async def call(self, op: str, rank: int, generation: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """See `Clerk`."""
        generation += self._starts * GENERATIONS
        match op:
            case "artifact":
                return await self._artifact(str(fields["name"]))
            case "version":
                return await self._version(str(fields["name"]))
            case "new_checkpoint":
                path = await in_thread(self._room.store.begin, int(fields["step"]), self._group(generation))
                return {"path": str(path)}
            case "commit_checkpoint":
                return await self._commit(int(fields["step"]), rank, generation)
            case "last_checkpoint":
                found = await self._last(int(fields["step"]), generation, shared=bool(fields.get("shared")))
                return {"step": found[0], "path": str(found[1])} if found else {}
            case "settle":
                await self._room.settle(SETTLE_SECONDS)
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

    async def _artifact(self, name: str) -> dict[str, Any]:
        async with self._locks[name]:
            if name not in self._artifacts:
                full = name if "/" in name else f"artifacts/{name}"
                found = await self._registry.artifact(full)
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

        def say(words: str) -> None:
            phase = f"{name}: {words}"
            self._add(job_pb2.JobEvent(progress=job_pb2.JobProgress(phase=phase)))

        return await self._leases.enter_async_context(self._bundles.lease(wanted, say))

    # Checkpoints.

    async def _commit(self, step: int, rank: int, generation: int) -> dict[str, Any]:
        desired, room = self._desired, self._room
        path = room.store.directory / f"{step}.partial"
        await in_thread(room.mark_part, path, step, desired.index, desired.tasks)
        complete = await in_thread(room.store.commit, step, rank, desired.ranks, self._group(generation))
        if complete:
            self._restored.clear()
            if desired.tasks == 1:
                self._note_checkpoint(step, "")
            room.send(
                step,
                room.store.directory / str(step),
                part=desired.index,
                parts=desired.tasks,
                attempt=desired.attempt,
                sent=self._note_checkpoint if desired.index == 0 else _nobody,
            )
        return {"complete": complete}

    def _note_checkpoint(self, step: int, artifact: str) -> None:
        self._add(job_pb2.JobEvent(checkpoint=job_pb2.CheckpointNote(step=step, artifact=artifact)))

    async def _last(self, step: int, generation: int, *, shared: bool) -> tuple[int, Path] | None:
        """Return the last checkpoint, or that of a step; all ranks of a generation get the same."""
        key = generation, step
        async with self._locks["checkpoint"]:
            if key not in self._restored:
                found = self._restored[key] = await self._find(step, generation, shared=shared)
                if found is not None:
                    # Read at leisure: newer ones may come before all ranks have.
                    self._room.store.hold(found[0])
                    self._held.add(found[0])
        return self._restored[key]

    async def _find(self, step: int, generation: int, *, shared: bool) -> tuple[int, Path] | None:
        room = self._room
        local = await in_thread(room.store.last)
        if local is not None and (shared or await in_thread(room.parts_of, local[1]) != 1):
            # Other nodes do not have it, or this one does not have all of it.
            local = None
        if local is not None and generation > GENERATIONS:
            return local
        try:
            async with asyncio.timeout(None if local is None else LOOK_SECONDS):
                stored = await room.stored()
        except (PenstockError, TimeoutError):
            if local is None:
                raise
            return local
        for found, parts in stored:
            if step >= 0 and found != step:
                continue
            if local is not None and local[0] >= found:
                break
            return found, await self._gather(found, parts)
        return local if step < 0 or (local and local[0] == step) else None

    async def _gather(self, step: int, parts: list[artifact_pb2.Artifact]) -> Path:
        """Bring all parts of a checkpoint into one directory."""
        self.say(f"Fetching the checkpoint of step {step} from the registry.")
        paths = [await self._lease(part.name, part.digest, b"", part.files) for part in parts]
        if len(paths) == 1:
            return paths[0]
        target = self._room.store.restored(step)
        await in_thread(_join, paths, target)
        return target

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
            job=self._job.name,
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
            key=self._job.name,
        )
        return self._made(made.name)

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
        if digests:
            lineage.data_digest = joined_digest(digests)
        code = self._artifacts.get(self._job.train.script.code) if self._desired.user_code else None
        lineage.code_digest = code.digest if code is not None else await in_thread(code_digest)
        lineage.seed = lineage.seed or seed
        for key, value in environment(self._processor).items():
            if key not in lineage.environment:
                lineage.environment[key] = value


def _nobody(step: int, artifact: str) -> None:
    """Only the part of task 0 stands for the checkpoint."""


def _join(paths: list[Path], target: Path) -> None:
    """Copy several directories into one, which appears in one step. Blocking."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in paths:
        shutil.copytree(path, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PART_FILE))
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)
