"""Tensor parallel: each rank has a part of each layer, and all compute the same batch together.

Layers are split in pairs (Shoeybi et al. 2019, Megatron-LM): the first of a pair by its outputs, the second
by its inputs, so that what lies between stays in pieces and one all_reduce a pair brings the sum together,
forward and backward:

    transformer block   query, key, value by heads | out        up | down
    perceptron          a linear layer | the next one, or the head
    tokens              the table by its width, gathered at once; the head of a language model by its words

torch's DTensor does the cutting and the exchange. What cannot be split (convolutions, normalizations,
widths that the ranks do not divide) every rank has whole and computes equally; `notes` names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from penstock_worker.adapters.training.architectures.blocks import (
    Attention,
    Head,
    Layer,
    TokenEmbedding,
    TransformerBlock,
)
from penstock_worker.adapters.training.strategies.shards import Sliced
from penstock_worker.usecases.job_context import JobFailure


class TensorParallelStrategy(Sliced):
    """Keeps a part of each layer in each rank."""

    name: ClassVar[str] = "tensor_parallel"

    def _build(self) -> None:
        ranks = self.group.size
        self.module = self.parts.build_model().to(self.device).train()
        plan = plan_of(self.module, ranks)
        if not plan:
            raise JobFailure(
                f"No layer of this model can be split over {ranks} ranks: there are no pairs of linear "
                "layers and no attention, or their widths are no multiples. Take ddp or fsdp.",
                "INVALID_RECIPE",
            )
        mesh = init_device_mesh(self.device.type, (ranks,))
        parallelize_module(self.module, mesh, plan)
        whole = [name for name, value in self.module.named_parameters() if not isinstance(value, DTensor)]
        if whole:
            self.notes.append(f"Every rank has these whole: {', '.join(_layers(whole))}.")
        self._build_optimizer()

    @property
    def stream(self) -> int:
        """All ranks draw the same random numbers, as they compute the same rows."""
        return 0

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step on all rows together."""
        loss_sum, weight = self._update(lambda: self._gradients(indices), rate)
        # All know the loss; it is counted once.
        first = self.group.rank == 0
        self._note(loss_sum if first else torch.zeros_like(loss_sum), weight if first else 0.0)

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs, the same in all ranks."""
        outputs: Tensor = self.module(inputs)
        return outputs

    def _deal(self) -> tuple[int, int]:
        return 0, 1

    def _counts(self) -> bool:
        return self.group.rank == 0

    def _gradients(self, indices: Tensor) -> tuple[Tensor, Tensor | float]:
        objective = self.parts.objective
        pieces = self._pieces(indices)
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


def plan_of(model: nn.Module, ranks: int) -> dict[str, Any]:
    """Say how each layer that can be split is split.

    Args:
        model: A chain of blocks.
        ranks: Into how many parts.

    Returns:
        By the names of layers, what `parallelize_module` takes.

    Raises:
        JobFailure: INVALID_RECIPE if there are heads of attention that the ranks do not divide.
    """
    blocks = list(model.named_children())
    plan: dict[str, Any] = {}
    for place, block in blocks:
        if isinstance(block, TransformerBlock):
            plan |= {f"{place}.{name}": how for name, how in _transformer(block, ranks)}
        elif isinstance(block, TokenEmbedding) and block.tokens.embedding_dim % ranks == 0:
            plan[f"{place}.tokens"] = ColwiseParallel(output_layouts=Replicate())
    for (place, block), (after, following) in pairwise(blocks):
        # The second of a pair is not the first of the next.
        pair = isinstance(block, Layer) and isinstance(following, Layer | Head)
        if not pair or f"{place}.linear" in plan or block.linear.out_features % ranks:
            continue
        plan[f"{place}.linear"] = ColwiseParallel()
        plan[f"{after}.linear"] = RowwiseParallel()
    place, last = blocks[-1]
    of_tokens = isinstance(last, Head) and isinstance(blocks[0][1], TokenEmbedding)
    if of_tokens and f"{place}.linear" not in plan and last.linear.out_features % ranks == 0:
        plan[f"{place}.linear"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def _transformer(block: TransformerBlock, ranks: int) -> Iterator[tuple[str, Any]]:
    heads = heads_of(block.attention)
    if heads % ranks:
        raise JobFailure(
            f"{heads} heads of attention cannot be spread over {ranks} ranks. Take a number of heads that "
            "is a multiple of the ranks, or another strategy.",
            "INVALID_RECIPE",
        )
    for name in ("query", "key", "value"):
        yield f"attention.{name}", ColwiseParallel()
    yield "attention.out", RowwiseParallel()
    if block.up.out_features % ranks == 0:
        yield "up", ColwiseParallel()
        yield "down", RowwiseParallel()


def heads_of(attention: Attention) -> int:
    """Count the heads of an attention that is whole."""
    return int(attention.query.out_features // attention.head)


def _layers(names: list[str]) -> list[str]:
    """Give the layers that have these parameters, and parameters of no layer, each once."""
    found = [name.removesuffix(".weight").removesuffix(".bias") for name in names]
    return list(dict.fromkeys(found))
