"""The datasets that ship with scikit-learn and Python, and trainings on them without a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock.datasets import detect_format, write_example
from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.training.job import run
from penstock_worker.usecases.job_context import FetchedDataset
from support.job_context import FileJobContext, dataset_of


def example(directory: Path, name: str) -> FetchedDataset:
    """A dataset of `penstock.datasets.EXAMPLES`, such as sklearn:digits."""
    directory.mkdir(parents=True, exist_ok=True)
    write_example(name, directory)
    return dataset_of(directory, name=name.replace(":", "-"), format=detect_format(directory))


def arrays(directory: Path, **named: Any) -> FetchedDataset:
    """Arrays as an npz dataset."""
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "data.npz", **named)
    return dataset_of(directory)


def train(
    root: Path,
    dataset: FetchedDataset,
    change: Callable[[job_pb2.Job], None] | None = None,
    *,
    checkpoint_seconds: float | None = None,
    versions: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> FileJobContext:
    """Train a recipe in this process; give the context with all that came of it.

    Args:
        root: The job's directory.
        dataset: What to learn from.
        change: What else the job says.
        checkpoint_seconds: As FileJobContext has it.
        versions: To go on from, by name.
        **recipe: Fields of Recipe; `optimizer` and `schedule` by name, and `parameters` of the architecture.
    """
    context = context_for(
        root, dataset, change, checkpoint_seconds=checkpoint_seconds, versions=versions, **recipe
    )
    torch.set_num_threads(1)
    run(context)
    return context


def context_for(
    root: Path,
    dataset: FetchedDataset,
    change: Callable[[job_pb2.Job], None] | None = None,
    *,
    checkpoint_seconds: float | None = None,
    versions: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> FileJobContext:
    """The context of such a training, before it runs."""
    job = job_for(dataset, change, **recipe)
    return FileJobContext(
        root,
        job,
        datasets={job.train.dataset: dataset},
        versions=versions,
        checkpoint_seconds=checkpoint_seconds,
    )


def job_for(
    dataset: FetchedDataset, change: Callable[[job_pb2.Job], None] | None = None, **recipe: Any
) -> job_pb2.Job:
    """The job of such a training."""
    job = job_pb2.Job(name="jobs/training", attempt=1)
    job.train.dataset = dataset.artifact.name
    job.train.model = "models/model"
    for name, value in recipe.items():
        match name:
            case "optimizer" | "schedule" | "strategy":
                getattr(job.train.recipe, name).name = value
            case "learning_rate":
                job.train.recipe.optimizer.learning_rate = value
            case "optimizer_parameters":
                job.train.recipe.optimizer.parameters.update(value)
            case "schedule_parameters":
                job.train.recipe.schedule.parameters.update(value)
            case "parameters":
                job.train.recipe.architecture_parameters.update(value)
            case "seed":
                job.train.seed = value
            case "patience":
                job.train.recipe.early_stopping.patience = value
            case "class_weights":
                job.train.recipe.class_weights.update(value)
            case _:
                setattr(job.train.recipe, name, value)
    if change is not None:
        change(job)
    return job
