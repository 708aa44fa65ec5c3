"""What a version's outputs say: scores of classes, classes, or numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from penstock_kit.oip import BFLOAT16, Array, Signature, TensorSpec
from penstock_worker.adapters.measuring.questions import Questions
from penstock_worker.usecases.job_context import JobFailure

# Names that say which of several outputs has the scores; otherwise the first one of the right shape has them.
_SCORES = ("logits", "scores", "probabilities", "probability", "predict_proba")
# Classes that a message names.
_SHOWN = 10
# How far sums of probabilities in half precision are from 1.
_SUM_SLACK = 0.02
# ln of the least probability that is told apart from none: fp32's smallest normal number.
_LEAST_LOG = math.log(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """Which outputs mean what.

    Attributes:
        score_name: The output with a score for each class; empty if there is none.
        class_name: The output with the class itself; empty if there is none.
        number_name: The output with numbers (regression); empty for classes.
        order: Place of each of the dataset's classes in the scores, then of those that only the version has;
            None for the same order.
        places: Index of each class that the version may name, by its name.
    """

    score_name: str = ""
    class_name: str = ""
    number_name: str = ""
    order: tuple[int, ...] | None = None
    places: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def numbers(self) -> bool:
        """Whether the answers are numbers."""
        return bool(self.number_name)

    def values(self, outputs: Mapping[str, Array]) -> Array:
        """Return the numbers, fp64 [rows]."""
        return outputs[self.number_name].astype(np.float64).reshape(-1)

    def scores(self, outputs: Mapping[str, Array]) -> Array | None:
        """Return the scores, fp64 [rows, …, classes] in the dataset's order; None if there are none.

        Classes that the dataset does not have come behind those that it has.
        """
        if not self.score_name:
            return None
        scores = outputs[self.score_name].astype(np.float64)
        if scores.shape[-1] == 1:  # one logit of the second of two classes
            scores = np.concatenate([np.zeros_like(scores), scores], axis=-1)
        return scores if self.order is None else scores[..., list(self.order)]

    def classes(self, outputs: Mapping[str, Array]) -> Array:
        """Return the classes by index, int64 [rows]; -1 for one that the dataset does not have."""
        return np.array([self.places.get(name, -1) for name in self.names(outputs)], dtype=np.int64)

    def names(self, outputs: Mapping[str, Array]) -> list[str]:
        """Return the classes as the version calls them, one for each row."""
        return [
            value.decode(errors="replace") if isinstance(value, bytes) else str(value)
            for value in outputs[self.class_name].reshape(-1).tolist()
        ]


def answers_of(signature: Signature, outputs: Mapping[str, Array], questions: Questions) -> Answers:
    """Return which outputs mean what.

    Args:
        signature: Of the version.
        outputs: Of its first answer, whose shapes are known.
        questions: What was asked.

    Raises:
        JobFailure: UNSUPPORTED: no output can be meant; INVALID_DATA: the dataset has other classes.
    """
    floats = [spec for spec in signature.outputs if spec.dtype.kind == "f" or spec.dtype == BFLOAT16]
    if not questions.classes and questions.task != "language_model":
        rows = len(next(iter(outputs.values())))
        for spec in (*floats, *signature.outputs):
            if spec.datatype != "BYTES" and outputs[spec.name].size == rows:
                return Answers(number_name=spec.name)
        raise JobFailure("The version gives no output with one number a row.", "UNSUPPORTED")
    count = len(questions.classes)
    scored = [
        spec
        for spec in floats
        if outputs[spec.name].ndim >= 2
        and (
            not count
            or outputs[spec.name].shape[-1] in (count, len(spec.labels))
            or (count == 2 and outputs[spec.name].shape[-1] == 1)
        )
    ]
    scored.sort(key=lambda spec: _SCORES.index(spec.name) if spec.name in _SCORES else len(_SCORES))
    named = [spec for spec in signature.outputs if spec not in floats and outputs[spec.name].ndim <= 2]
    if not scored and not named:
        raise JobFailure(
            f"The version gives neither a score for each of the {count} classes nor a class.",
            "UNSUPPORTED",
        )
    return Answers(
        score_name=scored[0].name if scored else "",
        class_name=named[0].name if named else "",
        order=_order(scored[0], questions.classes) if scored else None,
        places={name: index for index, name in enumerate(questions.classes)},
    )


def _order(spec: TensorSpec, classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return where the dataset's classes are among the version's, then the others; None for the same order.

    Raises:
        JobFailure: INVALID_DATA: the version says its classes, and they are not those of the dataset.
    """
    if not spec.labels or not classes or spec.labels == classes:
        return None
    if not set(classes) <= set(spec.labels):
        raise strangers(spec.labels, classes)
    places = {name: index for index, name in enumerate(spec.labels)}
    others = [name for name in spec.labels if name not in classes]
    return tuple(places[name] for name in (*classes, *others))


def strangers(known: Sequence[str], classes: Sequence[str]) -> JobFailure:
    """Return the failure of a dataset whose classes are not those that the version answers with."""
    theirs, ours = (", ".join(names[:_SHOWN]) + " …" * (len(names) > _SHOWN) for names in (known, classes))
    return JobFailure(
        f"The version answers with the classes {theirs}; those of the dataset are {ours}. Take a dataset "
        "that calls its classes as the version does.",
        "INVALID_DATA",
    )


@dataclasses.dataclass(slots=True)
class LossSums:
    """Sums of -ln p(right class): whether scores are logits or probabilities is known at the end."""

    count: int = 0
    probabilities: bool = True
    """Whether all scores so far are probabilities: none negative, each row's sum 1."""
    of_logits: float = 0.0
    squares_of_logits: float = 0.0
    of_probabilities: float = 0.0
    squares_of_probabilities: float = 0.0

    def mean(self) -> tuple[float, float]:
        """Return the mean and the standard deviation."""
        total, squares = (
            (self.of_probabilities, self.squares_of_probabilities)
            if self.probabilities
            else (self.of_logits, self.squares_of_logits)
        )
        mean = total / self.count
        return mean, math.sqrt(max(0.0, squares / self.count - mean * mean))


def class_log_sums(sums: LossSums, scores: Array, targets: Array) -> None:
    """Add rows to the sums.

    Args:
        sums: Is changed.
        scores: fp64 [rows, classes], logits or probabilities.
        targets: int64 [rows].
    """
    rows = np.arange(len(targets))
    right = scores[rows, targets]
    highest = scores.max(-1)
    logs = right - highest - np.log(np.exp(scores - highest[:, None]).sum(-1))
    sums.of_logits -= float(logs.sum())
    sums.squares_of_logits += float((logs**2).sum())
    sums.count += len(targets)
    if sums.probabilities:
        fits = scores.min() >= 0 and bool(np.all(np.abs(scores.sum(-1) - 1) < _SUM_SLACK))
        sums.probabilities = bool(fits)
        logs = np.log(np.maximum(right, math.exp(_LEAST_LOG))) if fits else logs
        sums.of_probabilities -= float(logs.sum())
        sums.squares_of_probabilities += float((logs**2).sum())
