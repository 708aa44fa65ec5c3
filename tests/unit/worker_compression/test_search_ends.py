"""Which candidates a search measures thoroughly, and what it recommends, when its time is over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from penstock_worker.adapters.compression.search import Candidate, Effort, Found, Search
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.domain.gate import Gate
from penstock_worker.domain.pareto import Outcome


def outcome(speed: float, loss: float) -> Outcome:
    return Outcome(1000, 0.2, 0.001, 1000 * speed, speed, loss, {"accuracy": 0.99 - loss}, 100)


class Ended(Search):
    """A search whose trials are over.

    Args:
        seconds: Its time; 0 has passed already.
        brief: Speed-up and loss of each candidate, by name.
        late: Of some of them, when they are measured again.
    """

    def __init__(
        self, seconds: float, brief: dict[str, tuple[float, float]], late: dict[str, tuple[float, float]]
    ) -> None:
        nothing = cast("Any", SimpleNamespace(scratch=Path("/nowhere")))
        scale = SimpleNamespace(gate=Gate(max_metric_loss=0.02))
        super().__init__(nothing, nothing, nothing, cast("Any", scale), seconds=seconds, max_trials=0)
        self._beside = outcome(1.0, 0.0)
        self.late, self.measured = late, list[str]()
        for name, (speed, loss) in brief.items():
            candidate = Candidate(name, (), name, 0, outcome(speed, loss), passed=loss <= 0.02)
            self._candidates[name] = candidate

    def subject_of(self, candidate: Candidate) -> Subject:
        self.measured.append(candidate.body)
        return Subject()

    def _measure(self, subject: Subject, effort: Effort) -> tuple[Outcome, bool]:
        name = self.measured[-1]
        found = self._candidates[name].outcome
        if name in self.late:
            found = outcome(*self.late[name])
        return dataclasses.replace(found), found.metric_loss <= 0.02

    def _note(self, candidate: Candidate) -> None:
        pass

    def end(self) -> Found:
        self._measure_finalists()
        return self._found()


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_what_passed_is_recommended_although_something_faster_loses_a_little_too_much(seconds: float) -> None:
    search = Ended(seconds, {"fast": (22.0, 0.022), "good": (9.0, 0.011), "slow": (2.0, 0.0)}, {})
    assert search.end().recommended.body == "good"
    assert search.measured[0] == "good"


def test_the_next_is_measured_if_the_first_fails_when_it_is_looked_at_thoroughly() -> None:
    search = Ended(
        0.0, {"lucky": (22.0, 0.019), "good": (9.0, 0.011), "slow": (2.0, 0.0)}, {"lucky": (22, 0.03)}
    )
    assert search.end().recommended.body == "good"
    assert search.measured == ["lucky", "good"]


def test_if_nothing_passed_one_is_measured_and_said_to_have_failed() -> None:
    search = Ended(0.0, {"a": (5.0, 0.3), "b": (9.0, 0.4)}, {})
    assert not search.end().recommended.passed
    assert len(search.measured) == 1


def test_only_the_best_few_are_measured_while_there_is_time() -> None:
    search = Ended(1000.0, {f"c{number}": (2.0 + number, 0.0) for number in range(20)}, {})
    search.end()
    assert len(search.measured) == 6
