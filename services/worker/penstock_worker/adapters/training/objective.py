"""What a training makes small, as sums that may be cut anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Objective(Protocol):
    """A loss that is a weighted mean over rows (or tokens).

    The loss of a batch is `loss_sum / weight`. Both are sums over rows, so micro-batches and the shares of
    ranks add up: the gradient of a batch is the sum of the gradients of `loss_sum(part) / weight(batch)`.

    Attributes:
        row_weight: What each row weighs, if all weigh the same and nobody has to look; else None.
    """

    row_weight: float | None

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of weight times loss over rows; a scalar in fp32 that has a gradient."""
        ...

    def weight(self, targets: Tensor) -> Tensor:
        """Return the sum of the rows' weights; a scalar in fp32 without a gradient. Needs no outputs."""
        ...


class CrossEntropy:
    """Negative log-likelihood of the right class under the softmax of the logits, in nats.

    With class weights w, the loss of a batch is Σ w[y]·(−log p[y]) / Σ w[y], as torch's own weighted mean.

    Args:
        class_weights: float32 [C] on the device that computes, or None if all count the same.
        tokens: Targets of one row: 1 for classes, the length of the window for language models.
    """

    def __init__(self, class_weights: Tensor | None = None, tokens: int = 1) -> None:
        self._class_weights = class_weights
        self.row_weight = float(tokens) if class_weights is None else None

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Add up over rows.

        Args:
            outputs: Logits [B, C] or [B, T, C].
            targets: int64 [B] or [B, T].
        """
        if outputs.dim() == 3:
            outputs, targets = outputs.flatten(0, 1), targets.flatten()
        return functional.cross_entropy(outputs.float(), targets, weight=self._class_weights, reduction="sum")

    def weight(self, targets: Tensor) -> Tensor:
        """Add up what the rows' classes weigh."""
        if self._class_weights is None:
            return torch.tensor(float(targets.numel()), device=targets.device)
        return self._class_weights[targets].sum()


class Regression:
    """A distance between numbers, in units of the targets' standard deviation.

    mse: d², mae: |d|, huber: d²/2 for |d| ≤ 1, else |d| − 1/2 (Huber 1964); d = (output − target) / scale.

    Args:
        name: mse, mae or huber.
        scale: Standard deviation of the targets of the training part.
    """

    row_weight: float | None = 1.0

    def __init__(self, name: str, scale: float = 1.0) -> None:
        distances: Mapping[str, Callable[..., Tensor]] = {
            "mse": functional.mse_loss,
            "mae": functional.l1_loss,
            "huber": functional.huber_loss,
        }
        self._distance = distances[name]
        self._scale = scale

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Add up over rows.

        Args:
            outputs: [B, 1].
            targets: float32 [B].
        """
        return self._distance(
            outputs.squeeze(1).float() / self._scale, targets / self._scale, reduction="sum"
        )

    def weight(self, targets: Tensor) -> Tensor:
        """Return the number of rows."""
        return torch.tensor(float(len(targets)), device=targets.device)


def balanced_weights(targets: Tensor, classes: int) -> Tensor:
    """Return weights under which each class counts as much as any other: rows / (classes · its rows).

    A class without rows weighs 1.

    Args:
        targets: int64 [N].
        classes: How many there are.

    Returns:
        float32 [C].
    """
    counts = torch.bincount(targets, minlength=classes).float()
    return torch.where(counts > 0, len(targets) / (classes * counts.clamp(min=1)), torch.ones(classes))


def named_weights(weights: Mapping[str, float], classes: Sequence[str]) -> Tensor:
    """Return the weights of classes by their index; those not named weigh 1; float32 [C]."""
    return torch.tensor([float(weights.get(name, 1.0)) for name in classes])
