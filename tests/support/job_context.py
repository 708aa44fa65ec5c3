"""A job context of files alone: what a kind of job does, without a mesh.

One directory holds all of a job: `setup.json` (the job, its datasets and versions as directories), metrics
and progress as JSON lines, the log, checkpoints, and what was published. `python -m support.job_context
DIRECTORY` is one rank of it, as torch.distributed's environment says; `started_ranks` starts several.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from penstock.registry.v1 import artifact_pb2, manifest_pb2, version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import NotFound, ResourceExhausted
from penstock_worker.domain.runtime import Mesh
from penstock_worker.usecases.job_context import FetchedDataset, FetchedVersion, JobFailure, Stopped

# Exit codes of a rank.
FAILED, STOPPED = 3, 4


def digest_of(directory: Path) -> str:
    """The tree digest of a directory: of its paths, sizes and contents."""
    sums = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        sums.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0{content}\n".encode())
    return f"sha256:{sums.hexdigest()}"


def dataset_of(
    directory: Path,
    *,
    name: str = "data",
    format: str = "npz",  # noqa: A002 - as the contract calls it
    description: Mapping[str, Any] | None = None,
) -> FetchedDataset:
    """A directory as the first version of a dataset."""
    artifact = artifact_pb2.Artifact(
        name=f"artifacts/{name}/versions/1",
        kind=artifact_pb2.ARTIFACT_KIND_DATASET,
        state=artifact_pb2.ARTIFACT_STATE_READY,
        format=format,
        digest=digest_of(directory),
        files=[
            version_pb2.BundleFile(path=str(path.relative_to(directory)), size_bytes=path.stat().st_size)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        ],
    )
    artifact.size_bytes = sum(file.size_bytes for file in artifact.files)
    if description:
        artifact.description.update(dict(description))
    return FetchedDataset(directory, artifact)


def version_of(directory: Path, manifest: manifest_pb2.Manifest, *, name: str = "model") -> FetchedVersion:
    """A bundle as the first version of a model."""
    version = version_pb2.Version(
        name=name if "/" in name else f"models/{name}/versions/1",
        state=version_pb2.VERSION_STATE_READY,
        manifest=manifest,
        digest=digest_of(directory),
    )
    return FetchedVersion(directory, version)


class FileJobContext:
    """One rank of a job whose everything is in a directory; implements `JobContext`.

    Args:
        root: The job's directory.
        job: What is to be done.
        datasets: By the names that the job's work has.
        versions: Likewise.
        rank: This rank.
        world_size: All ranks.
        local_rank: This rank on its node; None for all on one node.
        devices: What torch may use.
        threads: Threads of this rank.
        checkpoint_seconds: Between two checkpoints; None takes what the job says, or 30 s.
    """

    def __init__(
        self,
        root: Path,
        job: job_pb2.Job,
        *,
        datasets: Mapping[str, FetchedDataset] | None = None,
        versions: Mapping[str, FetchedVersion] | None = None,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int | None = None,
        devices: Sequence[str] = ("cpu",),
        threads: int = 1,
        checkpoint_seconds: float | None = None,
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self._job = job
        self._datasets, self._versions = dict(datasets or {}), dict(versions or {})
        self._rank, self._world_size = rank, world_size
        self._local_rank = rank if local_rank is None else local_rank
        self._devices, self._threads = tuple(devices), threads
        said = job.train.checkpoint_interval.ToTimedelta().total_seconds() if job.HasField("train") else 0.0
        self._interval = checkpoint_seconds if checkpoint_seconds is not None else said or 30.0
        self._last_checkpoint = time.monotonic()
        self._stop = root / "stop"
        self.allowed = False
        self.mesh: Mesh | None = None

    @property
    def job(self) -> job_pb2.Job:
        return self._job

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def local_rank(self) -> int:
        return self._local_rank

    @property
    def devices(self) -> Sequence[str]:
        return self._devices

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def allow_python_runtime(self) -> bool:
        return self.allowed

    @property
    def allow_compiled_models(self) -> bool:
        return self.allowed

    @property
    def scratch(self) -> Path:
        directory = self.root / "scratch" / str(self._rank)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def dataset(self, name: str, *, most_bytes: int = 0) -> FetchedDataset:
        if name not in self._datasets:
            raise NotFound(f"There is no {name}.")
        found = self._datasets[name]
        if most_bytes and found.artifact.size_bytes > most_bytes:
            raise ResourceExhausted(f"{name} is too large.")
        return dataclasses.replace(found, decoded=self.root / "decoded" / found.path.name)

    def version(self, name: str) -> FetchedVersion:
        return self._versions[name]

    def progress(self, done: int, total: int, unit: str, phase: str = "") -> None:
        if self._rank == 0:
            self._write("progress.jsonl", {"done": done, "total": total, "unit": unit, "phase": phase})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if self._rank == 0:
            self._write("metrics.jsonl", {"step": step, "values": dict(values)})

    def log(self, text: str) -> None:
        self._write("log.jsonl", {"rank": self._rank, "text": text})

    def should_stop(self) -> bool:
        return self._stop.exists()

    def stop(self) -> None:
        """Ask all ranks to stop."""
        self._stop.touch()

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self._last_checkpoint >= self._interval

    def new_checkpoint(self, step: int) -> Path:
        directory = self._checkpoint(step)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def commit_checkpoint(self, step: int) -> None:
        directory = self._checkpoint(step)
        notes = directory.with_name(f"{directory.name}.committed")
        notes.mkdir(exist_ok=True)
        (notes / f"{self._rank}.of.{self._world_size}").touch()
        self._last_checkpoint = time.monotonic()

    def last_checkpoint(self) -> tuple[int, Path] | None:
        complete = []
        for notes in (self.root / "checkpoints").glob("*.committed"):
            ranks = list(notes.iterdir())
            if ranks and len(ranks) == int(ranks[0].suffix.removeprefix(".")):
                step, _, attempt = notes.stem.partition("-")
                complete.append((int(step), int(attempt), notes.with_suffix("")))
        if not complete:
            return None
        step, _, directory = max(complete)
        return step, directory

    def publish_version(
        self,
        model: str,
        directory: Path,
        manifest: manifest_pb2.Manifest,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        manifest.lineage.job = self._job.name
        for name in manifest.lineage.datasets:
            manifest.lineage.data_digest = self._datasets[name].artifact.digest
        name = self._publish(model, directory)
        target = self.root / "published" / name
        text = json.dumps(json_format.MessageToDict(manifest, preserving_proto_field_name=True), indent=2)
        (target / "manifest.yaml").write_text(text + "\n")
        return name

    def publish_artifact(
        self,
        artifact: str,
        kind: artifact_pb2.ArtifactKind.ValueType,
        directory: Path,
        *,
        format: str = "",  # noqa: A002 - as the contract calls it
        description: Mapping[str, Any] | None = None,
    ) -> str:
        name = self._publish(artifact, directory)
        self._write("artifacts.jsonl", {"name": name, "kind": kind, "format": format})
        return name

    def record_profile(self, version: str, profile: version_pb2.DeviceProfile) -> None:
        self._write("profiles.jsonl", {"version": version, "profile": json_format.MessageToDict(profile)})

    def record_metrics(self, version: str, metrics: Mapping[str, float]) -> None:
        self._write("recorded.jsonl", {"version": version, "metrics": dict(metrics)})

    def report(self, found: Mapping[str, Any]) -> None:
        if self._rank == 0:
            (self.root / "report.json").write_text(json.dumps(found))

    # What tests look at.

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What was written into metrics, progress, log or artifacts."""
        path = self.root / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def last_metrics(self) -> dict[str, float]:
        """The latest value of each metric."""
        return {name: value for line in self.lines("metrics") for name, value in line["values"].items()}

    def found(self) -> dict[str, Any]:
        """What the job reported."""
        found: dict[str, Any] = json.loads((self.root / "report.json").read_text())
        return found

    def published(self) -> list[FetchedVersion]:
        """The versions that were published, oldest first."""
        found = []
        for path in sorted((self.root / "published" / "models").glob("*/versions/*/manifest.yaml")):
            manifest = json_format.Parse(path.read_text(), manifest_pb2.Manifest())
            name = str(path.parent.relative_to(self.root / "published"))
            found.append(version_of(path.parent, manifest, name=name))
        return found

    def _checkpoint(self, step: int) -> Path:
        return self.root / "checkpoints" / f"{step:012d}-{self._job.attempt}"

    def _publish(self, parent: str, directory: Path) -> str:
        if self._rank:
            raise AssertionError(f"rank {self._rank} publishes")
        versions = self.root / "published" / parent / "versions"
        number = len(list(versions.iterdir())) + 1 if versions.exists() else 1
        shutil.copytree(directory, versions / str(number))
        return f"{parent}/versions/{number}"

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with (self.root / name).open("a") as file:
            file.write(json.dumps(value) + "\n")


def save_setup(
    root: Path,
    job: job_pb2.Job,
    *,
    datasets: Mapping[str, FetchedDataset] | None = None,
    versions: Mapping[str, FetchedVersion] | None = None,
    checkpoint_seconds: float | None = None,
) -> None:
    """Write down a job for processes of its own."""
    root.mkdir(parents=True, exist_ok=True)
    found = {
        "job": json_format.MessageToDict(job),
        "datasets": {
            name: [str(dataset.path), json_format.MessageToDict(dataset.artifact)]
            for name, dataset in (datasets or {}).items()
        },
        "versions": {
            name: [str(version.path), json_format.MessageToDict(version.version)]
            for name, version in (versions or {}).items()
        },
        "checkpoint_seconds": checkpoint_seconds,
    }
    (root / "setup.json").write_text(json.dumps(found))


def context_from_environment(root: Path) -> FileJobContext:
    """This process's rank of the job in `root`, by RANK, WORLD_SIZE and LOCAL_RANK."""
    found = json.loads((root / "setup.json").read_text())
    job = json_format.ParseDict(found["job"], job_pb2.Job())
    job.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + max(1, job.attempt)
    datasets = {
        name: FetchedDataset(Path(path), json_format.ParseDict(artifact, artifact_pb2.Artifact()))
        for name, (path, artifact) in found["datasets"].items()
    }
    versions = {
        name: FetchedVersion(Path(path), json_format.ParseDict(version, version_pb2.Version()))
        for name, (path, version) in found["versions"].items()
    }
    return FileJobContext(
        root,
        job,
        datasets=datasets,
        versions=versions,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        checkpoint_seconds=found["checkpoint_seconds"],
    )


@contextmanager
def started_ranks(root: Path, ranks: int, *, attempt: int = 0) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start all ranks of the job in `root` as torchrun would; those that still run are killed at the end.

    Args:
        root: Where `save_setup` was.
        ranks: How many.
        attempt: Counts attempts, from 0.

    Yields:
        The processes, by rank. Exit codes: 0, FAILED (the words are in `failure.<rank>.json`), STOPPED.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RESTART_COUNT": str(attempt),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            with (root / f"output.{rank}.txt").open("ab") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "support.job_context", str(root)],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(30)


def run_ranks(root: Path, ranks: int, *, attempt: int = 0, timeout: float = 100) -> list[int]:
    """Run all ranks of the job in `root` to their end; give their exit codes."""
    deadline = time.monotonic() + timeout
    with started_ranks(root, ranks, attempt=attempt) as processes:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]


def main() -> int:
    """One rank, as the environment says."""
    root = Path(sys.argv[1])
    context = context_from_environment(root)
    kind = str(context.job.WhichOneof("work"))
    (entry,) = importlib.metadata.entry_points(group="penstock.jobs", name=kind)
    try:
        entry.load()(context)
    except Stopped:
        return STOPPED
    except JobFailure as failure:
        found = {"message": str(failure), "cause": failure.cause, "permanent": failure.permanent}
        (root / f"failure.{context.rank}.json").write_text(json.dumps(found))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
