"""What is measured on rows that were held out, as sums that ranks can add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock_worker.adapters.training.objective import Objective


class Score(Protocol):
    """Sums over rows and the metrics that follow from them.

    Attributes:
        width: Length of the vector of sums.
    """

    width: int

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what some rows add, float64 [width].

        Args:
            outputs: What the model gives, float32, rows first.
            targets: As the objective has them.
        """
        ...

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return metrics by name of the sums over all rows, float64 [width] on the CPU."""
        ...


class ClassScore:
    """Loss, accuracy and macro F1 of classes.

    F1 of a class is 2·hits / (rows of it + rows answered with it); the macro mean is over the classes that
    the rows have or that were answered.
    """

    def __init__(self, objective: Objective, classes: int) -> None:
        self._objective, self._classes = objective, classes
        self.width = 3 + 3 * classes

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Take logits [B, C] and int64 [B]."""
        loss, weight = (self._objective.loss_sum(outputs, targets), self._objective.weight(targets))
        # numpy counts few rows in a tenth of the time that torch takes: it is the end of each epoch.
        answers, own = outputs.argmax(1).cpu().numpy(), targets.cpu().numpy()
        found = (own[answers == own], answers, own)
        counts = [np.bincount(numbers, minlength=self._classes) for numbers in found]
        head = [float(loss), float(weight), float(len(own))]
        return torch.from_numpy(np.concatenate([head, *counts]))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Give loss, accuracy, f1."""
        loss, weight, rows = sums[:3].tolist()
        hits, answers, targets = sums[3:].numpy().reshape(3, self._classes)
        either = answers + targets
        seen = either > 0
        f1 = 2 * hits[seen] / either[seen]
        return {
            "loss": _part(loss, weight),
            "accuracy": _part(float(hits.sum()), rows),
            "f1": float(f1.mean()) if len(f1) else math.nan,
        }


class NumberScore:
    """Loss (in standardized units), and mse, mae and R² in the target's own units.

    R² = 1 − Σ(output − target)² / Σ(target − mean)², with the mean of the measured rows.

    Args:
        objective: The loss.
        mean: Mean of the targets of the training part, around which is counted so that nothing cancels out.
    """

    width = 7

    def __init__(self, objective: Objective, mean: float) -> None:
        self._objective, self._mean = objective, mean

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Take numbers [B, 1] and [B]."""
        off = outputs.squeeze(1).double() - targets.double()
        around = targets.double() - self._mean
        return torch.stack(
            [
                self._objective.loss_sum(outputs, targets).double(),
                self._objective.weight(targets).double(),
                torch.tensor(float(len(targets)), dtype=torch.float64, device=outputs.device),
                off.square().sum(),
                off.abs().sum(),
                around.sum(),
                around.square().sum(),
            ]
        )

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Give loss, mse, mae, r2."""
        loss, weight, rows, squares, distances, total, around = sums.tolist()
        spread = around - total * total / rows if rows else 0.0
        found = {
            "loss": _part(loss, weight),
            "mse": _part(squares, rows),
            "mae": _part(distances, rows),
        }
        if spread > 0:
            found["r2"] = 1 - squares / spread
        return found


class TokenScore:
    """Loss, perplexity (e^loss, by token) and accuracy of the next token; bits for each byte of text.

    Bits by byte do not depend on the tokenizer: loss / ln 2 · tokens / bytes.
    """

    width = 3

    def __init__(self, objective: Objective, bytes_per_token: float) -> None:
        self._objective, self._bytes_per_token = objective, bytes_per_token

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Take logits [B, T, V] and int64 [B, T]."""
        return torch.stack(
            [
                self._objective.loss_sum(outputs, targets).double(),
                torch.tensor(float(targets.numel()), dtype=torch.float64, device=outputs.device),
                (outputs.argmax(2) == targets).sum().double(),
            ]
        )

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Give loss, perplexity, accuracy, bits_per_byte."""
        loss, tokens, hits = sums.tolist()
        mean = _part(loss, tokens)
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean,
            "accuracy": _part(hits, tokens),
            "bits_per_byte": mean / math.log(2) / self._bytes_per_token,
        }


def named(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics as prefix/name."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _part(value: float, of: float) -> float:
    return value / of if of else math.nan
