"""Strategies come to the same model as one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.strategy_ranks import Case, Result, alone, difference, together

PLAIN = Case()
# Rows that differ in weight, a bounded gradient, and a last batch of an epoch with one row for two ranks.
UNEVEN = Case(
    steps=12, rows=193, weighted=True, clip=0.5, optimizer="SGD", options={"lr": 0.1, "momentum": 0.9}
)

LBFGS = Case(
    steps=3, rows=400, batch_size=400, micro=128, optimizer="LBFGS", options={"lr": 0.5, "max_iter": 6}
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Cases that two ranks took in turn."""
    root = tmp_path_factory.mktemp("two")
    cases = {
        "ddp": replace(PLAIN, strategy={"name": "ddp"}),
        "fsdp": replace(PLAIN, strategy={"name": "fsdp"}),
        "fsdp uneven": replace(UNEVEN, strategy={"name": "fsdp"}, micro=5),
        "pipeline": replace(PLAIN, strategy={"name": "pipeline"}),
        "pipeline uneven": replace(UNEVEN, strategy={"name": "pipeline", "microbatches": 3}),
        "tensor_parallel": replace(PLAIN, strategy={"name": "tensor_parallel"}),
        "tensor_parallel uneven": replace(UNEVEN, strategy={"name": "tensor_parallel"}),
        "parameter_server": replace(PLAIN, strategy={"name": "parameter_server"}),
        "parameter_server uneven": replace(UNEVEN, strategy={"name": "parameter_server"}),
        "asynchronous": replace(PLAIN, strategy={"name": "parameter_server", "asynchronous": True}),
        "ddp in pieces": replace(UNEVEN, strategy={"name": "ddp"}, micro=5),
        "ddp lbfgs": replace(LBFGS, strategy={"name": "ddp"}),
        "ddp uneven": replace(UNEVEN, strategy={"name": "ddp"}, save=str(root / "checkpoint")),
    }
    found = dict(zip(cases, together(root / "group", 2, list(cases.values())), strict=True))
    found["ddp uneven, on alone"] = alone(
        replace(UNEVEN, steps=8, load=str(root / "checkpoint")), root / "single"
    )
    return found


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pipeline", "tensor_parallel", "parameter_server"])
def test_two_ranks_come_to_the_weights_of_one_process(
    name: str, two: dict[str, Result], tmp_path: Path
) -> None:
    expected = alone(PLAIN, tmp_path)
    assert difference(two[name].weights, expected.weights) < 1e-5
    assert two[name].accuracy == pytest.approx(expected.accuracy, abs=0.01)
    assert two[name].held_out == 397


def test_rows_of_unequal_weight_and_batches_of_a_single_row_count_as_in_one_process(
    two: dict[str, Result], tmp_path: Path
) -> None:
    expected = alone(UNEVEN, tmp_path)
    for name in ("ddp", "fsdp", "pipeline", "tensor_parallel", "parameter_server"):
        name += " uneven"
        assert difference(two[name].weights, expected.weights) < 1e-5, name
    assert difference(two["ddp in pieces"].weights, expected.weights) < 1e-5
    in_pieces = alone(replace(UNEVEN, micro=7), tmp_path)
    assert difference(in_pieces.weights, expected.weights) < 1e-5


def test_an_optimizer_that_asks_for_gradients_several_times_sees_the_whole_batch(
    two: dict[str, Result], tmp_path: Path
) -> None:
    expected = alone(LBFGS, tmp_path)
    assert difference(two["ddp lbfgs"].weights, expected.weights) < 1e-4
    assert expected.accuracy > 0.5


def test_a_checkpoint_of_two_ranks_goes_on_in_one(two: dict[str, Result], tmp_path: Path) -> None:
    expected = alone(replace(UNEVEN, steps=20), tmp_path)
    assert difference(two["ddp uneven, on alone"].weights, expected.weights) < 1e-4
