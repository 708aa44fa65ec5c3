"""One process."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from penstock_worker.adapters.training.strategies.base import Strategy


class SingleStrategy(Strategy):
    """Takes each step on the whole batch in one process."""

    name: ClassVar[str] = "single"
    ranks: ClassVar[int | None] = 1
    takes_closures: ClassVar[bool] = True
    scales_losses: ClassVar[bool] = True

    def _build(self) -> None:
        self._last_part = 0.0, torch.zeros(())
        self.module = self.parts.build_model().to(self.device).train()
        self.optimizer = self.parts.build_optimizer(self.module.parameters())

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step on all rows."""
        loss_sum, weight = self._update(lambda: self._gradients(indices), rate)
        self._note(loss_sum, weight)

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs."""
        outputs: Tensor = self.module(inputs)
        return outputs

    def _gradients(self, indices: Tensor) -> tuple[Tensor, Tensor | float]:
        objective = self.parts.objective
        pieces = self._pieces(indices)
        if len(pieces) == 1:
            inputs, targets = self.parts.rows.batch(indices)
            known = objective.row_weight
            weight = objective.weight(targets) if known is None else known * indices.shape[0]
            with self._autocast():
                outputs = self.module(inputs)
            loss_sum = objective.loss_sum(outputs, targets)
            if known is None or self._scaler is not None:
                self._backward(loss_sum / weight)
            else:
                # The same gradient, without a division that would be differentiated in each step.
                loss_sum.backward(self._part(float(weight)))
            return loss_sum.detach(), weight
        whole = self._weight_of(pieces)
        total = torch.zeros((), device=self.device)
        for piece in pieces:
            inputs, targets = self.parts.rows.batch(piece)
            with self._autocast():
                outputs = self.module(inputs)
            loss_sum = objective.loss_sum(outputs, targets)
            self._backward(loss_sum / whole)
            total += loss_sum.detach()
        return total, whole

    def _part(self, weight: float) -> Tensor:
        """Give 1 / weight: of most batches the same, so it is kept."""
        if self._last_part[0] != weight:
            self._last_part = weight, torch.tensor(1.0 / weight, device=self.device)
        return self._last_part[1]
