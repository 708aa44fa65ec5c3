"""What a strategy is: one way to spread the steps of a training over the ranks of a job.

The training loop is the same for all of them and runs in every rank:

    strategy = open_strategy(recipe.strategy, context, parts)
    try:
        extra = strategy.load(directory) if there is a checkpoint else None
        for indices in the batches of an epoch, the same ones in the same order in every rank:
            strategy.step(indices, rate)
            if strategy.must_agree():
                decision = strategy.agree(stop=context.should_stop(), checkpoint=context.checkpoint_due())
                ...
        sums = strategy.evaluate(rows, batch_size, score, width)
        weights = strategy.weights()
    finally:
        strategy.close()

Batches are global: a strategy takes its rank's part of each, so the order of rows, and with it the result, is
that of one process whatever the number of ranks. The loss of a batch is the sum of losses over the sum of
weights of all its rows, however they are cut.

Ranks agree rarely: a vote every fifth of a second or so carries the wish to stop, the checkpoint that is due
and the sum of the losses in one small all_reduce, and says at which step the next vote is. Between votes
`must_agree` costs one comparison.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock.scheduler.v1 import job_work_pb2
from penstock_worker.adapters.training.rows import Rows
from penstock_worker.adapters.training.strategies.checkpoints import Checkpoints
from penstock_worker.adapters.training.strategies.group import Group
from penstock_worker.adapters.training.strategies.parts import Decision, Gradients, Parts, whole
from penstock_worker.usecases.job_context import JobFailure

# Seconds between two votes, about. Short against the seconds in which a cancelled job must be gone, long
# against a vote (0.1 ms to 1 ms).
VOTE_SECONDS = 0.2
# A step of which nobody knows how long it takes yet is followed by a vote; then at most so many times more
# steps lie between two votes than before.
_GROWTH = 4

_NOTHING = Decision()
_AS_IT_IS = contextlib.nullcontext()


class Strategy(ABC):
    """One rank's part of a training.

    `steps` counts those that were taken, `notes` says in words how the model was spread.

    Subclasses build `module` (what this rank holds of the model) and `optimizer` in `_build`, and say what a
    step is. What is saved and gathered follows from the names in `tensors`.

    Args:
        group: This rank among the others; joined already.
        parts: What the training is made of.
        spec: The recipe's strategy.

    Raises:
        JobFailure: INVALID_RECIPE if this model cannot be spread in this way over so many ranks.
    """

    name: ClassVar[str]
    # How many processes may be used; None for any number.
    ranks: ClassVar[int | None] = None
    # Whether optimizers may compute gradients more than once in a step, as lbfgs does.
    takes_closures: ClassVar[bool] = False
    # Whether fp16 may be computed in, whose small gradients need a scaled loss.
    scales_losses: ClassVar[bool] = False
    # Whether ranks compute outputs together, so that all must compute equally often.
    predicts_together: ClassVar[bool] = False

    module: nn.Module
    optimizer: torch.optim.Optimizer | None

    def __init__(self, group: Group, parts: Parts, spec: job_work_pb2.Strategy) -> None:
        self.group = group
        self.parts = parts
        self.spec = spec
        self.device = group.device
        self.steps = 0
        # What people should know of how this model was spread.
        self.notes: list[str] = []
        self._losses: list[Tensor] = []
        self._weights: list[Tensor | float] = []
        self._next_vote = 1
        self._interval = 1
        # Steps after which a vote is read; where ranks do not wait for one another, they do not for votes.
        self.lag = 0
        self._ballot: tuple[int, Any, Tensor] | None = None
        self._last_vote = time.monotonic()
        self._checkpoints = Checkpoints(group)
        self._best: dict[str, Tensor] = {}
        self._scaler = torch.amp.GradScaler("cuda") if parts.precision == "fp16" else None
        torch.manual_seed(parts.seed + self.stream)
        # Asked of all ranks alike, as some may have no optimizer.
        probe = parts.build_optimizer([nn.Parameter(torch.zeros(1, 1))])
        self._closures = isinstance(probe, torch.optim.LBFGS)
        if self._closures and not self.takes_closures:
            raise JobFailure(
                f"The strategy {self.name} cannot use lbfgs, which computes gradients several times in a "
                "step. Take single or ddp, or another optimizer.",
                "INVALID_RECIPE",
            )
        if parts.precision == "fp16" and not self.scales_losses:
            raise JobFailure(
                f"The strategy {self.name} cannot use fp16, whose losses must be scaled. Take bf16.",
                "INVALID_RECIPE",
            )
        self._build()
        self._rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    # What a strategy says.

    @abstractmethod
    def _build(self) -> None:
        """Make `module` and `optimizer`."""

    @abstractmethod
    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Take one step of the optimizer on a global batch.

        Args:
            indices: Its rows, int64, of shape (rows,); the same in all ranks.
            rate: Factor on the optimizer's learning rate.
        """

    @abstractmethod
    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs of rows that this rank alone has, or that all ranks have (as `_deal` says)."""

    def tensors(self) -> dict[str, Tensor]:
        """Give what this rank holds of the model's state, by the names it has in one whole model."""
        return {name: value.detach() for name, value in self.module.state_dict(keep_vars=True).items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Give the parameters whose optimizer this rank has, by their names in one whole model."""
        return dict(self.module.named_parameters())

    def weights(self) -> dict[str, Tensor] | None:
        """Gather the state of the whole model on the CPU of rank 0; None in the others. All ranks call it."""
        found = {name: whole(value) for name, value in self.tensors().items()}
        if self.group.rank:
            return None
        return {name: value.cpu().clone() for name, value in found.items()}

    @property
    def stream(self) -> int:
        """Number of this rank's stream of random numbers; ranks that compute the same rows have the same."""
        return self.group.rank

    def _deal(self) -> tuple[int, int]:
        """Say which of how many parts of the held-out rows this rank measures; none, if it is beyond."""
        return self.group.rank, self.group.size

    def _counts(self) -> bool:
        """Whether what this rank measures is counted, where several ranks measure the same."""
        return True

    def _before_measuring(self) -> None:  # noqa: B027 - most have nothing to do
        """Do what must be done before outputs are computed."""

    # What all have.

    def must_agree(self, *, now: bool = False) -> bool:
        """Whether ranks agree after this step; else `agree` would find nothing, and need not be called.

        Args:
            now: As for `agree`.
        """
        self._checkpoints.settle_if_written()
        return now or self.steps >= (self._next_vote if self._ballot is None else self._ballot[0])

    def agree(self, *, stop: bool = False, checkpoint: bool = False, now: bool = False) -> Decision:
        """Agree with the other ranks, after each step.

        Args:
            stop: This rank was asked to stop.
            checkpoint: A checkpoint is due; rank 0's word counts. While one is being written, none is due.
            now: Vote after this step in any case (all ranks must say so), as at the end of an epoch.
        """
        if not self.must_agree(now=now):
            return _NOTHING
        found = [0.0] * 5
        if self._ballot is not None:
            _, work, votes = self._ballot
            work.wait()
            self._ballot, found = None, votes.tolist()
        if not any(found) or now:
            votes = torch.tensor(self._votes(stop, checkpoint), dtype=torch.float64)
            if self.lag and not now:
                work = dist.all_reduce(votes, group=self.group.control, async_op=True)
                self._ballot = self.steps + self.lag, work, votes
                return _NOTHING
            cast = self.group.sum_tensor(votes).tolist()
            found = [one + other for one, other in zip([*found[:2], 0.0, *found[3:]], cast, strict=True)]
        self._interval = int(found[2])
        self._next_vote = self.steps + self._interval
        mean = found[3] / found[4] if found[4] else None
        return Decision(found[0] > 0, found[1] > 0, mean, found[4])

    def evaluate(
        self, rows: Rows, batch_size: int, score: Callable[[Tensor, Tensor], Tensor], width: int
    ) -> Tensor:
        """Add up scores over rows, spread over the ranks.

        Args:
            rows: All are measured once.
            batch_size: Rows that are computed at once.
            score: (outputs, targets) → what is added up, a vector of `width`: sums of losses, counts, the
                cells of a confusion matrix.
            width: Its length.

        Returns:
            The sums in every rank, float64 of shape (width,).
        """
        self._before_measuring()
        part, parts = self._deal()
        total = torch.zeros(width, dtype=torch.float64)
        begins = list(range(part * batch_size, len(rows), parts * batch_size)) if part < parts else []
        counted = len(begins) if self._counts() else 0
        if self.predicts_together:
            rounds = -(-len(rows) // (parts * batch_size))
            begins += [0] * (rounds - len(begins))
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                for number, begin in enumerate(begins):
                    inputs, targets = rows.batch(torch.arange(begin, min(begin + batch_size, len(rows))))
                    with self._autocast():
                        outputs = self.predict(inputs)
                    if number < counted:
                        total += score(outputs.float(), targets).to("cpu", torch.float64)
        finally:
            self.module.train(training)
        return self.group.sum_tensor(total)

    def keep_best(self) -> None:
        """Remember the present weights as the best so far."""
        self._best = {name: value.clone() for name, value in self.tensors().items()}

    def take_best(self) -> None:
        """Go back to the best weights, if any were remembered."""
        present = self.tensors()
        for name, value in self._best.items():
            present[name].copy_(value)
        self._loaded()

    def save(self, directory: Path, extra: Mapping[str, Any], written: Callable[[], None]) -> None:
        """Save everything needed to go on, at any number of ranks; all ranks call it after the same step.

        Weights and the optimizer's state are copied now and written in the background.

        Args:
            directory: Where to; empty, the same for all ranks of a node.
            extra: The loop's own state, as JSON can say it; rank 0's counts.
            written: Called by a later `agree` or `settle`, once this rank's files are durable.
        """
        state = {f"model.{name}": value for name, value in self.tensors().items()}
        state |= {f"best.{name}": value for name, value in self._best.items()}
        # The history of lbfgs is left out: it is made anew in some steps.
        if self.optimizer is not None and not self._closures:
            for name, parameter in self.parameters().items():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        state[f"optimizer.{name}.{key}"] = self._saved(name, torch.as_tensor(value))
        self._checkpoints.save(directory, state, {**extra, "steps": self.steps}, written)

    def settle(self, timeout: float = 300.0) -> None:
        """Wait until the checkpoint that is being written, if any, is durable, and say so.

        Raises:
            JobFailure: OUT_OF_DISK if it could not be written for lack of room.
            TimeoutError: It is not written yet.
        """
        self._checkpoints.settle(timeout)

    def load(self, directory: Path) -> dict[str, Any]:
        """Take up a checkpoint, of whatever strategy and number of ranks; all ranks call it.

        Returns:
            What was given as `extra`.

        Raises:
            JobFailure: INVALID_RECIPE if it is of another model.
        """
        known = self._checkpoints.described(directory)
        present, held = self._wanted(), self.tensors()
        if missing := sorted(name for name in present if f"model.{name}" not in known):
            raise JobFailure(
                f"The checkpoint is of another model: it has no {missing[0]}. Start the job anew.",
                "INVALID_RECIPE",
            )
        state = {f"model.{name}": value for name, value in present.items()}
        self._best = {name: value.clone() for name, value in held.items() if f"best.{name}" in known}
        state |= {f"best.{name}": value for name, value in self._best.items()}
        state |= self._empty_optimizer_state(known)
        extra = self._checkpoints.load(directory, state)
        self.steps = int(extra.pop("steps"))
        self._next_vote = self.steps + 1
        torch.manual_seed(self.parts.seed + self.stream + 7919 * self.steps)
        self._loaded()
        return extra

    def _wanted(self) -> dict[str, Tensor]:
        """Give what this rank takes from a checkpoint; like `tensors`, which is what it puts into one."""
        return self.tensors()

    def _loaded(self) -> None:  # noqa: B027 - most have nothing to do
        """Do what must follow once the tensors hold what a checkpoint had."""

    def close(self) -> None:
        """Leave the group. What is being written is given up; safe to call after any failure."""
        self._checkpoints.close()
        self.group.close()

    # For subclasses.

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the recipe's precision."""
        if self.parts.precision == "fp32":
            return _AS_IT_IS
        dtype = torch.bfloat16 if self.parts.precision == "bf16" else torch.float16
        context: contextlib.AbstractContextManager[Any] = torch.autocast(self.device.type, dtype)
        return context

    def _backward(self, loss: Tensor) -> None:
        (self._scaler.scale(loss) if self._scaler else loss).backward()

    def _pieces(self, indices: Tensor) -> Sequence[Tensor]:
        """Cut a rank's rows into what is computed at once."""
        size = self.parts.micro_batch_size
        return [indices] if not size or indices.shape[0] <= size else indices.split(size)

    def _weight_of(self, pieces: Sequence[Tensor]) -> Tensor:
        """Add up what rows weigh."""
        objective, rows = self.parts.objective, self.parts.rows
        if objective.row_weight is not None:
            return torch.tensor(
                objective.row_weight * sum(len(piece) for piece in pieces), device=self.device
            )
        return torch.stack([objective.weight(rows.batch(piece)[1]) for piece in pieces]).sum()

    def _update(self, gradients: Gradients, rate: float) -> tuple[Tensor, Tensor | float]:
        """Compute gradients, clip them, step, and forget them.

        Args:
            gradients: Computes them, and gives the sum of losses and of weights of this rank's rows.
            rate: Factor on the learning rate.

        Returns:
            What `gradients` gave, the first time if it is called several times.
        """
        optimizer = self.optimizer
        assert optimizer is not None  # noqa: S101 - a strategy without one has its own way
        self._set_rate(rate)
        if self._closures:
            return self._update_with_closure(optimizer, gradients)
        found = gradients()
        if self._scaler:
            self._scaler.unscale_(optimizer)
        if self.parts.clip_gradient_norm:
            self._clip(self.parts.clip_gradient_norm)
        if self._scaler:
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found

    def _update_with_closure(
        self, optimizer: torch.optim.Optimizer, gradients: Gradients
    ) -> tuple[Tensor, Tensor | float]:
        found = []

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            found.append(gradients())
            if self.parts.clip_gradient_norm:
                self._clip(self.parts.clip_gradient_norm)
            return self._loss_of(*found[-1])

        optimizer.step(closure)
        optimizer.zero_grad(set_to_none=True)
        return found[0]

    def _loss_of(self, loss_sum: Tensor, weight: Tensor | float) -> Tensor:
        """Give the loss of the whole batch, of which this rank has a part."""
        return loss_sum / weight

    def _set_rate(self, rate: float) -> None:
        assert self.optimizer is not None  # noqa: S101 - as above
        for group, usual in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = usual * rate

    def _clip(self, most: float) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), most)

    def _clip_together(self, parameters: Iterable[nn.Parameter], most: float, group: Any) -> None:
        """Clip by the norm of a gradient whose pieces lie in the ranks of a group, each in one of them."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        square = nn.utils.get_total_norm(gradients).square().cpu()
        if group is not None:
            dist.all_reduce(square, group=group)
        factor = (most / (square.sqrt() + 1e-6)).clamp(max=1.0).to(self.device)
        torch._foreach_mul_(gradients, factor)

    def _gathered(self, mine: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Bring together on rank 0 what ranks hold under different names, on the CPU."""
        mine = {name: value.cpu().clone() for name, value in mine.items()}
        if self.group.size == 1:
            return mine
        found: list[Any] | None = [None] * self.group.size if self.group.rank == 0 else None
        dist.gather_object(mine, found, group=self.group.control)
        return None if found is None else {name: value for held in found for name, value in held.items()}

    def _note(self, loss_sum: Tensor, weight: Tensor | float) -> None:
        """Remember a step's loss over this rank's rows, and that it is done."""
        self._losses.append(loss_sum.detach())
        self._weights.append(weight)
        self.steps += 1

    def _loss_so_far(self) -> tuple[float, float]:
        """Give the sum of the losses, and of the weights, since the last vote."""
        if not self._losses:
            return 0.0, 0.0
        total = float(torch.stack(self._losses).sum(dtype=torch.float64))
        weight = sum(float(weight) for weight in self._weights)
        self._losses, self._weights = [], []
        return total, weight

    def _votes(self, stop: bool, checkpoint: bool) -> list[float]:
        """Say stop, checkpoint, steps until the next vote (these two rank 0 alone), loss, weight."""
        total, weight = self._loss_so_far()
        if self.group.rank:
            return [float(stop), 0.0, 0.0, total, weight]
        due = checkpoint and not self._checkpoints.writing
        return [float(stop), float(due), float(self._steps_until_next_vote()), total, weight]

    def _steps_until_next_vote(self) -> int:
        now = time.monotonic()
        seconds, self._last_vote = now - self._last_vote, now
        taken = max(1, self.steps - self._next_vote + self._interval)
        fit = int(VOTE_SECONDS * taken / max(seconds, 1e-6))
        return max(1, min(fit, self._interval * _GROWTH))

    def _empty_optimizer_state(
        self, known: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, Tensor]:
        """Make the optimizer's state with the shapes of a checkpoint, to be filled."""
        if self.optimizer is None:
            return {}
        parameters = self.parameters()
        state: dict[str, Tensor] = {}
        for full, (shape, dtype) in known.items():
            kind, _, rest = full.partition(".")
            name, _, key = rest.rpartition(".")
            if kind != "optimizer" or name not in parameters:
                continue
            state[full], own = self._restored(name, shape, dtype)
            self.optimizer.state[parameters[name]][key] = own
        return state

    def _saved(self, name: str, value: Tensor) -> Tensor:
        """Give what a checkpoint holds of a tensor of the optimizer's state for a parameter."""
        return value

    def _restored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make a tensor to be filled from a checkpoint, and the one of the same memory for the optimizer."""
        parameter = self.parameters()[name]
        same = shape == tuple(parameter.shape)
        value = torch.zeros_like(parameter.detach(), dtype=dtype) if same else torch.zeros(shape, dtype=dtype)
        return value, value
