"""What the gate lets through."""

from __future__ import annotations

import math

import pytest

from penstock_worker.domain.gate import Gate, Measured, judge, judge_metrics, main_metric, metric_loss


def test_a_gate_without_limits_passes_everything() -> None:
    assert Gate().empty
    assert judge(Gate(), Measured()).passed


def test_a_limit_that_is_met_to_the_last_decimal_passes() -> None:
    gate = Gate(max_metric_loss=0.01, min_speed_up=2.0, max_size_ratio=0.3)
    assert judge(gate, Measured(0.97 - 0.96, 2.0, 0.3)).passed


def test_each_failure_says_what_was_found_and_what_was_wanted() -> None:
    gate = Gate("accuracy", max_metric_loss=0.01, min_speed_up=2.0, max_size_ratio=0.3)
    verdict = judge(gate, Measured(0.03, 1.5, 0.4))
    assert not verdict.passed
    assert verdict.failures == (
        "the loss of accuracy is 0.03, more than 0.01",
        "the speed-up is 1.5, less than 2",
        "the size over the source's is 0.4, more than 0.3",
    )


def test_what_was_not_measured_or_is_no_number_fails() -> None:
    assert not judge(Gate(min_speed_up=1.0), Measured()).passed
    assert not judge(Gate(max_metric_loss=1.0), Measured(metric_loss=math.nan)).passed


def test_a_limit_of_zero_is_a_limit() -> None:
    assert not judge(Gate(max_metric_loss=0.0), Measured(metric_loss=0.001)).passed


def test_losing_is_positive_whether_more_or_less_is_better() -> None:
    assert metric_loss("accuracy", 0.9, 0.8) == pytest.approx(0.1)
    assert metric_loss("perplexity", 10.0, 12.0) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no metric 'speed'"):
        metric_loss("speed", 1.0, 2.0)


def test_the_main_metric_is_the_usual_one_of_the_task() -> None:
    assert main_metric({"loss", "accuracy", "f1"}) == "accuracy"
    assert main_metric({"mse", "r2", "mae"}) == "r2"
    assert main_metric({"loss", "perplexity"}) == "perplexity"


def test_metrics_of_both_are_compared_by_the_gates_metric_or_the_main_one() -> None:
    source, result = {"accuracy": 0.97, "f1": 0.96}, {"accuracy": 0.97, "f1": 0.80}
    assert judge_metrics(Gate(max_metric_loss=0.01), source, result).passed
    verdict = judge_metrics(Gate("f1", max_metric_loss=0.01), source, result)
    assert not verdict.passed
    assert verdict.measured.values() == {"metric_loss": pytest.approx(0.16)}


def test_a_metric_that_only_one_of_them_has_fails_a_gate_on_it() -> None:
    assert not judge_metrics(Gate("f1", max_metric_loss=0.01), {"accuracy": 1.0}, {"accuracy": 1.0}).passed
