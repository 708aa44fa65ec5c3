"""What a search tries, and in which order."""

from __future__ import annotations

from typing import Any

import pytest

from penstock_kit.jobs.compress import step_of
from penstock_worker.domain.search_space import (
    LAST_RUNG,
    RUNG_SHARES,
    ModelFacts,
    allowed_loss,
    bodies,
    clipped,
    finishes,
    pace,
    score,
    survivors,
)

CNN = ModelFacts(trainable=True, convolutions=2, linears=2, free_layers=3, blocks=0)
TRANSFORMER = ModelFacts(trainable=True, convolutions=0, linears=25, free_layers=4, blocks=4)
GRAPH = ModelFacts(trainable=False, convolutions=0, linears=3, free_layers=0, blocks=0)


def names(steps: Any) -> list[str]:
    return [name for name, _ in steps]


@pytest.mark.parametrize("facts", [CNN, TRANSFORMER, GRAPH])
def test_all_that_is_tried_are_steps_that_there_are(facts: ModelFacts) -> None:
    combinations = [body.steps for body in bodies(facts, 0.5)] + finishes(facts)
    combinations += [clipped(finish) for finish in finishes(facts)]
    for steps in combinations:
        for name, parameters in steps:
            step_of(name, parameters)


def test_a_pushed_graph_is_only_quantized() -> None:
    assert not bodies(GRAPH, 1.0)
    assert [names(finish) for finish in finishes(GRAPH)] == [["quantize"]] * 4


def test_convolutions_are_calibrated_first_and_linear_layers_are_not() -> None:
    assert finishes(CNN)[0][0][1] == {"scheme": "static_int8"}
    assert finishes(TRANSFORMER)[0][0][1] == {"scheme": "dynamic_int8"}


def test_layers_are_dropped_only_where_there_are_some() -> None:
    def steps(facts: ModelFacts) -> set[str]:
        return {name for body in bodies(facts, 1.0) for name in names(body.steps)}

    assert "drop_layers" not in steps(CNN)
    assert {"drop_layers", "distill", "prune_channels", "low_rank"} <= steps(TRANSFORMER)


def test_the_names_of_bodies_are_their_own() -> None:
    found = [body.name for body in bodies(TRANSFORMER, 1.0)]
    assert len(set(found)) == len(found)


def test_a_third_goes_on_and_the_last_rung_ends_it() -> None:
    scores = {f"b{number}": float(number) for number in range(7)}
    assert survivors(scores, 0) == ["b6", "b5", "b4"]
    assert survivors({"only": -5.0}, 1) == ["only"]
    assert survivors(scores, LAST_RUNG) == []


def test_what_loses_more_than_allowed_scores_less_the_more_it_loses() -> None:
    free, little, much = (score(2.0, 0.5, loss, 0.01) for loss in (0.01, 0.02, 0.05))
    assert free > little > much


def test_early_rungs_are_patient() -> None:
    allowed = [allowed_loss(0.01, rung) for rung in range(LAST_RUNG + 1)]
    assert allowed == sorted(allowed, reverse=True)
    assert allowed[-1] == pytest.approx(0.01)


def test_repairs_of_all_bodies_fit_their_share_of_the_time() -> None:
    rows, batch, step_seconds, seconds, count = 3000, 64, 0.5, 600.0, 9
    epochs = pace(rows, batch, step_seconds, seconds, count)
    per_epoch = rows / batch
    first = epochs[0] * per_epoch * step_seconds * count
    assert first <= RUNG_SHARES[0] * seconds * 1.05
    assert epochs[0] < epochs[1] < epochs[2]


def test_where_steps_cost_nothing_small_data_is_not_seen_for_ever() -> None:
    assert pace(100, 64, 1e-4, 600.0, 4) == (4.0, 12.0, 30.0)
