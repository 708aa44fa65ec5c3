"""Compressions without a mesh: sources trained by recipes, and jobs in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.compression.job import run
from penstock_worker.usecases.job_context import FetchedDataset, FetchedVersion
from support.job_context import FileJobContext
from support.training import example, train

Steps = list[tuple[str, Mapping[str, Any]]]


class Source:
    """A version to compress, with the dataset it was trained on.

    Args:
        version: The version.
        dataset: The dataset.
    """

    def __init__(self, version: FetchedVersion, dataset: FetchedDataset) -> None:
        self.version, self.dataset = version, dataset

    def compress(
        self,
        root: Path,
        steps: Steps,
        change: Callable[[job_pb2.Job], None] | None = None,
        *,
        versions: Mapping[str, FetchedVersion] | None = None,
        threads: int = 1,
    ) -> FileJobContext:
        """Run a job with these steps (none: what `change` asks for); give its context."""
        context = self.context(root, steps, change, versions=versions, threads=threads)
        run(context)
        return context

    def context(
        self,
        root: Path,
        steps: Steps,
        change: Callable[[job_pb2.Job], None] | None = None,
        *,
        versions: Mapping[str, FetchedVersion] | None = None,
        threads: int = 1,
    ) -> FileJobContext:
        """The context of such a job, before it runs."""
        job = job_pb2.Job(name=f"jobs/{root.name}", attempt=1)
        job.compress.version = self.version.version.name
        job.compress.dataset = self.dataset.artifact.name
        for name, parameters in steps:
            job.compress.steps.add(name=name).parameters.update(dict(parameters))
        if change is not None:
            change(job)
        torch.set_num_threads(threads)
        return FileJobContext(
            root,
            job,
            datasets={self.dataset.artifact.name: self.dataset},
            versions={self.version.version.name: self.version, **(versions or {})},
            threads=threads,
        )


def trained(root: Path, dataset: FetchedDataset, **recipe: Any) -> Source:
    """A version trained by a recipe."""
    (version,) = train(root, dataset, **recipe).published()
    return Source(version, dataset)


def digits_cnn(root: Path, *, epochs: int = 8, channels: tuple[int, ...] = (32, 64), **more: Any) -> Source:
    """A convolutional network on scikit-learn's digits; 8 epochs give 0.98 and more in 2 s."""
    data = example(root / "data", "sklearn:digits")
    parameters = {"channels": list(channels), "hidden": 128, **more}
    return trained(
        root / "train", data, architecture="cnn", parameters=parameters, epochs=epochs, learning_rate=0.002
    )


def candidates(context: FileJobContext) -> list[dict[str, Any]]:
    """What a job reported of the source (the first) and of all that it tried."""
    found: list[dict[str, Any]] = context.found()["candidates"]
    return found
