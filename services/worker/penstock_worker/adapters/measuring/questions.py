"""Rows of an opened dataset as a version is asked them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from penstock_kit.oip import Array, Signature
from penstock_worker.adapters.data import OpenedDataset, Part
from penstock_worker.adapters.measuring.rows import inputs_of


class Questions(Protocol):
    """Rows with their right answers.

    Attributes:
        task: tabular, image, text or language_model.
        classes: Names of the classes, by index; empty if the answers are numbers or tokens.
    """

    task: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many rows."""
        ...

    def batch(self, indices: Array) -> tuple[dict[str, Array], Array]:
        """Return rows by their numbers.

        Args:
            indices: int64 [n].

        Returns:
            The inputs of the version, and targets: int64 [n] (classes), int64 [n, T] (tokens, -100 for those
            that do not count) or float32 [n] (numbers).

        Raises:
            JobFailure: INVALID_DATA: the rows do not fit the version.
        """
        ...


class PartQuestions:
    """Rows of a part of a dataset, for versions with this signature; texts as BYTES.

    Args:
        dataset: The opened dataset.
        part: Which of its parts.
        signature: Of the version that is asked.
    """

    def __init__(self, dataset: OpenedDataset, part: Part, signature: Signature) -> None:
        self.task = dataset.task
        self.classes = tuple(dataset.classes)
        self._part = part
        self._signature = signature

    def __len__(self) -> int:
        return len(self._part)

    def batch(self, indices: Array) -> tuple[dict[str, Array], Array]:
        """Return rows by their numbers."""
        found = self._part.batch(torch.from_numpy(np.ascontiguousarray(indices)))
        columns: dict[str, Any] = dict(found.inputs)
        if found.texts:
            columns["text"] = list(found.texts)
        return inputs_of(self._signature, columns), found.targets.numpy()


def questions_of(signature: Signature, dataset: OpenedDataset, part: Part) -> Questions:
    """Return the rows of a part of a dataset as a version with this signature is asked them."""
    return PartQuestions(dataset, part, signature)
