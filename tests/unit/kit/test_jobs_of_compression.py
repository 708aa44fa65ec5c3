"""What a compression may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs import check
from penstock_kit.jobs.compress import STEPS, search_seconds, step_message, step_of, steps_of


def work(*steps: tuple[str, Mapping[str, Any]]) -> job_work_pb2.CompressWork:
    made = job_work_pb2.CompressWork(version="models/m/versions/1", dataset="artifacts/d/versions/1")
    for name, parameters in steps:
        made.steps.add(name=name).parameters.update(dict(parameters))
    return made


def refusal(compress: job_work_pb2.CompressWork) -> str:
    with pytest.raises(InvalidArgument) as refused:
        check(job_pb2.Job(compress=compress))
    assert refused.value.metadata["field"].startswith("job.compress.")
    return refused.value.message


def test_every_step_may_stand_alone_with_its_defaults() -> None:
    for name in STEPS:
        check(job_pb2.Job(compress=work((name, {}))))


def test_a_step_nobody_knows_is_refused_with_the_nearest() -> None:
    assert "did you mean 'quantize'" in refusal(work(("quantise", {})))


def test_a_parameter_nobody_knows_is_refused_with_the_nearest() -> None:
    assert "did you mean 'percentile'" in refusal(work(("clip", {"percentil": 99})))


@pytest.mark.parametrize(
    ("step", "parameters", "words"),
    [
        ("clip", {"percentile": 101}, "at most 100"),
        ("prune", {"amount": 1}, "below 1"),
        ("prune", {"amount": 0}, "above 0"),
        ("prune", {"amount": "half"}, "must be a number"),
        ("prune", {"scope": "globl"}, "it may be global, layer"),
        ("prune_channels", {"round_to": 1.5}, "whole number"),
        ("quantize", {"scheme": "int8"}, "dynamic_int8"),
        ("quantize", {"per_channel": "yes"}, "true or false"),
        ("quantize", {"group_size": 48}, "16, 32, 64"),
        ("distill", {"student_parameters": 3}, "a mapping"),
        ("low_rank", {"layers": "head"}, "a list of names"),
        ("distill", {"student": "mpl"}, "did you mean 'mlp'"),
        ("distill", {"student": "mlp", "student_parameters": {"hiden": [8]}}, "did you mean 'hidden'"),
        ("prune", {"amount": math.nan}, "NaN"),
    ],
)
def test_values_that_cannot_be_are_refused(step: str, parameters: dict[str, Any], words: str) -> None:
    assert words in refusal(work((step, parameters)))


def test_nothing_comes_after_a_quantization() -> None:
    assert "last step" in refusal(work(("quantize", {}), ("prune", {})))


def test_steps_and_a_search_exclude_each_other_and_one_is_needed() -> None:
    both = work(("prune", {}))
    both.search.max_trials = 3
    assert "exclude" in refusal(both)
    assert "neither" in refusal(work())


def test_names_are_required() -> None:
    assert "version" in refusal(job_work_pb2.CompressWork(dataset="d"))
    assert "dataset" in refusal(job_work_pb2.CompressWork(version="m"))


@pytest.mark.parametrize("bound", ["max_metric_loss", "min_speed_up", "max_size_ratio"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_gate_has_numbers_from_zero_on(bound: str, value: float) -> None:
    asked = work(("prune", {}))
    setattr(asked.gate, bound, value)
    assert bound in refusal(asked)


def test_a_gate_of_an_unknown_metric_is_refused_with_the_nearest() -> None:
    asked = work(("prune", {}))
    asked.gate.metric = "acuracy"
    assert "did you mean 'accuracy'" in refusal(asked)


def test_a_search_has_ten_minutes_unless_it_says_otherwise() -> None:
    asked = work()
    asked.search.SetInParent()
    assert search_seconds(asked.search) == 600
    asked.search.budget.FromMilliseconds(1500)
    assert search_seconds(asked.search) == 1.5
    check(job_pb2.Job(compress=asked))
    asked.search.budget.FromMilliseconds(10)
    assert "budget" in refusal(asked)


def test_numbers_of_a_struct_get_the_types_of_their_parameters() -> None:
    (step,) = steps_of(work(("low_rank", {"rank": 8.0, "energy": 1, "layers": ["head"]})))
    assert step.parameters["rank"] == 8
    assert isinstance(step.parameters["rank"], int)
    assert isinstance(step.parameters["energy"], float)
    assert step.parameters["layers"] == ("head",)


def test_a_step_as_a_message_reads_as_the_same_step() -> None:
    step = step_of("prune_channels", {"amount": 0.25, "layers": ("1", "2"), "repair_epochs": 0.5})
    message = step_message(step)
    assert set(message.parameters) == {"amount", "layers", "repair_epochs"}
    made = work()
    made.steps.append(message)
    assert steps_of(made) == (step,)
    assert step.text() == "prune_channels(amount=0.25, layers=('1', '2'), repair_epochs=0.5)"
