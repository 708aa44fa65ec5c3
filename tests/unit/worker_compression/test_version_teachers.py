"""What a student learns of a version that is asked as callers ask it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from penstock_worker.adapters.compression.teachers import VersionTeacher

ROWS = torch.tensor([0, 1])
SCORES = np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], dtype=np.float32)


def teacher(scores: Any, classes: tuple[str, ...]) -> VersionTeacher:
    spec = SimpleNamespace(name="scores", dtype=np.dtype(np.float32), labels=("a", "b", "c"))
    opened: Any = SimpleNamespace(
        signature=SimpleNamespace(outputs=(spec,)), predict=lambda rows: {"scores": scores[rows]}
    )
    questions: Any = SimpleNamespace(task="tabular", classes=classes, batch=lambda rows: (rows, None))
    return VersionTeacher("models/m/versions/1", opened, questions)


@pytest.mark.parametrize("of_probabilities", [True, False])
def test_classes_that_only_the_teacher_has_are_left_out(of_probabilities: bool) -> None:
    scores = SCORES if of_probabilities else SCORES - 1
    wanted = np.log(SCORES) if of_probabilities else scores
    given = teacher(scores, ("c", "a")).answer(ROWS, torch.empty(0))
    np.testing.assert_allclose(given.numpy(), wanted[:, [2, 0]], rtol=1e-6)


def test_all_classes_come_in_the_order_of_the_dataset() -> None:
    given = teacher(SCORES, ("b", "a", "c")).answer(ROWS, torch.empty(0))
    np.testing.assert_allclose(given.numpy(), np.log(SCORES)[:, [1, 0, 2]], rtol=1e-6)
