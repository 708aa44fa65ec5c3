"""Data parallel: every rank has the whole model and a part of each batch; gradients are added up.

torch's DistributedDataParallel exchanges gradients in buckets while the backward pass still runs. After the
step all ranks hold equal weights, so nothing else is exchanged, but what the batch weighs where rows differ
in weight.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from penstock_worker.adapters.training.strategies.base import Strategy
from penstock_worker.adapters.training.strategies.parts import share


class DataParallel(Strategy):
    """What all strategies do that cut each batch into one part for each rank."""

    # The model that is called in a step; it averages gradients over ranks.
    replica: nn.Module

    @abstractmethod
    def _unsynchronized(self) -> contextlib.AbstractContextManager[Any]:
        """Keep the gradients of a backward pass to this rank."""

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step; the gradient is that of the loss over all rows of the batch."""
        loss_sum, weight = self._update(lambda: self._gradients(indices), rate)
        self._note(loss_sum, weight)

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs of rows of this rank."""
        outputs: Tensor = self.module(inputs)
        return outputs

    def _gradients(self, indices: Tensor) -> tuple[Tensor, Tensor | float]:
        objective, ranks = self.parts.objective, self.group.size
        own, counts = share(indices, self.group.rank, ranks)
        *first, last = self._pieces(own)
        inputs, targets = self.parts.rows.batch(last)
        weight: Tensor | float
        whole: Tensor | float
        exchange = None
        if objective.row_weight is None:
            # Under way while the model computes.
            weight = objective.weight(targets) + (self._weight_of(first) if first else 0.0)
            weight = weight if counts else torch.zeros_like(weight)
            whole = weight.clone()
            exchange = dist.all_reduce(whole, async_op=True)
            if first:
                exchange.wait()
        else:
            weight = objective.row_weight * len(own) if counts else 0.0
            whole = objective.row_weight * len(indices)
        total = torch.zeros((), device=self.device)
        # The replica averages over ranks what should be added up.
        for piece in first:
            piece_inputs, piece_targets = self.parts.rows.batch(piece)
            with self._unsynchronized():
                with self._autocast():
                    outputs = self.replica(piece_inputs)
                loss_sum = objective.loss_sum(outputs, piece_targets)
                self._backward(loss_sum * (ranks / whole))
            total += loss_sum.detach()
        with self._autocast():
            outputs = self.replica(inputs)
        loss_sum = objective.loss_sum(outputs, targets)
        if not counts:
            loss_sum = loss_sum * 0.0
        if exchange is not None:
            exchange.wait()
        self._backward(loss_sum * (ranks / whole))
        return (total + loss_sum.detach() if first else loss_sum.detach()), weight

    def _loss_of(self, loss_sum: Tensor, weight: Tensor | float) -> Tensor:
        found = self.group.sum([float(loss_sum), float(weight)])
        return torch.tensor(found[0] / found[1], device=self.device)


class DdpStrategy(DataParallel):
    """Keeps the whole model in each rank."""

    name: ClassVar[str] = "ddp"
    takes_closures: ClassVar[bool] = True
    scales_losses: ClassVar[bool] = True
    replica: DistributedDataParallel

    def _build(self) -> None:
        self.module = self.parts.build_model().to(self.device).train()
        if self.device.type == "cuda":
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        self.optimizer = self.parts.build_optimizer(self.module.parameters())
        # Gradients are views of the buckets that are sent, which saves a copy of each. All ranks built equal
        # weights, and recipes have no buffers that training changes: nothing is sent at the start or before a
        # step.
        self.replica = DistributedDataParallel(
            self.module, forward_sync_buffers=False, gradient_as_bucket_view=True, init_sync=False
        )

    def _unsynchronized(self) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = self.replica.no_sync()
        return context
