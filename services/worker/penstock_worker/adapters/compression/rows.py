"""Rows of a dataset in memory, as the module of a recipe takes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from penstock_kit.oip import Array
from penstock_worker.adapters.measuring.questions import Questions
from penstock_worker.adapters.training.rows import Rows, TensorRows

# Rows that are asked for at once when all are gathered.
_CHUNK = 1024
_CPU = torch.device("cpu")


def gathered(questions: Questions) -> Rows:
    """Gather all rows as a module of one tensor takes them: several inputs side by side, texts filled up."""
    inputs, targets = [], []
    for at in range(0, len(questions), _CHUNK):
        given, right = questions.batch(np.arange(at, min(at + _CHUNK, len(questions)), dtype=np.int64))
        inputs.append(side_by_side(tensors_of(given)))
        targets.append(torch.from_numpy(np.ascontiguousarray(right)))
    if inputs[0].dim() == 2 and inputs[0].dtype == torch.int64:
        longest = max(part.shape[1] for part in inputs)
        inputs = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in inputs]
    return TensorRows(torch.cat(inputs), torch.cat(targets), _CPU)


def tensors_of(given: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
    """Return inputs as tensors, in the order they have."""
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in given.values())


def side_by_side(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Lay several inputs of a row beside one another, as a recipe's model takes them."""
    return inputs[0] if len(inputs) == 1 else torch.cat([part.flatten(1) for part in inputs], dim=1)


def no_rows() -> Rows:
    """Return rows for what has no module to train."""
    return TensorRows(torch.zeros(0), torch.zeros(0), _CPU)
