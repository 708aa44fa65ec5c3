"""Datasets that ship with scikit-learn and Python, and trainings on them without a mesh.

scikit-learn's digits, breast cancer, wine and diabetes are of the UCI repository and others, free to use (BSD);
the texts are those of Python's own documentation and library (PSF licence).
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.training.job import run
from penstock_worker.usecases.job_context import FetchedDataset
from support.job_context import FileJobContext, dataset_of

# Packages of the library whose docstrings are told apart.
PACKAGES = ("email", "asyncio", "unittest", "tkinter", "multiprocessing")


def digits(directory: Path) -> FetchedDataset:
    """1,797 images of 8×8 pixels, 10 classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _npz(directory, "digits", (found.images[:, None] / 16).astype(np.float32), found.target)


def breast_cancer(directory: Path) -> FetchedDataset:
    """569 rows of 30 numbers, 2 classes."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _npz(directory, "breast_cancer", x.astype(np.float32), y)


def wine(directory: Path) -> FetchedDataset:
    """178 rows of 13 numbers, 3 classes."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    return _npz(directory, "wine", x.astype(np.float32), y)


def diabetes(directory: Path) -> FetchedDataset:
    """442 rows of 10 numbers, a number to be predicted."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return _npz(directory, "diabetes", x.astype(np.float32), y.astype(np.float32))


def _npz(directory: Path, name: str, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> FetchedDataset:
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / f"{name}.npz", x=x, y=y)
    return dataset_of(directory, name=name)


def docstrings(package: str) -> list[str]:
    """The docstrings of a package of Python's library, each once, in a fixed order."""
    found: dict[str, None] = {}
    root = Path(sysconfig.get_path("stdlib")) / package
    for path in sorted(root.rglob("*.py")):
        if "test" in path.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    found.setdefault(text)
    return list(found)


def topics() -> list[str]:
    """The chapters of Python's reference that `help()` shows: about 700 kB of English with code."""
    from pydoc_data.topics import topics as found

    return [found[name] for name in sorted(found)]


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
