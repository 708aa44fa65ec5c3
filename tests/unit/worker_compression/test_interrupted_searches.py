"""A search goes on: after an end at any moment with what it had measured, and after a bad finalist."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.compression.search import Effort, Found, Search
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.measuring.loading import ModelError
from penstock_worker.domain.gate import Gate
from penstock_worker.domain.pareto import Outcome
from penstock_worker.domain.search_space import ModelFacts, Steps
from penstock_worker.usecases.job_context import JobFailure
from support.job_context import FileJobContext

SPEEDS = {"static_int8": 7.0, "dynamic_int8": 3.5, "weight_only_int8": 2.2, "weight_only_int4": 2.1}


def outcome(speed: float) -> Outcome:
    return Outcome(1000, 0.25, 0.001 / speed, 1000 * speed, speed, 0.0, {"accuracy": 0.99}, 100)


class Bench:
    """Stands where a `Scale` does: every quantization has its speed, and what was measured is noted.

    Args:
        bad: Those that fail when they are measured thoroughly, with how.
    """

    gate, metric = Gate(max_metric_loss=0.02), "accuracy"

    def __init__(self, bad: Mapping[str, BaseException] | None = None) -> None:
        self.brief, self.thorough = list[str](), list[str]()
        self._bad = dict(bad or {})

    def measure(self, directory: Path, manifest: str, effort: Effort) -> tuple[Outcome, Outcome]:
        (self.brief if effort.rows else self.thorough).append(manifest)
        if not effort.rows and manifest in self._bad:
            raise self._bad[manifest]
        return outcome(SPEEDS[manifest]), outcome(1.0)

    def judge(self, measured: Outcome) -> SimpleNamespace:
        return SimpleNamespace(passed=measured.metric_loss <= 0.02)


class Quantizations(Search):
    """A search among the quantizations of a source that is not there.

    Args:
        root: The job's directory.
        bench: Measures.
        late: Whether the time is over when all have been tried.
    """

    def __init__(self, root: Path, bench: Bench, *, late: bool = False) -> None:
        context = FileJobContext(root, job_pb2.Job(name="jobs/search", attempt=1))
        source = SimpleNamespace(write_bundle=lambda subject, directory: subject)
        super().__init__(
            context,
            cast("Any", source),
            cast("Any", None),
            cast("Any", bench),
            seconds=1000.0,
            max_trials=0,
        )
        self._late, self._bench = late, bench

    def _facts(self) -> ModelFacts:
        return ModelFacts(trainable=False, convolutions=1, linears=1, free_layers=0, blocks=0)

    def _subject(self, body: str, rung: int, finish: Steps) -> Subject:
        return cast("Subject", finish[-1][1]["scheme"])

    def _elapsed(self) -> float:
        return 1001.0 if self._late and len(self._bench.brief) == len(SPEEDS) else 0.0


def names(found: Found) -> list[str]:
    return [each.finish[-1][1]["scheme"] for each in found.candidates]


def last_state(root: Path) -> Path:
    return max((root / "checkpoints").glob("*/search.json"))


@pytest.mark.parametrize(("late", "finalists"), [(False, 4), (True, 1)])
def test_a_search_that_ended_while_it_published_measures_nothing_again(
    tmp_path: Path, late: bool, finalists: int
) -> None:
    bench = Bench()
    first = Quantizations(tmp_path, bench, late=late).run()
    assert (len(bench.brief), len(bench.thorough)) == (4, finalists)
    again = Quantizations(tmp_path, bench, late=late).run()
    assert (len(bench.brief), len(bench.thorough)) == (4, finalists)
    assert again == first


@pytest.mark.parametrize("late", [False, True])
def test_a_state_without_what_was_measured_of_the_source_is_measured_again(
    tmp_path: Path, late: bool
) -> None:
    bench = Bench()
    first = Quantizations(tmp_path, bench, late=late).run()
    state = json.loads(last_state(tmp_path).read_text())
    # As earlier releases wrote it.
    state.pop("beside", None)
    last_state(tmp_path).write_text(json.dumps(state))
    again = Quantizations(tmp_path, bench, late=late).run()
    assert bench.thorough[: len(bench.thorough) // 2] == bench.thorough[len(bench.thorough) // 2 :]
    assert len(bench.brief) == 4
    assert again == first


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failure", [JobFailure("its loss is nan", "NUMERICS"), ModelError("no kernel")])
def test_a_finalist_that_fails_is_left_out_with_its_reason(
    tmp_path: Path, failure: JobFailure | ModelError, late: bool
) -> None:
    bench = Bench({"static_int8": failure})
    found = Quantizations(tmp_path, bench, late=late).run()
    assert bench.thorough[:2] == ["static_int8", "dynamic_int8"]
    assert names(found)[0] == "dynamic_int8"
    assert found.recommended is found.candidates[0]
    assert set(names(found)) == set(SPEEDS) - {"static_int8"}
    (reason,) = found.skipped
    assert "static_int8" in reason
    assert str(failure) in reason
    measured = len(bench.thorough)
    assert Quantizations(tmp_path, bench, late=late).run() == found
    assert len(bench.thorough) == measured, "it was measured again"


def test_a_search_that_is_killed_after_a_bad_finalist_does_not_measure_it_again(tmp_path: Path) -> None:
    failure = JobFailure("its loss is nan", "NUMERICS")
    bench = Bench({"static_int8": failure, "dynamic_int8": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        Quantizations(tmp_path, bench).run()
    later = Bench({"static_int8": failure})
    found = Quantizations(tmp_path, later).run()
    assert later.brief == []
    assert later.thorough == ["dynamic_int8", "weight_only_int8", "weight_only_int4"]
    assert len(found.skipped) == 1


def test_a_search_whose_finalists_all_fail_says_that_nothing_could_be_measured(tmp_path: Path) -> None:
    bench = Bench(dict.fromkeys(SPEEDS, JobFailure("its loss is nan", "NUMERICS")))
    with pytest.raises(JobFailure, match="Nothing that was tried could be measured") as failed:
        Quantizations(tmp_path, bench).run()
    assert failed.value.cause == "UNSUPPORTED"
    assert len(bench.thorough) == len(SPEEDS)
