"""Strategies come to the same model as one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.strategy_ranks import Case, Result, alone, difference, together

PLAIN = Case()
# Rows that differ in weight, a bounded gradient, and a last batch of an epoch with a single row for two ranks.
UNEVEN = Case(
    steps=12, rows=193, weighted=True, clip=0.5, optimizer="SGD", options={"lr": 0.1, "momentum": 0.9}
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Cases that two ranks took in turn."""
    root = tmp_path_factory.mktemp("two")
    cases = {
        "ddp": replace(PLAIN, strategy={"name": "ddp"}),
        "ddp uneven": replace(UNEVEN, strategy={"name": "ddp"}, save=str(root / "checkpoint")),
    }
    found = dict(zip(cases, together(root / "group", 2, list(cases.values())), strict=True))
    found["ddp uneven, on alone"] = alone(
        replace(UNEVEN, steps=8, load=str(root / "checkpoint")), root / "single"
    )
    return found


def test_ddp_at_two_ranks_is_one_process(two: dict[str, Result], tmp_path: Path) -> None:
    expected = alone(PLAIN, tmp_path)
    assert difference(two["ddp"].weights, expected.weights) < 1e-5
    assert two["ddp"].accuracy == pytest.approx(expected.accuracy, abs=0.01)
    assert two["ddp"].held_out == 397


def test_rows_of_unequal_weight_and_batches_of_a_single_row_count_as_in_one_process(
    two: dict[str, Result], tmp_path: Path
) -> None:
    expected = alone(UNEVEN, tmp_path)
    assert difference(two["ddp uneven"].weights, expected.weights) < 1e-5


def test_a_checkpoint_of_two_ranks_goes_on_in_one(two: dict[str, Result], tmp_path: Path) -> None:
    expected = alone(replace(UNEVEN, steps=20), tmp_path)
    assert difference(two["ddp uneven, on alone"].weights, expected.weights) < 1e-4
