"""Pipeline parallel: each rank has some blocks of the model; pieces of the batch pass through them.

The model is cut between blocks so that the stage with the most parameters has as few as can be. torch's
schedules move the pieces: 1F1B (Narayanan et al. 2019), under which a stage holds the activations of no more
pieces than there are stages, or GPipe (Huang et al. 2018) where there are fewer pieces than stages.
Gradients of all pieces are added up before the one step of the optimizer, so a step is that of one process.

All pieces have the same number of rows, as their shapes are agreed on once: a batch that does not fill them
is filled with rows that do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from penstock_worker.adapters.training.strategies.base import Strategy
from penstock_worker.usecases.job_context import JobFailure


class PipelineStrategy(Strategy):
    """Keeps a stage of the model in each rank."""

    name: ClassVar[str] = "pipeline"

    def _build(self) -> None:
        rank, stages = self.group.rank, self.group.size
        model = self.parts.build_model()
        bounds = _stages_of(model, stages)
        self.module = model.part(bounds[rank], bounds[rank + 1]).to(self.device).train()
        self.optimizer = self.parts.build_optimizer(self.module.parameters())
        pieces = min(self.spec.microbatches or 2 * stages, self.parts.batch_size)
        self._microbatches = pieces
        self._rows = -(-self.parts.batch_size // pieces) * pieces
        self._first, self._last = rank == 0, rank == stages - 1
        stage = PipelineStage(_Contiguous(self.module), rank, stages, self.device)
        schedule = Schedule1F1B if pieces >= stages else ScheduleGPipe
        self._schedule = schedule(stage, pieces, loss_fn=self._piece_loss, scale_grads=False)
        # Without a loss it only goes forward.
        forward = PipelineStage(_Contiguous(self.module), rank, stages, self.device)
        self._forward = ScheduleGPipe(forward, pieces)
        # Of the batch at hand, in the last stage.
        self._targets = torch.empty(0)
        self._whole: Tensor | float = 1.0
        self._of_pieces: list[Tensor] = []

    @property
    def stream(self) -> int:
        """Each stage draws its own random numbers."""
        return self.group.rank

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step on all rows, cut into pieces."""
        loss_sum, weight = self._update(lambda: self._gradients(indices), rate)
        self._note(loss_sum, weight)

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs in the last stage; what the others return means nothing."""
        found = []
        for begin in range(0, len(inputs), self._rows):
            part = inputs[begin : begin + self._rows]
            places = torch.arange(self._rows).clamp(max=len(part) - 1).to(self.device)
            outputs = self._forward.step(*([part.index_select(0, places)] if self._first else []))
            if self._last:
                found.append(outputs[: len(part)])
        return torch.cat(found) if self._last else torch.zeros(1)

    def weights(self) -> dict[str, Tensor] | None:
        """Bring the stages together on rank 0."""
        return self._gathered(self.tensors())

    def _deal(self) -> tuple[int, int]:
        return 0, 1

    def _counts(self) -> bool:
        return self._last

    def _gradients(self, indices: Tensor) -> tuple[Tensor, Tensor | float]:
        objective = self.parts.objective
        rows = len(indices)
        places = torch.arange(self._rows, device=self.device)
        self._of_pieces = []
        with self._autocast():
            if self._first:
                inputs, _ = self.parts.rows.batch(indices)
                self._schedule.step(inputs.index_select(0, places.clamp(max=rows - 1)), return_outputs=False)
            elif not self._last:
                self._schedule.step(return_outputs=False)
            else:
                _, self._targets = self.parts.rows.batch(indices)
                self._whole = objective.weight(self._targets)
                self._schedule.step(target=places, losses=[], return_outputs=False)
        if not self._last:
            return torch.zeros((), device=self.device), 0.0
        # Before the first step torch asks for a loss of outputs of whatever was in memory, to learn shapes.
        return torch.stack(self._of_pieces[-self._microbatches :]).sum(), self._whole

    def _piece_loss(self, outputs: Tensor, places: Tensor) -> Tensor:
        """Give the share of a piece in the loss of its batch."""
        places = places[places < len(self._targets)]
        if not len(places):
            nothing = outputs.float().sum() * 0.0
            self._of_pieces.append(nothing.detach())
            return nothing
        with torch.autocast(self.device.type, enabled=False):
            targets = self._targets.index_select(0, places)
            loss_sum = self.parts.objective.loss_sum(outputs[: len(places)], targets)
        self._of_pieces.append(loss_sum.detach())
        return loss_sum / self._whole

    def _clip(self, most: float) -> None:
        self._clip_together(self.module.parameters(), most, self.group.control)


class _Contiguous(nn.Module):
    """Gives what a stage gives in one piece of memory, as it must be to be sent."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *values: Tensor) -> Any:
        found = self.stage(*values)
        if isinstance(found, tuple):
            return tuple(value.contiguous() for value in found)
        return found.contiguous()


def _stages_of(model: nn.Module, stages: int) -> list[int]:
    """Cut a chain of blocks into stages.

    Returns:
        Where each stage begins, and the end of the last.

    Raises:
        JobFailure: INVALID_RECIPE if there are too few blocks, or a cut would part blocks that share a
            tensor.
    """
    blocks = list(model)
    sizes = [sum(value.numel() for value in block.parameters()) for block in blocks]
    # A stage begins where a block with weights, or those without before it, begin.
    layers = [place for place, size in enumerate(sizes) if size]
    if len(layers) < stages:
        raise JobFailure(
            f"The model has {len(layers)} layers, which cannot be cut into {stages} stages. Take at most "
            f"{len(layers)} ranks, more layers, or another strategy.",
            "INVALID_RECIPE",
        )
    begins = [0, *(place + 1 for place in layers[:-1]), len(blocks)]
    bounds = [begins[place] for place in cut([sizes[place] for place in layers], stages)]
    owner: dict[int, int] = {}
    for stage in range(stages):
        for place in range(bounds[stage], bounds[stage + 1]):
            for name, value in blocks[place].named_parameters():
                if owner.setdefault(id(value), stage) != stage:
                    raise JobFailure(
                        f"Blocks of two stages share {place}.{name}, which a pipeline cannot. Take another "
                        "strategy, or an architecture without shared weights.",
                        "INVALID_RECIPE",
                    )
    return bounds


def cut(sizes: Sequence[int], parts: int) -> list[int]:
    """Cut a row of sizes into so many parts, none empty, of which the largest is as small as can be.

    Args:
        sizes: In order; at least `parts` of them.
        parts: How many.

    Returns:
        Where each part begins, and the end of the last: of length parts + 1.
    """
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    # best[k][n]: the largest of k parts of the first n sizes, and where the last of them begins.
    best = [[(total[n], 0) for n in range(len(total))]]
    for k in range(1, parts):
        row = [(0, 0)] * len(total)
        for n in range(k + 1, len(total)):
            row[n] = min((max(best[k - 1][m][0], total[n] - total[m]), m) for m in range(k, n))
        best.append(row)
    bounds = [len(sizes)]
    for k in range(parts - 1, -1, -1):
        bounds.append(best[k][bounds[-1]][1])
    return bounds[::-1]
