"""What a training makes small, as sums that may be cut anywhere."""

from __future__ import annotations

from typing import Protocol

import torch


class Objective(Protocol):
    """A loss that is a weighted mean over rows (or tokens).

    The loss of a batch is `loss_sum / weight`. Both are sums over rows, so micro-batches and the shares of
    ranks add
    up: the gradient of a batch is the sum of the gradients of `loss_sum(part) / weight(whole batch)`.
    """

    @property
    def row_weight(self) -> float | None:
        """The weight of each row, where all have the same one: 1, or the tokens of a window; else None.

        Known, it saves ranks the exchange of what their rows of each batch weigh.
        """
        ...

    def loss_sum(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of weight times loss over rows; a scalar in fp32 that has a gradient."""
        ...

    def weight(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of the rows' weights; a scalar in fp32 without a gradient. Needs no outputs."""
        ...
