"""What a training is made of, what its ranks decide, and how they share out a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock_worker.adapters.training.chain import Chain
from penstock_worker.adapters.training.objective import Objective
from penstock_worker.adapters.training.rows import Rows

# Computes gradients; gives the sum of losses and of weights of a rank's rows.
Gradients = Callable[[], tuple[Tensor, Tensor | float]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a training is made of. Everything is called in each rank.

    Attributes:
        build_model: Makes the model on the CPU in float32, with the same weights in every rank (seeded, or of
            the version to go on from).
        build_optimizer: Makes an optimizer of the parameters given. It may be called with a part of the
            model's.
        objective: What is made small.
        rows: The training part.
        seed: Of what is random during the training (dropout).
        batch_size: Rows of a global batch; only the last one of an epoch may have fewer.
        micro_batch_size: Rows that a rank computes at once, gradients being added up; 0 for all that it has.
        clip_gradient_norm: Norm of the whole gradient at most; 0 for unbounded.
        precision: fp32, bf16 or fp16: what is computed in. Weights and gradients stay in float32.
    """

    build_model: Callable[[], Chain]
    build_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    objective: Objective
    rows: Rows
    seed: int = 0
    batch_size: int = 32
    micro_batch_size: int = 0
    clip_gradient_norm: float = 0.0
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class Decision:
    """What the ranks agreed on after a step, the same in all of them.

    Attributes:
        stop: Some rank was asked to stop.
        checkpoint: A checkpoint is due.
        loss: Mean loss since the last vote; None where there was no vote after this step. It is what it is,
            NaN included.
        weight: Sum of the weights that this mean is over.
    """

    stop: bool = False
    checkpoint: bool = False
    loss: float | None = None
    weight: float = 0.0


def share(indices: Tensor, part: int, parts: int) -> tuple[Tensor, bool]:
    """Give one rank's rows of a global batch, and whether they count.

    A rank without rows computes one that does not count, as it must take part in the exchange.
    """
    rows = len(indices)
    begin, end = rows * part // parts, rows * (part + 1) // parts
    return (indices[begin:end], True) if begin < end else (indices[:1], False)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor whose pieces lie in several ranks; they all call it."""
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()
