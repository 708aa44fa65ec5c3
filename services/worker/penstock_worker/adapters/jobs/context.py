"""What the work in a rank is given: `JobContext`, by way of the agent's desk."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.json_format import ParseDict

from penstock.registry.v1 import artifact_pb2, manifest_pb2, version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import InvalidArgument
from penstock_worker.adapters.jobs.agreement import Agreement
from penstock_worker.adapters.jobs.config import DECODED, ROUND_VARIABLE, LauncherConfig
from penstock_worker.adapters.jobs.line import Line
from penstock_worker.domain.runtime import Mesh
from penstock_worker.usecases.job_context import FetchedDataset, FetchedVersion

CHECKPOINT_SECONDS = 30.0
PROGRESS_SECONDS = 0.25
MAX_REPORT_BYTES = 1024 * 1024
MAX_LINE_CHARACTERS = 4_000


class RankContext:
    """Implements `penstock_worker.usecases.job_context.JobContext`; see there.

    Args:
        config: Of the task.
        line: To the agent.
        local: Number of this rank on its node.
    """

    def __init__(self, config: LauncherConfig, line: Line, *, local: int) -> None:
        self.config = config
        self.line = line
        self._job = config.job
        self._job.attempt = config.attempt
        self._local = local
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._generation = os.environ.get("PENSTOCK_GENERATION", "0")
        self._stopping = False
        self._progress_at = 0.0
        self._progress: dict[str, Any] | None = None
        self._checkpoint_at = time.monotonic()
        self._store: Any = None
        self._agreed = False
        said = self._job.train.checkpoint_interval.ToTimedelta().total_seconds()
        self._interval = said or CHECKPOINT_SECONDS
        self._scratch = Path(config.directory, "scratch", f"{self._rank}")
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def job(self) -> job_pb2.Job:
        """See `JobContext`."""
        return self._job

    @property
    def rank(self) -> int:
        """See `JobContext`."""
        return self._rank

    @property
    def world_size(self) -> int:
        """See `JobContext`."""
        return self._world_size

    @property
    def local_rank(self) -> int:
        """See `JobContext`."""
        return self._local

    @property
    def devices(self) -> Sequence[str]:
        """See `JobContext`."""
        return self.config.devices

    @property
    def threads(self) -> int:
        """See `JobContext`."""
        return self.config.threads

    @property
    def mesh(self) -> Mesh | None:
        """See `JobContext`."""
        if not self.config.redis_url:
            return None
        # No two processes may share a name: answers come to it.
        name = f"job-{self._job.name.rpartition('/')[2]}-{secrets.token_hex(6)}"
        return Mesh(self.config.redis_url, self.config.scheduler_address, name)

    @property
    def allow_python_runtime(self) -> bool:
        """See `JobContext`."""
        return self.config.allow_python_runtime

    @property
    def allow_compiled_models(self) -> bool:
        """See `JobContext`."""
        return self.config.allow_compiled_models

    @property
    def scratch(self) -> Path:
        """See `JobContext`."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch

    def dataset(self, name: str, *, most_bytes: int = 0) -> FetchedDataset:
        """See `JobContext`."""
        found = self.line.call("artifact", name=name, most_bytes=most_bytes)
        path = Path(found["path"])
        # The directory in the cache bears the digest's digits.
        return FetchedDataset(
            path,
            artifact_pb2.Artifact.FromString(base64.b64decode(found["artifact"])),
            Path(self.config.directory, DECODED, path.name),
        )

    def version(self, name: str) -> FetchedVersion:
        """See `JobContext`."""
        found = self.line.call("version", name=name)
        return FetchedVersion(
            Path(found["path"]), version_pb2.Version.FromString(base64.b64decode(found["version"]))
        )

    def progress(self, done: int, total: int, unit: str, phase: str = "") -> None:
        """See `JobContext`."""
        if self._rank:
            return
        self._progress = {"done": int(done), "total": int(total), "unit": unit, "phase": phase}
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_SECONDS or done == total:
            self._tell_progress(now)

    def _tell_progress(self, now: float) -> None:
        if self._progress is not None:
            self.line.note("progress", **self._progress)
            self._progress, self._progress_at = None, now

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `JobContext`."""
        if self._rank == 0:
            self.line.note(
                "metrics", step=int(step), values={name: float(value) for name, value in values.items()}
            )

    def log(self, text: str) -> None:
        """See `JobContext`."""
        for part in text.splitlines() or [""]:
            self.line.note("log", text=part[:MAX_LINE_CHARACTERS], rank=self._rank, error=False)

    def ask_to_stop(self, *_: object) -> None:
        """Make `should_stop` true; handles SIGTERM."""
        self._stopping = True

    def should_stop(self) -> bool:
        """See `JobContext`."""
        return self._stopping

    def checkpoint_due(self) -> bool:
        """See `JobContext`."""
        return time.monotonic() - self._checkpoint_at >= self._interval

    def new_checkpoint(self, step: int) -> Path:
        """See `JobContext`."""
        return Path(self.line.call("new_checkpoint", step=int(step))["path"])

    def commit_checkpoint(self, step: int) -> None:
        """See `JobContext`."""
        places = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        done = self.line.call(
            "commit_checkpoint",
            step=int(step),
            round=os.environ.get(ROUND_VARIABLE, ""),
            place=int(os.environ.get("GROUP_RANK", "0")),
            places=places,
        )
        several = self.config.tasks > 1 and done["complete"]
        # Whoever is last says that all have their part.
        if several and self._shared().add(f"checkpoint/{int(step)}", 1) % places == 0:
            self.line.note("checkpoint", step=int(step))
        self._checkpoint_at = time.monotonic()

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """See `JobContext`."""
        if self.config.tasks > 1:
            return self._common_checkpoint()
        return _found(self.line.call("last_checkpoint"))

    def publish_version(
        self,
        model: str,
        directory: Path,
        manifest: manifest_pb2.Manifest,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """See `JobContext`."""
        self._only_rank_0("publish_version")
        packed = base64.b64encode(manifest.SerializeToString()).decode()
        found = self.line.call(
            "publish_version",
            model=model,
            directory=str(directory.absolute()),
            manifest=packed,
            labels=dict(labels or {}),
            seed=self._seed(),
        )
        return str(found["name"])

    def publish_artifact(
        self,
        artifact: str,
        kind: artifact_pb2.ArtifactKind.ValueType,
        directory: Path,
        *,
        format: str = "",  # noqa: A002 - its name in the contract
        description: Mapping[str, Any] | None = None,
    ) -> str:
        """See `JobContext`."""
        self._only_rank_0("publish_artifact")
        found = self.line.call(
            "publish_artifact",
            artifact=artifact,
            kind=int(kind),
            directory=str(directory.absolute()),
            format=format,
            description=dict(description or {}),
        )
        return str(found["name"])

    def record_profile(self, version: str, profile: version_pb2.DeviceProfile) -> None:
        """See `JobContext`."""
        self._only_rank_0("record_profile")
        packed = base64.b64encode(profile.SerializeToString()).decode()
        self.line.call("record_profile", version=version, profile=packed)

    def record_metrics(self, version: str, metrics: Mapping[str, float]) -> None:
        """See `JobContext`."""
        self._only_rank_0("record_metrics")
        self.line.call("record_metrics", version=version, metrics=dict(metrics))

    def report(self, found: Mapping[str, Any]) -> None:
        """See `JobContext`."""
        if self._rank:
            return
        text = json.dumps(dict(found), allow_nan=False)
        if len(text) > MAX_REPORT_BYTES:
            raise InvalidArgument(f"A report of {len(text)} bytes is over the limit of {MAX_REPORT_BYTES}.")
        struct = ParseDict(json.loads(text), struct_pb2.Struct())
        self.line.call("report", report=base64.b64encode(struct.SerializeToString()).decode())

    def close(self) -> None:
        """Tell the last progress, and give up what need not survive."""
        self._tell_progress(time.monotonic())
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _seed(self) -> int:
        kind = self._job.WhichOneof("work") or ""
        work = getattr(self._job, kind, None)
        return int(getattr(work, "seed", 0))

    def _only_rank_0(self, what: str) -> None:
        if self._rank:
            raise InvalidArgument(f"Only rank 0 calls {what}; this is rank {self._rank}.")

    def _common_checkpoint(self) -> tuple[int, Path] | None:
        """Return what the ranks of all nodes go on from; what comes after the first call only looks."""
        if self._agreed:
            return _found(self.line.call("last_checkpoint"))
        self._agreed = True
        return Agreement(self.line, self._shared(), local=self._local).checkpoint()

    def _shared(self) -> Any:
        """Return torch's store where the ranks of all nodes meet."""
        if self._store is None:
            from torch.distributed import PrefixStore, TCPStore

            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = PrefixStore("penstock", TCPStore(address, port, is_master=False))
        return self._store


def _found(answer: Mapping[str, Any]) -> tuple[int, Path] | None:
    return (int(answer["step"]), Path(answer["path"])) if answer.get("path") else None
