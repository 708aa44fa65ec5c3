"""Versions and datasets to measure: real models of data that scikit-learn ships, and the rows to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from penstock.registry.v1.manifest_pb2 import Manifest
from penstock_worker.usecases.job_context import FetchedDataset
from support.job_context import dataset_of
from support.models import digits_test_set, write_manifest


def save_npz(directory: Path, x: Any, y: Any, **description: Any) -> FetchedDataset:
    """Rows and their answers as a dataset."""
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "data.npz", x=x, y=y)
    return dataset_of(directory, description={"label": "y", **description})


def digits_dataset(directory: Path) -> FetchedDataset:
    """Images [397, 1, 8, 8] that `build_digits_cnn` did not see."""
    return save_npz(directory, *digits_test_set())


def iris_dataset(directory: Path) -> FetchedDataset:
    """Iris: fp32 [150, 4] and three classes."""
    from sklearn.datasets import load_iris

    x, y = load_iris(return_X_y=True)
    return save_npz(directory, x.astype(np.float32), y)


def diabetes_dataset(directory: Path) -> FetchedDataset:
    """Diabetes: fp32 [442, 10] and a number."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return save_npz(directory, x.astype(np.float32), y.astype(np.float32))


def build_skops(directory: Path, model: Any, features: int, classes: int) -> Manifest:
    """A fitted model of scikit-learn: x → label and probabilities, or with 0 classes → prediction."""
    import skops.io

    directory.mkdir(parents=True, exist_ok=True)
    skops.io.dump(model, directory / "model.skops")
    outputs: list[tuple[str, str, tuple[int, ...]]] = (
        [("label", "INT64", (-1,)), ("probabilities", "FP64", (-1, classes))]
        if classes
        else [("prediction", "FP64", (-1,))]
    )
    return write_manifest(
        directory,
        runtime="sklearn",
        kind="skops",
        entrypoint="model.skops",
        inputs=[("x", "FP32", (-1, features))],
        outputs=outputs,
        max_batch_size=128,
    )
