"""One process."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from penstock_worker.adapters.training.strategies.base import Strategy


class SingleStrategy(Strategy):
    """Takes each step on the whole batch in one process."""

    name: ClassVar[str] = "single"
    ranks: ClassVar[int | None] = 1

    def _build(self) -> None:
        self.module = self.parts.build_model().to(self.device).train()
        self.optimizer = self.parts.build_optimizer(self.module.parameters())

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step on all rows."""
        objective = self.parts.objective
        inputs, targets = self.parts.rows.batch(indices)
        with self._autocast():
            outputs = self.module(inputs)
        loss_sum, weight = objective.loss_sum(outputs, targets), objective.weight(targets)
        self._backward(loss_sum / weight)
        self._update(rate)
        self._note(loss_sum, weight)

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs."""
        outputs: Tensor = self.module(inputs)
        return outputs
