"""Short trainings inside a compression: repair after a cut, and distillation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from penstock_worker.adapters.training.rows import Rows
from penstock_worker.usecases.job_context import JobFailure

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Outputs [B, …] and targets → mean loss, a scalar with a gradient."""
Watch = Callable[[int, int, str], None]
"""Told (done, total, phase); raises `Stopped` when the job shall stop."""

# Of all steps; the learning rate rises over them, and falls as a cosine afterwards.
_WARMUP = 0.1
_CLIP_NORM = 1.0
# Steps between two looks at whether the job shall stop.
_WATCH_STEPS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How a module is trained.

    Attributes:
        epochs: Times that all rows are seen; parts of one, too.
        learning_rate: The highest; AdamW.
        batch_size: Rows of a step.
        seed: Of the order of rows.
    """

    epochs: float
    learning_rate: float = 0.001
    batch_size: int = 64
    seed: int = 0


def fit(
    module: nn.Module,
    rows: Rows,
    plan: Plan,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    watch: Watch,
    phase: str,
    *,
    more: nn.Module | None = None,
) -> float:
    """Train in place, and leave the module ready to answer.

    Args:
        module: What learns.
        rows: What there is to learn from.
        plan: How.
        loss_of: The numbers of the rows of a step (int64 [B]) → their mean loss.
        watch: Told after every few steps.
        phase: What it is told that this is.
        more: Something that learns with it.

    Returns:
        The mean loss of the last epoch, or of all steps if there are fewer; NaN without one.

    Raises:
        JobFailure: DIVERGED if the loss is no number any more.
    """
    per_epoch = math.ceil(len(rows) / plan.batch_size)
    steps = math.ceil(per_epoch * plan.epochs)
    if not steps:
        return math.nan
    parameters = [*module.parameters(), *(more.parameters() if more is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    module.train()
    total, count = 0.0, 0
    try:
        for step, indices in enumerate(itertools.islice(_orders(len(rows), plan), steps)):
            loss = loss_of(indices)
            if not math.isfinite(value := loss.item()):
                raise JobFailure(
                    f"The loss is {value} in step {step + 1} of {phase}; take a smaller learning_rate.",
                    "DIVERGED",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            if step >= steps - per_epoch:
                total, count = total + value, count + 1
            if step % _WATCH_STEPS == 0 or step + 1 == steps:
                watch(step + 1, steps, phase)
    finally:
        module.eval()
    return total / max(1, count)


def _rate(step: int, steps: int) -> float:
    warm = max(1, int(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _orders(rows: int, plan: Plan) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(plan.seed)
    while True:
        yield from torch.randperm(rows, generator=generator).split(plan.batch_size)


def loss_for(task: str) -> Loss:
    """Return the usual loss: cross entropy for classes and tokens, else the mean square."""
    if task == "regression":
        return _square
    return _cross_entropy


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    classes = outputs.shape[-1]
    return nn.functional.cross_entropy(outputs.reshape(-1, classes).float(), targets.reshape(-1))


def _square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs.reshape(targets.shape).float(), targets.float())


def mean_loss(
    module: nn.Module, rows: Rows, indices: torch.Tensor, loss: Loss, batch_size: int = 128
) -> float:
    """Return the mean loss over some rows, without learning from them."""
    module.eval()
    total = 0.0
    with torch.inference_mode():
        for part in indices.split(batch_size):
            inputs, targets = rows.batch(part)
            total += float(loss(module(inputs), targets)) * len(part)
    return total / max(1, len(indices))
