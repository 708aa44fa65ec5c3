"""The training itself: epochs of steps on global batches, whatever the strategy.

    for each epoch                       the order of rows is a function of (rows, epoch, seed)
        for each batch                   the same in every rank
            step                         by the strategy; nothing waits for the device
            agree                        every fifth of a second or so: loss, wish to stop, checkpoint due
        measure what is held out
        schedule, early stopping, metrics

What is needed to go on exactly lies in checkpoints: weights, the optimizer's state, the best weights so far,
epoch and batch, the sums of the epoch, and what schedule and early stopping remember. Random numbers of a
step (dropout) follow from seed, step and stream, so they need no state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from penstock_kit.errors import PenstockError
from penstock_kit.jobs.train import Plan
from penstock_kit.jobs.training import METRICS, OPTIMIZERS
from penstock_worker.adapters.training.rows import Rows
from penstock_worker.adapters.training.schedules import Schedule
from penstock_worker.adapters.training.scores import Score, named
from penstock_worker.adapters.training.strategies import Decision, Strategy
from penstock_worker.domain.sampling import epoch_order
from penstock_worker.usecases.job_context import JobContext, JobFailure, Stopped

# Seconds between two metrics that are recorded: a few a second are kept.
_METRICS_SECONDS = 0.5
# Seconds between two words on how far it is: epochs of few steps end more often.
_PROGRESS_SECONDS = 0.1
# A loss beyond so many times the first one, or this number, is not coming back.
_EXPLODED = 1e4
# Rows that are measured at once.
_MEASURED_ROWS = 512


@dataclass(slots=True)
class Position:
    """Where a training is: all that checkpoints hold of the loop.

    Attributes:
        epoch: From 0.
        batch: Batches of this epoch that are done.
        step: Steps in all.
        loss: Sum of losses of this epoch.
        weight: Sum of weights of this epoch.
        first_loss: The loss of the first steps; None before.
        best: Best value of the metric that early stopping looks at; None before the first epoch's end.
        best_epoch: Epochs that were done when it was found.
        best_metrics: All metrics then.
        metrics: Those of the last epoch.
        schedule: What the schedule remembers.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    weight: float = 0.0
    first_loss: float | None = None
    best: float | None = None
    best_epoch: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training came to.

    Attributes:
        metrics: Of the weights that the strategy now has.
        epochs: Epochs that were done.
        steps: Steps of the optimizer.
        best_epoch: The epoch whose weights were taken, from 1.
        stopped_early: It no longer got better.
        seconds: Of this attempt.
    """

    metrics: Mapping[str, float]
    epochs: int
    steps: int
    best_epoch: int
    stopped_early: bool
    seconds: float


class Loop:
    """Trains to the end, or until it is told to stop.

    Args:
        context: Of this rank.
        plan: The recipe.
        strategy: Takes steps; its group is joined.
        train: Rows to learn from.
        held_out: Rows to measure on.
        score: What is measured.
        seed: Of the orders of rows and of dropout.
    """

    def __init__(
        self,
        context: JobContext,
        plan: Plan,
        strategy: Strategy,
        train: Rows,
        held_out: Rows,
        score: Score,
        seed: int,
    ) -> None:
        self._context, self._plan, self._strategy = context, plan, strategy
        self._rows, self._held_out, self._score, self._seed = len(train), held_out, score, seed
        self._batch_rows = batch_rows(plan, len(train))
        self._batches = -(-len(train) // self._batch_rows)
        self._schedule = Schedule(
            plan.schedule, plan.warmup_steps, self._batches * plan.epochs, self._batches
        )
        self._at = Position()
        self._random = any(
            (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "_dropout", 0.0)
            for module in strategy.module.modules()
        )
        self._recorded = self._said = -math.inf
        self._counted, self._counted_at = 0, time.monotonic()

    def run(self) -> Outcome:
        """Train.

        Raises:
            Stopped: It was asked to, and has saved where it goes on.
            JobFailure: DIVERGED: the loss is no number any more, or has exploded.
        """
        started = time.monotonic()
        self._resume()
        at, plan = self._at, self._plan
        self._counted_at = time.monotonic()
        stopped_early = False
        while at.epoch < plan.epochs and not stopped_early:
            self._epoch()
            stopped_early = self._end_of_epoch()
        metrics, best_epoch = at.metrics, at.epoch
        if plan.patience and at.best_metrics:
            self._strategy.take_best()
            metrics, best_epoch = at.best_metrics, at.best_epoch
        self._strategy.settle()
        self._context.metrics(at.step, metrics)
        return Outcome(metrics, at.epoch, at.step, best_epoch, stopped_early, time.monotonic() - started)

    def _resume(self) -> None:
        found = self._context.last_checkpoint()
        if found is None:
            return
        step, directory = found
        self._at = Position(**self._strategy.load(directory))
        if self._at.schedule:
            self._schedule.load(self._at.schedule)
        self._context.log(f"Going on from the checkpoint of step {step}, in epoch {self._at.epoch + 1}.")

    def _epoch(self) -> None:
        at, strategy, context = self._at, self._strategy, self._context
        order = torch.from_numpy(epoch_order(self._rows, at.epoch, self._seed))
        batches = order.split(self._batch_rows)
        for batch in batches[at.batch :]:
            if self._random:
                torch.manual_seed(_seed_of(self._seed, at.step, strategy.stream))
            strategy.step(batch, self._schedule.factor(at.step))
            at.step += 1
            at.batch += 1
            self._counted += len(batch)
            stop, last = context.should_stop(), at.batch == len(batches)
            if not strategy.must_agree(now=last):
                continue
            decision = strategy.agree(stop=stop, checkpoint=context.checkpoint_due(), now=last)
            if decision.loss is not None or decision.stop or decision.checkpoint:
                self._voted(decision)

    def _voted(self, decision: Decision) -> None:
        """Take note of what the ranks agreed on."""
        at, loss = self._at, decision.loss
        if loss is not None:
            self._count(loss, decision.weight)
        self._progress()
        # An epoch's end has its own metrics, of the whole epoch.
        if loss is not None and at.batch < self._batches:
            self._record({"train/loss": loss})
        if decision.stop or decision.checkpoint:
            # Votes may be some steps late: a checkpoint counts all steps that are in its weights.
            rest = self._strategy.agree(now=True)
            if rest.loss is not None:
                self._count(rest.loss, rest.weight)
            self._save()
        if decision.stop:
            self._strategy.settle()
            raise Stopped

    def _progress(self) -> None:
        """Say how far it is, if it is long enough since the last time, or the end."""
        at, total, now = self._at, self._batches * self._plan.epochs, time.monotonic()
        if now - self._said < _PROGRESS_SECONDS and at.step < total:
            return
        self._said = now
        epoch = min(at.epoch + 1, self._plan.epochs)
        self._context.progress(at.step, total, "steps", f"epoch {epoch} of {self._plan.epochs}")

    def _count(self, loss: float, weight: float) -> None:
        at = self._at
        at.loss += loss * weight
        at.weight += weight
        self._check(loss, "The loss")
        if at.first_loss is None:
            at.first_loss = loss

    def _end_of_epoch(self) -> bool:
        """Measure and decide whether to go on; give whether it no longer gets better."""
        at, plan, strategy = self._at, self._plan, self._strategy
        sums = strategy.evaluate(self._held_out, _MEASURED_ROWS, self._score.sums, self._score.width)
        metrics = {
            "train/loss": at.loss / at.weight if at.weight else math.nan,
            **named("held_out", self._score.metrics(sums)),
        }
        held_out_loss = metrics["held_out/loss"]
        self._check(held_out_loss, "The loss on the rows that are held out")
        self._schedule.epoch_ended(held_out_loss)
        at.epoch += 1
        at.batch, at.loss, at.weight = 0, 0.0, 0.0
        at.metrics = metrics
        self._record(metrics)
        if not plan.patience:
            return False
        if plan.stop_metric not in metrics:
            raise JobFailure(
                f"early_stopping.metric {plan.stop_metric} is not measured here; there are "
                f"{', '.join(sorted(metrics))}.",
                "INVALID_RECIPE",
            )
        value = metrics[plan.stop_metric]
        gain = math.inf if at.best is None else value - at.best
        if at.best is not None and not METRICS[plan.stop_metric]:
            gain = -gain
        if gain > plan.min_delta:
            at.best, at.best_epoch, at.best_metrics = value, at.epoch, metrics
            strategy.keep_best()
        return at.epoch - at.best_epoch >= plan.patience

    def _record(self, metrics: Mapping[str, float]) -> None:
        """Record metrics, if it is long enough since the last."""
        now = time.monotonic()
        if now - self._recorded < _METRICS_SECONDS:
            return
        self._recorded = now
        factor = self._schedule.factor(self._at.step)
        seconds = now - self._counted_at
        found = {**metrics, "learning_rate": self._plan.learning_rate * factor}
        if seconds > 0 and self._counted:
            found["rows_per_second"] = self._counted / seconds
        self._counted, self._counted_at = 0, now
        self._context.metrics(self._at.step, found)

    def _check(self, loss: float, what: str) -> None:
        first = self._at.first_loss
        if math.isfinite(loss) and (first is None or loss <= _EXPLODED * max(1.0, first)):
            return
        at = self._at
        # One that is being written is of weights that were good: it is kept, too.
        with contextlib.suppress(JobFailure, TimeoutError):
            self._strategy.settle()
        try:
            kept = self._context.last_checkpoint()
        except PenstockError as error:
            # Parts of it are elsewhere. It diverged all the same.
            where = f"which checkpoint is the last cannot be said: {str(error).rstrip('.')}"
        else:
            where = (
                "there is no checkpoint before"
                if kept is None
                else f"the last good checkpoint is of step {kept[0]}"
            )
        words = f"{loss:g}, after {first:g} at the beginning" if first is not None else f"{loss:g}"
        raise JobFailure(
            f"{what} is {words}: the training diverged in epoch {at.epoch + 1}, by step {at.step}; {where}. "
            f"Take a smaller learning rate than {self._plan.learning_rate:g}, a warm-up or clipping.",
            "DIVERGED",
        )

    def _save(self) -> None:
        """Begin a checkpoint of this step, if the weights are good."""
        strategy, at = self._strategy, self._at
        bad = not all(bool(torch.isfinite(value).all()) for value in _floats(strategy))
        if strategy.group.sum([float(bad)])[0]:
            self._check(math.nan, "A weight")
        at.schedule = self._schedule.state()
        step = at.step
        strategy.save(
            self._context.new_checkpoint(step),
            dataclasses.asdict(at),
            lambda: self._context.commit_checkpoint(step),
        )


def batch_rows(plan: Plan, rows: int) -> int:
    """Return the rows of a global batch: all of them for optimizers that take all."""
    return max(1, rows) if OPTIMIZERS[plan.optimizer.name].full_batch else min(plan.batch_size, max(1, rows))


def _floats(strategy: Strategy) -> list[torch.Tensor]:
    found = []
    for value in strategy.tensors().values():
        local = value.to_local() if hasattr(value, "to_local") else value
        if local.is_floating_point():
            found.append(local)
    return found


def _seed_of(seed: int, step: int, stream: int) -> int:
    """Return a seed of its own for each step and stream; what torch mixes needs not be mixed here."""
    return (seed * 1_000_003 + step * 4099 + stream) % (1 << 63)
