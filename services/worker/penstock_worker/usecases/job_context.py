"""What the work of a job may ask of the process it runs in.

A kind of job is a function `run(context)` (entry points of the group `penstock.jobs`), called in every rank.
It reads `context.job`, fetches what that names, reports as it goes, looks often whether it should stop, and
publishes what it made. Whatever it raises ends the attempt: a `JobFailure` says how, anything else counts as
a fault of the program that may not come again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.registry.v1 import artifact_pb2, manifest_pb2, version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import PenstockError
from penstock_worker.domain.runtime import Mesh


class JobFailure(PenstockError):
    """The job cannot be done.

    Attributes:
        cause: stable word for it: INVALID_DATA, INVALID_RECIPE, DIVERGED, OUT_OF_MEMORY, OUT_OF_DISK,
            UNSUPPORTED, NUMERICS (answers differ from the source's), USER_CODE, NO_MODEL.
        permanent: starting again would meet the same.
    """

    def __init__(self, message: str, cause: str, *, permanent: bool = True) -> None:
        super().__init__(message)
        self.cause = cause
        self.permanent = permanent


class Stopped(Exception):
    """The work has stopped as it was asked to; its last checkpoint is where it goes on."""


@dataclass(frozen=True, slots=True)
class FetchedDataset:
    """A dataset on this node, checked. Files are read-only.

    Attributes:
        path: The directory of its files.
        artifact: What the registry says of it: name with number, digest, format, description.
        decoded: Directory, not there at first, of what all ranks of this node make of it once, until the
            task ends; None if nobody shares it.
    """

    path: Path
    artifact: artifact_pb2.Artifact
    decoded: Path | None = None


@dataclass(frozen=True, slots=True)
class FetchedVersion:
    """The bundle of a version on this node, checked. Files are read-only.

    Attributes:
        path: The directory of its files.
        version: What the registry says of it: name with number, manifest, digest, size.
    """

    path: Path
    version: version_pb2.Version


class JobContext(Protocol):
    """One rank of a job.

    Calls that reach the registry raise `PenstockError` once their retries are used up.
    """

    @property
    def job(self) -> job_pb2.Job:
        """The job; names in its work have their numbers."""

    @property
    def rank(self) -> int:
        """Which rank this is, from 0. Only rank 0 publishes and sets the report."""

    @property
    def world_size(self) -> int:
        """How many ranks there are in this attempt.

        With more than one, torch.distributed's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
        MASTER_PORT) is set, and no group is made yet.
        """

    @property
    def local_rank(self) -> int:
        """Which rank this is on its node, from 0."""

    @property
    def devices(self) -> Sequence[str]:
        """What torch calls the devices of this task: ["cpu"], or ["cuda:0", "cuda:1"]."""

    @property
    def threads(self) -> int:
        """Threads that this rank may compute with."""

    @property
    def mesh(self) -> Mesh | None:
        """Where deployments are called; only for the kind BATCH_PREDICT, which runs no user's code."""

    @property
    def allow_python_runtime(self) -> bool:
        """Whether the operator allows that code of bundles is run."""

    @property
    def allow_compiled_models(self) -> bool:
        """Whether the operator allows compiled code in bundles."""

    @property
    def scratch(self) -> Path:
        """A directory of this rank for what need not survive."""

    def dataset(self, name: str, *, most_bytes: int = 0) -> FetchedDataset:
        """Fetch a dataset; what this node has already is not fetched again.

        Args:
            name: Of the dataset.
            most_bytes: A larger one is refused (ResourceExhausted), not fetched; 0 for any size.
        """

    def version(self, name: str) -> FetchedVersion:
        """Fetch the bundle of a version, likewise."""

    def progress(self, done: int, total: int, unit: str, phase: str = "") -> None:
        """Say how far the job is (rank 0; others' words are dropped).

        May be called as often as one likes: a few a second are kept.
        """

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step (rank 0; others' words are dropped).

        All are kept, so not more than a few a second.
        """

    def log(self, text: str) -> None:
        """Write a line into the job's log."""

    def should_stop(self) -> bool:
        """Whether to save a checkpoint and raise `Stopped` now.

        Cheap enough for every step. In a group all ranks must agree first
        (`torch.distributed.all_reduce`), as they may learn it at different steps.
        """

    def checkpoint_due(self) -> bool:
        """Whether the interval since the last checkpoint is over.

        Likewise for all ranks to agree on (rank 0 decides).
        """

    def new_checkpoint(self, step: int) -> Path:
        """Return an empty directory for a checkpoint of this step; the same one for all ranks of a node."""

    def commit_checkpoint(self, step: int) -> None:
        """Say that this rank has written all its files of the step's checkpoint.

        It becomes the job's last one when all ranks have said so: durable on this node at once, and in
        the registry after an upload in the background.
        """

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Return the last complete checkpoint's step and directory (with the files of all ranks), if any."""

    def publish_version(
        self,
        model: str,
        directory: Path,
        manifest: manifest_pb2.Manifest,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """Upload a bundle as a new version and return its name (rank 0).

        The context completes the lineage with the job, the code's digest, the environment, and digests of
        the datasets and parents that the manifest's lineage names. It becomes READY if and when the job
        succeeds. Calling it again with equal contents is the same version.
        """

    def publish_artifact(
        self,
        artifact: str,
        kind: artifact_pb2.ArtifactKind.ValueType,
        directory: Path,
        *,
        format: str = "",  # noqa: A002 - its name in the contract
        description: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload a directory as an artifact and return its name (rank 0). It becomes READY likewise."""

    def record_profile(self, version: str, profile: version_pb2.DeviceProfile) -> None:
        """Store a profile on a version in place of the one of the same device; the rest stays (rank 0).

        The context sets the job and the time.
        """

    def record_metrics(self, version: str, metrics: Mapping[str, float]) -> None:
        """Store metrics in a version's manifest beside those of other names (rank 0)."""

    def report(self, found: Mapping[str, Any]) -> None:
        """Set what the job found (rank 0): numbers, words, lists and mappings of them.

        1 MiB at most as JSON.
        """
