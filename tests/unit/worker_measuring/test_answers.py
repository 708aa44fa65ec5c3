"""What outputs of a version say: scores, classes, numbers; and in whose order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from penstock_kit.oip import Array, Signature, TensorSpec
from penstock_worker.adapters.measuring.answers import LossSums, answers_of, class_log_sums
from penstock_worker.usecases.job_context import JobFailure


class Asked:
    """Rows of two classes, unless a test says otherwise."""

    def __init__(self, *classes: str, task: str = "tabular") -> None:
        self.task = task
        self.classes = classes

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Array) -> tuple[dict[str, Array], Array]:
        raise NotImplementedError


def giving(*outputs: TensorSpec) -> Signature:
    return Signature((TensorSpec("x", "FP32", (-1, 1)),), outputs, batched=True)


def test_scores_come_in_the_order_of_the_datasets_classes() -> None:
    signature = giving(TensorSpec("y", "FP32", (-1, 2), labels=("dog", "cat")))
    outputs: dict[str, Any] = {"y": np.array([[1.0, 2.0]])}
    answers = answers_of(signature, outputs, Asked("cat", "dog"))
    scores = answers.scores(outputs)
    assert scores is not None
    assert scores.tolist() == [[2.0, 1.0]]


def test_a_dataset_with_other_classes_than_the_version_is_refused_with_both() -> None:
    signature = giving(TensorSpec("y", "FP32", (-1, 2), labels=("0", "1")))
    with pytest.raises(JobFailure, match="the classes 0, 1; those of the dataset are benign, malignant"):
        answers_of(signature, {"y": np.array([[1.0, 2.0]])}, Asked("benign", "malignant"))


def test_a_dataset_may_have_some_of_the_versions_classes_only() -> None:
    signature = giving(TensorSpec("y", "FP32", (-1, 3), labels=("bird", "cat", "dog")))
    outputs: dict[str, Any] = {"y": np.array([[3.0, 1.0, 2.0]])}
    scores = answers_of(signature, outputs, Asked("cat", "dog")).scores(outputs)
    assert scores is not None
    assert scores.tolist() == [[1.0, 2.0, 3.0]], "what only the version has comes last"


def test_one_score_of_two_classes_is_that_of_the_second() -> None:
    signature = giving(TensorSpec("y", "FP32", (-1, 1)))
    outputs: dict[str, Any] = {"y": np.array([[-1.0], [3.0]])}
    scores = answers_of(signature, outputs, Asked("0", "1")).scores(outputs)
    assert scores is not None
    assert scores.argmax(1).tolist() == [0, 1]


def test_classes_that_the_dataset_does_not_have_are_none_of_its() -> None:
    signature = giving(TensorSpec("label", "BYTES", (-1,)))
    outputs: dict[str, Any] = {"label": np.array([b"cat", b"bird"], dtype=object)}
    answers = answers_of(signature, outputs, Asked("cat", "dog"))
    assert answers.scores(outputs) is None
    assert answers.classes(outputs).tolist() == [0, -1]


def test_numbers_are_taken_from_the_output_with_one_a_row() -> None:
    signature = giving(TensorSpec("all", "FP32", (-1, 3)), TensorSpec("y", "FP32", (-1, 1)))
    outputs: dict[str, Any] = {"all": np.zeros((2, 3)), "y": np.array([[1.0], [2.0]])}
    assert answers_of(signature, outputs, Asked()).values(outputs).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_a_version_that_answers_neither_is_refused(classes: tuple[str, ...]) -> None:
    signature = giving(TensorSpec("y", "FP32", (-1, 7)))
    with pytest.raises(JobFailure, match="gives n"):
        answers_of(signature, {"y": np.zeros((2, 7))}, Asked(*classes))


def test_probabilities_and_logits_have_the_same_loss() -> None:
    logits = np.array([[1.0, 3.0], [0.5, -2.0]])
    targets = np.array([1, 0])
    powers = np.exp(logits)
    of_logits, of_probabilities = LossSums(), LossSums()
    class_log_sums(of_logits, logits, targets)
    class_log_sums(of_probabilities, powers / powers.sum(1, keepdims=True), targets)
    assert of_probabilities.probabilities
    assert of_logits.mean() == pytest.approx(of_probabilities.mean())


def test_one_batch_that_is_no_probability_makes_all_of_them_logits() -> None:
    sums = LossSums()
    class_log_sums(sums, np.array([[0.5, 0.5]]), np.array([0]))
    class_log_sums(sums, np.array([[2.0, -2.0]]), np.array([0]))
    wanted = (math.log(2) + math.log1p(math.exp(-4))) / 2
    assert sums.mean()[0] == pytest.approx(wanted)


def test_a_probability_of_nothing_costs_much_but_not_everything() -> None:
    sums = LossSums()
    class_log_sums(sums, np.array([[1.0, 0.0]]), np.array([1]))
    assert 80 < sums.mean()[0] < 90
