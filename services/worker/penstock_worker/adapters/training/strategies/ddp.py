"""Data parallel: every rank has the whole model and a part of each batch; gradients are added up.

torch's DistributedDataParallel exchanges gradients in buckets while the backward pass still runs. After the
step all ranks hold equal weights, so nothing else is exchanged, but what the batch weighs where rows differ
in weight.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from penstock_worker.adapters.training.strategies.base import Strategy, share


class DataParallel(Strategy):
    """What all strategies do that cut batches into parts of equal size, one for each rank."""

    # The model that is called in a step; it averages gradients over ranks.
    replica: nn.Module

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step; the gradient is that of the loss over all rows of the batch."""
        objective, ranks = self.parts.objective, self.group.size
        own, counts = share(indices, self.group.rank, ranks)
        inputs, targets = self.parts.rows.batch(own)
        weight: Tensor | float
        if objective.row_weight is None:
            # Under way while the model computes.
            weight = objective.weight(targets) if counts else torch.zeros((), device=self.device)
            whole = weight.clone()
            exchange = dist.all_reduce(whole, async_op=True)
        else:
            weight = objective.row_weight * len(own) if counts else 0.0
            whole, exchange = objective.row_weight * len(indices), None
        with self._autocast():
            outputs = self.replica(inputs)
        loss_sum = objective.loss_sum(outputs, targets)
        if not counts:
            loss_sum = loss_sum * 0.0
        if exchange is not None:
            exchange.wait()
        # The replica averages over ranks what should be added up.
        self._backward(loss_sum * (ranks / whole))
        self._update(rate)
        self._note(loss_sum, weight)

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs of rows of this rank."""
        outputs: Tensor = self.module(inputs)
        return outputs


class DdpStrategy(DataParallel):
    """Keeps the whole model in each rank."""

    name: ClassVar[str] = "ddp"

    def _build(self) -> None:
        self.module = self.parts.build_model().to(self.device).train()
        if self.device.type == "cuda":
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        self.optimizer = self.parts.build_optimizer(self.module.parameters())
        # Gradients are views of the buckets that are sent, which saves a copy of each. All ranks built equal
        # weights, and recipes have no buffers that training changes, so nothing is sent at the start or
        # before a step.
        self.replica = DistributedDataParallel(
            self.module, forward_sync_buffers=False, gradient_as_bucket_view=True, init_sync=False
        )
