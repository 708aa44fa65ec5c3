"""Losses as sums, and metrics, against torch's and scikit-learn's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from penstock_worker.adapters.training.objective import (
    CrossEntropy,
    Regression,
    balanced_weights,
    named_weights,
)
from penstock_worker.adapters.training.scores import ClassScore, NumberScore, TokenScore


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_a_weighted_cross_entropy_is_torchs_weighted_mean(generator: torch.Generator) -> None:
    logits, targets = torch.randn(50, 4, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    weights = named_weights({"a": 3.0, "c": 0.5}, ["a", "b", "c", "d"])
    assert weights.tolist() == [3.0, 1.0, 0.5, 1.0]
    objective = CrossEntropy(weights)
    expected = torch.nn.functional.cross_entropy(logits, targets, weight=weights)
    torch.testing.assert_close(objective.loss_sum(logits, targets) / objective.weight(targets), expected)


def test_gradients_of_parts_add_up_to_that_of_the_batch(generator: torch.Generator) -> None:
    targets = torch.randint(0, 3, (30,), generator=generator)
    objective = CrossEntropy(balanced_weights(targets, 3))
    features, weights = torch.randn(30, 5, generator=generator), torch.zeros(5, 3, requires_grad=True)
    whole = objective.weight(targets)
    (objective.loss_sum(features @ weights, targets) / whole).backward()
    at_once, weights.grad = weights.grad, None
    for part in torch.arange(30).split([7, 20, 3]):
        (objective.loss_sum(features[part] @ weights, targets[part]) / whole).backward()
    torch.testing.assert_close(weights.grad, at_once)


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    targets = np.array([0] * 50 + [1] * 9 + [2] * 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    assert balanced_weights(torch.from_numpy(targets), 4).tolist() == pytest.approx(
        [*(expected * 3 / 4), 1.0]
    )


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mse", torch.nn.functional.mse_loss),
        ("mae", torch.nn.functional.l1_loss),
        ("huber", torch.nn.functional.huber_loss),
    ],
)
def test_losses_of_numbers_are_in_standard_deviations(
    name: str, reference: object, generator: torch.Generator
) -> None:
    outputs, targets = 5 * torch.randn(20, 1, generator=generator), torch.randn(20, generator=generator)
    objective = Regression(name, scale=2.5)
    found = objective.loss_sum(outputs, targets) / objective.weight(targets)
    torch.testing.assert_close(found, reference(outputs.squeeze(1) / 2.5, targets / 2.5))  # type: ignore[operator]


def test_scores_of_classes_are_scikit_learns_however_rows_are_cut(generator: torch.Generator) -> None:
    logits, targets = (
        torch.randn(200, 5, generator=generator),
        torch.randint(0, 4, (200,), generator=generator),
    )
    score = ClassScore(CrossEntropy(), 5)
    parts = [score.sums(logits[rows], targets[rows]) for rows in torch.arange(200).split(33)]
    found = score.metrics(torch.stack(parts).sum(0))
    answers = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, answers))
    assert found["f1"] == pytest.approx(metrics.f1_score(targets, answers, average="macro"))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)))


def test_scores_of_numbers_are_scikit_learns_far_from_zero(generator: torch.Generator) -> None:
    targets = 1e6 + torch.randn(200, generator=generator).double()
    outputs = targets + 0.5 * torch.randn(200, generator=generator).double()
    score = NumberScore(Regression("mse", 1.0), 1e6)
    found = score.metrics(score.sums(outputs[:, None], targets))
    assert found["r2"] == pytest.approx(metrics.r2_score(targets, outputs), abs=1e-9)
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(targets, outputs))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(targets, outputs))


def test_perplexity_of_equal_logits_is_the_vocabulary() -> None:
    score = TokenScore(CrossEntropy(tokens=6), bytes_per_token=2.0)
    found = score.metrics(score.sums(torch.zeros(3, 6, 100), torch.zeros(3, 6, dtype=torch.int64)))
    assert found["perplexity"] == pytest.approx(100)
    assert found["bits_per_byte"] == pytest.approx(math.log2(100) / 2)
