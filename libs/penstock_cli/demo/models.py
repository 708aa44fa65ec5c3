"""What the demo trains: a small CNN on scikit-learn's digits, a decision tree on its breast-cancer set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penstock.errors import FailedPrecondition
from penstock.packaging.skops_types import import_skops
from penstock.tensors import Array

_SEED = 7
_TEST_IMAGES = 500
# 60 pictures hold six or so of each digit: enough to learn something, not to learn it well.
WEAK_IMAGES = 60
WEAK_EPOCHS = 8
GOOD_EPOCHS = 12
_BATCH = 32
TREE_DEPTH = 4


@dataclass(frozen=True)
class Data:
    """A set that was split in two; nothing is trained on the test part.

    Attributes:
        train: Features or images, FP32 or FP64, first dimension the examples.
        train_labels: What they are, INT64.
        test: The same for the test part.
        test_labels: The same for the test part.
    """

    train: Array
    train_labels: Array
    test: Array
    test_labels: Array


def load_digits() -> Data:
    """Return 1,797 handwritten digits as [n, 1, 8, 8] FP32 from 0 to 1."""
    datasets, _ = _sklearn()
    bunch = datasets.load_digits()
    images = (bunch.images / 16.0).astype(np.float32)[:, None, :, :]
    return _split(images, bunch.target.astype(np.int64), _TEST_IMAGES)


def load_breast_cancer() -> Data:
    """Return 569 tumours as [n, 30] FP64 with 0 for malignant and 1 for benign."""
    datasets, _ = _sklearn()
    bunch = datasets.load_breast_cancer()
    return _split(bunch.data.astype(np.float64), bunch.target.astype(np.int64), 150)


def train_cnn(data: Data, path: Path, *, images: int, epochs: int) -> float:
    """Train the CNN on some of the images, save it as a torch.export program, return its test accuracy."""
    torch = _torch()
    torch.manual_seed(_SEED)
    model = _cnn(torch)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    inputs = torch.from_numpy(data.train[:images])
    labels = torch.from_numpy(data.train_labels[:images])
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(_BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model.logits(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        guesses = model(torch.from_numpy(data.test))["digit"].numpy()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(
        model, (torch.from_numpy(data.test[:2]),), dynamic_shapes={"image": {0: batch}}
    )
    torch.export.save(program, path)
    return float((guesses == data.test_labels).mean())


def train_tree(data: Data, path: Path) -> float:
    """Train a decision tree, save it with skops, return its test accuracy."""
    _, tree = _sklearn()
    model = tree.DecisionTreeClassifier(max_depth=TREE_DEPTH, random_state=_SEED)
    model.fit(data.train, data.train_labels)
    import_skops().dump(model, path)
    return float(model.score(data.test, data.test_labels))


def _split(inputs: Array, labels: Array, test: int) -> Data:
    order = np.random.default_rng(_SEED).permutation(len(inputs))
    train, held_out = order[:-test], order[-test:]
    return Data(inputs[train], labels[train], inputs[held_out], labels[held_out])


def _cnn(torch: Any) -> Any:
    nn = torch.nn

    class DigitsCnn(nn.Module):  # type: ignore[misc, name-defined]
        """Two convolutions and a linear layer: 8×8 pixels to ten classes."""

        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * 4 * 4, 10),
            )

        def forward(self, image: Any) -> dict[str, Any]:
            probabilities = self.logits(image).softmax(-1)
            return {"digit": probabilities.argmax(-1), "probabilities": probabilities}

    return DigitsCnn()


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise _missing("torch") from error
    # The models are so small that threads only get into each other's way, most of all beside a mesh.
    torch.set_num_threads(1)
    return torch


def _sklearn() -> tuple[Any, Any]:
    try:
        import_skops()
        from sklearn import datasets, tree
    except ImportError as error:
        raise _missing("scikit-learn and skops") from error
    return datasets, tree


def _missing(library: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The demo trains models and needs {library}; `pip install 'penstock[local]'` brings everything."
    )
