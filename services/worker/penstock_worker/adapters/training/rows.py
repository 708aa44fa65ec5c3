"""Rows to train on, as tensors that are ready to be computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from penstock_worker.adapters.data import Part


class Rows(Protocol):
    """One part of a dataset: what a model takes and what it should give, row by row."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows by their numbers.

        Args:
            indices: int64 [B], on the CPU.

        Returns:
            Inputs [B, …] and targets [B] or [B, …], on the device that computes.
        """
        ...


class TensorRows:
    """Rows that are in memory: a batch is one gathering by index, which no worker process makes faster.

    Args:
        inputs: [N, …].
        targets: [N] or [N, …].
        device: Where they are kept.
    """

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, device: torch.device) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} rows of inputs and {len(targets)} of targets")
        self.inputs, self.targets = inputs.to(device), targets.to(device)
        self._device = device

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather rows."""
        if indices.device != self._device:
            indices = indices.to(self._device, non_blocking=True)
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)


class PartRows:
    """Rows of a dataset as it lies in the memory that all ranks of the node share, made batch by batch.

    Args:
        part: Of a dataset.
        inputs: Names and shapes, in the model's order.
        device: Where batches go.
    """

    def __init__(
        self, part: Part, inputs: Sequence[tuple[str, tuple[int, ...]]], device: torch.device
    ) -> None:
        self._part, self._inputs, self._device = part, tuple(inputs), device

    def __len__(self) -> int:
        return len(self._part)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make rows."""
        found = self._part.batch(indices.cpu())
        inputs = model_inputs(found.inputs, self._inputs)
        return inputs.to(self._device), found.targets.to(self._device)


def model_inputs(
    found: Mapping[str, torch.Tensor], inputs: Sequence[tuple[str, tuple[int, ...]]]
) -> torch.Tensor:
    """Return a dataset's inputs as the one tensor that a model takes: several are laid side by side."""
    if len(inputs) == 1:
        return found[inputs[0][0]]
    return torch.cat([found[name].flatten(1) for name, _ in inputs], dim=1)


class TokenRows:
    """Texts as token ids of one length, which lie as `PartRows` do.

    Args:
        tokens: int32 [N, T].
        targets: [N].
    """

    def __init__(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        self._tokens, self._targets = tokens, targets

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens int64 [B, T] and targets [B]."""
        return self._tokens.index_select(0, indices).long(), self._targets.index_select(0, indices)


class TokenWindows:
    """Windows of one stream of tokens, each the question for the token that comes next at every place.

    Args:
        tokens: int32 or int64 [M].
        length: Tokens of a window (T); windows do not overlap, and what is left at the end is not used.
        device: Where they are kept.
    """

    def __init__(self, tokens: torch.Tensor, length: int, device: torch.device) -> None:
        self._count = max(0, (len(tokens) - 1) // length)
        self._tokens = tokens.to(device)
        self._offsets = torch.arange(length + 1, device=device)
        self._length, self._device = length, device

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [B, T] and those that follow them [B, T]."""
        starts = indices.to(self._device, non_blocking=True) * self._length
        windows = self._tokens[starts[:, None] + self._offsets].long()
        return windows[:, :-1], windows[:, 1:]
