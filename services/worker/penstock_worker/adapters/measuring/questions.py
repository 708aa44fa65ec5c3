"""Rows of an opened dataset as a version is asked them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from penstock_kit.oip import Array, Signature
from penstock_worker.adapters.data import OpenedDataset, Part
from penstock_worker.adapters.measuring.rows import inputs_of
from penstock_worker.adapters.training.architectures import Blueprint
from penstock_worker.adapters.training.rows import TokenWindows
from penstock_worker.adapters.training.texts import encode_padded, load_tokenizer
from penstock_worker.adapters.training.tokens import stream_of


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


class TextQuestions:
    """Texts as the token ids that a recipe's version takes, encoded with the tokenizer of its bundle.

    Args:
        dataset: The opened dataset.
        part: Which of its parts.
        signature: Of the version that is asked.
        directory: The files of its bundle.

    Raises:
        JobFailure: UNSUPPORTED if the bundle has no tokenizer.
    """

    def __init__(self, dataset: OpenedDataset, part: Part, signature: Signature, directory: Path) -> None:
        self.task = dataset.task
        self.classes = tuple(dataset.classes)
        self._part = part
        self._signature = signature
        self._tokenizer = load_tokenizer(directory)
        self._length = int(Blueprint.load(directory).parameters["length"])
        self._windows: TokenWindows | None = None
        if self.task == "language_model":
            which = "train" if part is dataset.train else "held_out"
            tokens = stream_of(dataset.shared, f"{dataset.key}-{which}", self._tokenizer, part.texts)
            self._windows = TokenWindows(tokens, self._length, torch.device("cpu"))

    def __len__(self) -> int:
        return len(self._part) if self._windows is None else len(self._windows)

    def batch(self, indices: Array) -> tuple[dict[str, Array], Array]:
        """Return rows by their numbers; for language models, windows of tokens and what follows each."""
        chosen = torch.from_numpy(np.ascontiguousarray(indices))
        if self._windows is not None:
            tokens, targets = self._windows.batch(chosen)
        else:
            found = self._part.batch(chosen)
            tokens, targets = encode_padded(self._tokenizer, found.texts, self._length), found.targets
        return inputs_of(self._signature, {"tokens": tokens}), targets.numpy()


def questions_of(
    signature: Signature, dataset: OpenedDataset, part: Part, *, directory: Path | None = None
) -> Questions:
    """Return the rows of a part of a dataset as a version is asked them.

    Args:
        signature: Of the version.
        dataset: The opened dataset.
        part: Which of its parts.
        directory: The files of the version's bundle, whose tokenizer encodes texts for a version that takes
            numbers.

    Raises:
        JobFailure: UNSUPPORTED if texts must be encoded and nobody knows how.
    """
    takes_texts = any(spec.datatype == "BYTES" for spec in signature.inputs)
    if directory is not None and dataset.task in ("text", "language_model") and not takes_texts:
        return TextQuestions(dataset, part, signature, directory)
    return PartQuestions(dataset, part, signature)
