"""How good a version is on rows whose answers are known.

Definitions, with N rows:

    accuracy    rows whose class is the right one, over N; for language models over tokens
    f1          mean over classes of 2·P·R / (P + R), P precision and R recall of the class (macro)
    loss        mean of -ln p(right class); for regression the same as mse
    perplexity  exp(loss), language models
    mse, mae    mean of (y - t)², of |y - t|
    r2          1 - Σ(y - t)² / Σ(t - mean t)²

accuracy, f1, mse, mae and r2 are scikit-learn's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from sklearn import metrics as sklearn_metrics

from penstock_kit.oip import Array
from penstock_worker.adapters.measuring.answers import (
    Answers,
    LossSums,
    answers_of,
    class_log_sums,
    strangers,
)
from penstock_worker.adapters.measuring.loading import OpenedVersion
from penstock_worker.adapters.measuring.questions import Questions
from penstock_worker.usecases.job_context import JobFailure

CLASSIFICATION = ("accuracy", "f1", "loss")
REGRESSION = ("mse", "mae", "r2", "loss")
LANGUAGE_MODEL = ("loss", "perplexity", "accuracy")
# Rows that are asked at once, where the manifest allows more or the version does not batch.
_MOST_ROWS = 256
# Half the width of a 95 % interval, in standard errors.
_NORMAL_95 = 1.96

Progress = Callable[[int, int], None]


def unheard(done: int, total: int) -> None:
    """Tell nobody."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """What was measured.

    Attributes:
        metrics: By name.
        margins: Half the width of the 95 % interval that the choice of rows gives a metric, for the means
            among them (accuracy, loss, mse, mae): a difference within it says little.
        rows: How many rows it was measured on.
        tokens: How many tokens, for language models; else 0.
    """

    metrics: dict[str, float]
    margins: dict[str, float]
    rows: int
    tokens: int = 0


def usual_metrics(questions: Questions) -> tuple[str, ...]:
    """Return the names of the metrics that the task has."""
    if questions.task == "language_model":
        return LANGUAGE_MODEL
    return CLASSIFICATION if questions.classes else REGRESSION


def measure_quality(
    opened: OpenedVersion,
    questions: Questions,
    *,
    metrics: Sequence[str] = (),
    limit: int = 0,
    progress: Progress = unheard,
) -> Quality:
    """Ask a version all rows and compare its answers with the right ones.

    Args:
        opened: The version.
        questions: The rows; see `questions.questions_of`.
        metrics: Which; empty means the usual ones of the task.
        limit: Rows at most, evenly spread over all; 0 means all.
        progress: Called with the rows done and all of them; may raise to end it.

    Raises:
        JobFailure: INVALID_RECIPE for a metric that the task does not have; INVALID_DATA for rows that do not
            fit the version, or that have no label; UNSUPPORTED for answers that are neither classes nor
            numbers.
        ModelError: The model raised an error.
    """
    usual = usual_metrics(questions)
    wanted = tuple(metrics) or usual
    if strange := [name for name in wanted if name not in usual]:
        raise JobFailure(
            f"This task has no {', '.join(strange)}; it has {', '.join(usual)}.", "INVALID_RECIPE"
        )
    total = min(limit, len(questions)) if limit else len(questions)
    chosen = np.linspace(0, max(0, len(questions) - 1), total).round().astype(np.int64)
    size = min(_MOST_ROWS, opened.max_rows) if opened.batched else 1
    opened.take_turn()
    seen: _Seen | None = None
    for at in range(0, total, size):
        inputs, targets = questions.batch(chosen[at : at + size])
        if not len(targets):
            raise JobFailure("The dataset has no label, so nothing can be measured.", "INVALID_DATA")
        outputs = opened.predict(inputs)
        seen = seen or _Seen(questions, answers_of(opened.signature, outputs, questions))
        seen.add(outputs, targets)
        progress(min(total, at + size), total)
    if seen is None:
        raise JobFailure("There are no rows to measure on.", "INVALID_DATA")
    found, margins = seen.result(wanted)
    return Quality(found, margins, total, seen.tokens)


class _Seen:
    """Answers and right answers so far. Of large outputs only sums are kept."""

    def __init__(self, questions: Questions, answers: Answers) -> None:
        self._questions = questions
        self._answers = answers
        self._given: list[Array] = []
        self._right: list[Array] = []
        self._loss = LossSums()
        self._names: set[str] = set()
        self.tokens = 0

    def add(self, outputs: dict[str, Array], targets: Array) -> None:
        answers = self._answers
        if answers.numbers:
            self._given.append(answers.values(outputs))
            self._right.append(targets.astype(np.float64).reshape(-1))
            return
        scores = answers.scores(outputs)
        if self._questions.task == "language_model":
            if scores is None:
                raise JobFailure("A language model must give a score for each token.", "UNSUPPORTED")
            targets = targets.reshape(-1)
            scores = scores.reshape(len(targets), -1)
            kept = targets >= 0  # what is not to be counted is -100, as in torch
            scores, targets = scores[kept], targets[kept]
            self.tokens += len(targets)
        if scores is not None:
            class_log_sums(self._loss, scores, targets)
        if scores is None:
            self._given.append(answers.classes(outputs))
            self._names.update(answers.names(outputs))
        else:
            best = scores.argmax(-1)
            # Behind the dataset's classes are those that only the version has.
            known = len(self._questions.classes) or scores.shape[-1]
            self._given.append(np.where(best < known, best, -1))
        self._right.append(targets)

    def result(self, wanted: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
        given, right = np.concatenate(self._given), np.concatenate(self._right)
        if self._names.isdisjoint(self._questions.classes) and self._names:
            raise strangers(sorted(self._names), self._questions.classes)
        found = _regression(given, right) if self._answers.numbers else self._classification(given, right)
        values = {name: value for name, (value, _) in found.items() if name in wanted}
        if missing := [name for name in wanted if name not in values]:
            raise JobFailure(
                f"{', '.join(missing)} needs a score for each class, and the version gives none; it gives "
                f"what {', '.join(found)} take.",
                "INVALID_RECIPE",
            )
        margins = {
            name: _NORMAL_95 * deviation / math.sqrt(len(right))
            for name, (_, deviation) in found.items()
            if name in values and deviation is not None
        }
        return values, margins

    def _classification(self, given: Array, right: Array) -> dict[str, tuple[float, float | None]]:
        accuracy = float(sklearn_metrics.accuracy_score(right, given))
        found: dict[str, tuple[float, float | None]] = {
            "accuracy": (accuracy, math.sqrt(accuracy * (1 - accuracy)))
        }
        if self._questions.task != "language_model":
            # A name that is none of the dataset's classes (-1) is wrong, but no class to average over.
            labels = sorted({*right.tolist(), *given.tolist()} - {-1})
            score = sklearn_metrics.f1_score(right, given, labels=labels, average="macro", zero_division=0.0)
            found["f1"] = (float(score), None)
        if self._loss.count:
            mean, deviation = self._loss.mean()
            found["loss"] = (mean, deviation)
            if self._questions.task == "language_model":
                found["perplexity"] = (math.exp(min(mean, 700.0)), None)
        return found


def _regression(given: Array, right: Array) -> dict[str, tuple[float, float | None]]:
    squares, absolutes = (given - right) ** 2, np.abs(given - right)
    mse = float(sklearn_metrics.mean_squared_error(right, given))
    found: dict[str, tuple[float, float | None]] = {
        "mse": (mse, float(squares.std())),
        "mae": (float(sklearn_metrics.mean_absolute_error(right, given)), float(absolutes.std())),
        "loss": (mse, float(squares.std())),
    }
    if len(right) > 1:
        found["r2"] = (float(sklearn_metrics.r2_score(right, given)), None)
    return found
