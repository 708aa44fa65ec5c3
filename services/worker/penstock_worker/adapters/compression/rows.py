"""Rows of a dataset as a version is asked them, texts as the tokens that its bundle makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from penstock_kit.oip import Array, Signature
from penstock_worker.adapters.data import OpenedDataset, Part
from penstock_worker.adapters.measuring.questions import Questions, questions_of
from penstock_worker.adapters.training.architectures import Blueprint
from penstock_worker.adapters.training.rows import Rows, TensorRows
from penstock_worker.adapters.training.texts import (
    TOKENIZER_FILE,
    encode_padded,
    encode_stream,
    load_tokenizer,
)

# Rows that are asked for at once when all are gathered.
_CHUNK = 1024
_CPU = torch.device("cpu")


def questions_for(directory: Path, signature: Signature, dataset: OpenedDataset, part: Part) -> Questions:
    """Return the rows of a part of a dataset as the version in `directory` is asked them."""
    if dataset.task in {"text", "language_model"} and (directory / TOKENIZER_FILE).exists():
        return TokenQuestions(directory, signature, dataset, part)
    return questions_of(signature, dataset, part)


class TokenQuestions:
    """Texts as token ids, encoded once.

    Args:
        directory: The bundle that has the tokenizer, and the length that the model was built for.
        signature: Of its model, which has one input.
        dataset: The opened dataset.
        part: Which of its parts.
    """

    def __init__(self, directory: Path, signature: Signature, dataset: OpenedDataset, part: Part) -> None:
        self.task = dataset.task
        self.classes = tuple(dataset.classes)
        self._name = signature.inputs[0].name
        length = int(Blueprint.load(directory).parameters["length"])
        tokenizer = load_tokenizer(directory)
        rows = part.all()
        if self.task == "language_model":
            stream = encode_stream(tokenizer, rows.texts)
            count = max(0, (len(stream) - 1) // length)
            self._tokens = stream[: count * length].reshape(count, length)
            self._targets = stream[1 : count * length + 1].reshape(count, length)
        else:
            self._tokens, self._targets = encode_padded(tokenizer, rows.texts, length), rows.targets

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, indices: Array) -> tuple[dict[str, Array], Array]:
        """Return rows by their numbers, as long as the longest of them."""
        chosen = torch.from_numpy(np.ascontiguousarray(indices))
        tokens = self._tokens[chosen]
        if self.task == "text":
            tokens = tokens[:, : max(1, int((tokens != 0).sum(1).max()))]
        return {self._name: tokens.numpy()}, self._targets[chosen].numpy()


def gathered(questions: Questions) -> Rows:
    """Gather all rows as a model of one tensor takes them; texts filled up to the longest."""
    inputs, targets = [], []
    for at in range(0, len(questions), _CHUNK):
        given, right = questions.batch(np.arange(at, min(at + _CHUNK, len(questions)), dtype=np.int64))
        inputs.append(torch.from_numpy(np.ascontiguousarray(next(iter(given.values())))))
        targets.append(torch.from_numpy(np.ascontiguousarray(right)))
    if inputs and inputs[0].dim() == 2 and inputs[0].dtype == torch.int64:
        longest = max(part.shape[1] for part in inputs)
        inputs = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in inputs]
    return TensorRows(torch.cat(inputs), torch.cat(targets), _CPU)
