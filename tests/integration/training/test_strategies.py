"""Strategies at two ranks come to the same model as one process."""

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


def in_turns(root: Path, cases: dict[str, Case]) -> dict[str, Result]:
    """What one group of two ranks came to."""
    return dict(zip(cases, together(root, 2, list(cases.values())), strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    root = tmp_path_factory.mktemp("two")
    checkpoint = str(root / "checkpoint")
    server = {"name": "parameter_server"}
    found = in_turns(
        root / "group",
        {
            "ddp": replace(PLAIN, strategy={"name": "ddp"}),
            "ddp uneven": replace(UNEVEN, strategy={"name": "ddp"}, save=checkpoint),
            "ddp in pieces": replace(UNEVEN, strategy={"name": "ddp"}, micro=5),
            "parameter_server": replace(PLAIN, strategy=server),
            "parameter_server, on": replace(UNEVEN, strategy=server, steps=4, load=checkpoint),
        },
    )
    found["alone, on"] = alone(replace(UNEVEN, steps=8, load=checkpoint), root / "single")
    return found


@pytest.mark.parametrize("name", ["ddp", "parameter_server"])
def test_two_ranks_come_to_the_weights_of_one_process(
    name: str, two: dict[str, Result], tmp_path: Path
) -> None:
    expected = alone(PLAIN, tmp_path)
    assert difference(two[name].weights, expected.weights) < 1e-5
    assert two[name].accuracy == pytest.approx(expected.accuracy, abs=0.01)
    assert two[name].held_out == 397


@pytest.mark.parametrize("name", ["ddp uneven", "ddp in pieces"])
def test_rows_of_unequal_weight_and_batches_of_a_single_row_count_as_in_one_process(
    name: str, two: dict[str, Result], tmp_path: Path
) -> None:
    expected = alone(UNEVEN, tmp_path)
    assert difference(two[name].weights, expected.weights) < 1e-5
    in_pieces = alone(replace(UNEVEN, micro=7), tmp_path)
    assert difference(in_pieces.weights, expected.weights) < 1e-5


def test_a_checkpoint_of_two_ranks_goes_on_in_one_and_with_another_strategy(
    two: dict[str, Result], tmp_path: Path
) -> None:
    assert difference(two["alone, on"].weights, alone(replace(UNEVEN, steps=20), tmp_path).weights) < 1e-5
    expected = alone(replace(UNEVEN, steps=16), tmp_path)
    assert difference(two["parameter_server, on"].weights, expected.weights) < 1e-5


@pytest.mark.training
def test_all_strategies_count_rows_as_one_process_does(tmp_path: Path) -> None:
    strategies = ("fsdp", "pipeline", "tensor_parallel", "parameter_server")
    cases = {f"{name} plain": replace(PLAIN, strategy={"name": name}) for name in strategies}
    cases |= {f"{name} uneven": replace(UNEVEN, strategy={"name": name}, micro=5) for name in strategies}
    cases["three pieces uneven"] = replace(UNEVEN, strategy={"name": "pipeline", "microbatches": 3})
    cases["ddp lbfgs"] = replace(LBFGS, strategy={"name": "ddp"})
    cases["fsdp lbfgs"] = replace(LBFGS, strategy={"name": "fsdp"})
    found = in_turns(tmp_path / "group", cases)
    for name, result in found.items():
        # The first vote comes after the first step, before the models have gone their ways.
        if not result.failure:
            assert result.losses[0] == pytest.approx(alone(cases[name], tmp_path).losses[0], rel=1e-3), name
    refused = found.pop("fsdp lbfgs").failure
    assert refused is not None
    assert "cannot use lbfgs" in refused[0]
    # An optimizer that asks for gradients several times in a step sees the whole batch each time.
    quick = alone(LBFGS, tmp_path)
    assert quick.accuracy > 0.5
    assert difference(found.pop("ddp lbfgs").weights, quick.weights) < 1e-4
    expected = {"plain": alone(PLAIN, tmp_path), "uneven": alone(UNEVEN, tmp_path)}
    for name, result in found.items():
        assert difference(result.weights, expected[name.split()[-1]].weights) < 1e-5, name
