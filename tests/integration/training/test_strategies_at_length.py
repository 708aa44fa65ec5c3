"""Each strategy trains each architecture at 2 and 4 ranks to what one process comes to.

Prints the table of parity that services/worker/README.md has (`pytest -s`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.strategy_ranks import MODELS, Case, Result, alone, difference, together

pytestmark = pytest.mark.training

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "pipeline": {"name": "pipeline"},
    "tensor_parallel": {"name": "tensor_parallel"},
    "parameter_server": {"name": "parameter_server"},
}
# What float32 allows: sums in other orders. AdamW makes a step of full size out of gradients that are 0 but
# for rounding (the bias of an attention's keys), so weights of transformers differ by a part of its rate.
TOLERANCE = {"mlp": 1e-5, "cnn": 1e-5, "vit": 1e-3, "transformer": 1e-3, "gpt": 1e-3}


def few(model: str) -> Case:
    return Case(model=model, steps=30, clip=1.0)


def many(model: str) -> Case:
    return Case(model=model, steps=80, batch_size=64, clip=1.0, options={"lr": 1e-2})


def spread(case: Case, ranks: int, name: str) -> Case:
    spec = dict(STRATEGIES[name])
    if name == "parameter_server" and ranks == 4:
        spec["servers"] = 2
    return replace(case, strategy=spec)


WANTED = {(model, "weights"): few(model) for model in MODELS} | {
    (model, "quality"): many(model) for model in ("mlp", "cnn", "transformer")
}


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    """What one process comes to."""
    root = tmp_path_factory.mktemp("alone")
    return {what: alone(case, root) for what, case in WANTED.items()}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_architecture_comes_to_the_weights_and_the_quality_of_one_process(
    name: str, ranks: int, alike: dict[tuple[str, str], Result], tmp_path: Path
) -> None:
    cases = [spread(case, ranks, name) for case in WANTED.values()]
    results = dict(zip(WANTED, together(tmp_path / "group", ranks, cases, timeout=230), strict=True))
    for (model, what), result in results.items():
        assert result.failure is None, result.failure
        expected = alike[model, what]
        if what == "weights":
            found = difference(result.weights, expected.weights)
            print(f"\n{name} {ranks} {model} {found:.1e}", end="")
            assert found < TOLERANCE[model], (name, model, found)
        else:
            print(f"\n{name} {ranks} {model} {result.accuracy:.4f} {expected.accuracy:.4f}", end="")
            assert result.accuracy == pytest.approx(expected.accuracy, abs=0.02), (name, model)
            assert result.accuracy > 0.8, (name, model)


@pytest.mark.timeout(200)
def test_a_training_goes_on_with_other_strategies_at_other_numbers_of_ranks(tmp_path: Path) -> None:
    # From one checkpoint to the next: who saved it, and how many they were, does not matter.
    legs = [("fsdp", 4), ("ddp", 2), ("tensor_parallel", 4), ("pipeline", 2), ("parameter_server", 4)]
    start = Case(
        model="transformer", steps=5, clip=1.0, optimizer="SGD", options={"lr": 0.05, "momentum": 0.9}
    )
    load = ""
    for number, (name, ranks) in enumerate(legs):
        save = str(tmp_path / f"checkpoint {number}")
        (result,) = together(
            tmp_path / f"leg {number}", ranks, [replace(spread(start, ranks, name), load=load, save=save)]
        )
        assert result.failure is None, result.failure
        load = save
    result = alone(replace(start, load=load), tmp_path)
    expected = alone(replace(start, steps=5 * (len(legs) + 1)), tmp_path)
    assert difference(result.weights, expected.weights) < 1e-4


@pytest.mark.parametrize("staleness", [1, 3])
def test_no_worker_is_further_ahead_than_the_staleness_and_the_fastest_uses_it(
    staleness: int, tmp_path: Path
) -> None:
    case = Case(
        strategy={"name": "parameter_server", "asynchronous": True, "staleness": staleness},
        steps=60,
        batch_size=30,
        slow=0.01,
    )
    (result,) = together(tmp_path, 4, [case])
    assert result.failure is None
    assert result.lead == staleness


def test_servers_that_do_not_wait_train_as_well(tmp_path: Path) -> None:
    spec = {"name": "parameter_server", "asynchronous": True}
    cases = [
        replace(many("mlp"), strategy={**spec, "servers": servers}, steps=300, options={"lr": 3e-3})
        for servers in (1, 2)
    ]
    expected = alone(replace(cases[0], strategy={}), tmp_path)
    for result in together(tmp_path / "group", 4, cases):
        assert result.accuracy > 0.93
        assert result.accuracy == pytest.approx(expected.accuracy, abs=0.03)


def test_what_only_the_ranks_can_know_is_refused_by_all_of_them(tmp_path: Path) -> None:
    wrong = {
        "A batch of 3 rows cannot be cut into parts for 4": Case(strategy={"name": "ddp"}, batch_size=3),
        "single is for 1 rank, and there are 4": Case(strategy={"name": "single"}),
        "fp16 needs a GPU": Case(strategy={"name": "pipeline"}, model="cnn", precision="fp16"),
    }
    for words, result in zip(wrong, together(tmp_path, 4, list(wrong.values())), strict=True):
        assert result.failure is not None
        assert words in result.failure[0]
        assert result.failure[1] == "INVALID_RECIPE"


def test_with_fewer_ranks_than_servers_one_computes(tmp_path: Path) -> None:
    case = Case(strategy={"name": "parameter_server", "servers": 3}, steps=4)
    (result,) = together(tmp_path / "group", 2, [case])
    assert "1 instead of 3 servers" in result.notes[0]
    expected = alone(replace(case, strategy={}), tmp_path)
    assert difference(result.weights, expected.weights) < 1e-5
