"""Would the chaos tests notice? Histories with each fault that they look for, and what the validator says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.chaos.history import OK, Call, History, Strike, calls
from support.chaos.model import Payload
from support.chaos.validator import Verdict, judge

PAYLOAD = Payload(first=128, rows=2, width=16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def call(number: int = 1, kind: str = "small", **fields: object) -> Call:
    """A call that was answered as it should be, except for the fields given."""
    values: dict[str, object] = {
        "id": f"grpc-0-{number}",
        "kind": kind,
        "carrier": "grpc",
        "deployment": "echo",
        "first": PAYLOAD.first,
        "rows": PAYLOAD.rows,
        "width": PAYLOAD.width,
        "began": 100.0,
        "answers": 1,
        "digest": PAYLOAD.digest(),
        "versions": ["1"],
        "said": "1",
        **fields,
    }
    return Call(**values)  # type: ignore[arg-type]


def judged(path: Path, *entries: tuple[Call, str] | Strike, reason: str = "", **more: object) -> Verdict:
    with History(path) as history:
        for entry in entries:
            if isinstance(entry, Strike):
                history.struck(entry)
                continue
            made, code = entry
            history.begin(made)
            if code:
                history.end(made, code, reason, "words", ended=made.began + 1)
    return judge(path, **more)  # type: ignore[arg-type]


def test_right_answers_are_good(path: Path) -> None:
    verdict = judged(path, *((call(number), OK) for number in range(10)))
    assert verdict.good
    assert (verdict.answered, verdict.failures()) == (10, 0)


def test_a_call_that_never_ended_is_lost(path: Path) -> None:
    verdict = judged(path, (call(1), OK), (call(2), ""))
    assert (verdict.lost, verdict.good) == (1, False)
    assert verdict.examples[0].id == "grpc-0-2"


@pytest.mark.parametrize("changed", [{"answers": 2}, {"id": "grpc-0-1"}])
def test_a_second_answer_is_noticed(path: Path, changed: dict[str, object]) -> None:
    with History(path) as history:
        for made in (call(1), call(2, **changed)):
            history.end(history.begin(made), OK)
    assert judge(path).duplicated == 1


def test_an_answer_and_an_error_are_two_answers(path: Path) -> None:
    assert judged(path, (call(answers=1), "UNAVAILABLE")).duplicated == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": Payload(129, 2, 16).digest()},  # another request's rows
        {"digest": Payload(128, 1, 32).digest()},  # the same numbers in another shape
        {"versions": ["2"], "said": "2"},  # a version that is not deployed
        {"versions": ["2"]},  # rows of one version under the name of another
        {"versions": ["1", "2"]},  # rows of two versions
        {"version": "2"},  # another version than was asked for
        {"answers": 0},  # an answer with another request's id
    ],
)
def test_a_wrong_answer_is_noticed(path: Path, changed: dict[str, object]) -> None:
    verdict = judged(path, (call(**changed), OK))
    assert (verdict.wrong, verdict.good) == (1, False)


def test_a_version_is_right_where_it_is_deployed(path: Path) -> None:
    new = call(versions=["2"], said="2", version="2")
    assert judged(path, (new, OK), versions={"echo": {"1", "2"}}).good


def test_an_error_is_explained_by_a_fault_at_its_time_only(path: Path) -> None:
    def at(began: float) -> tuple[Call, str]:
        return call(int(began), began=began, answers=0), "UNAVAILABLE"

    strike = Strike("kill", ["UNAVAILABLE"], began=200.0, ended=210.0)
    verdict = judged(path, at(198), at(199.5), at(205), at(210.5), at(212), strike)
    assert verdict.failed["small", "UNAVAILABLE"] == 3
    assert verdict.unexplained["small", "UNAVAILABLE", "", "words"] == 2
    assert not judged(path, (call(began=205.0, answers=0), "INTERNAL"), strike).good


@pytest.mark.parametrize(
    ("kind", "code", "good"),
    [
        ("bad", "INVALID_ARGUMENT", True),
        ("bad", "INTERNAL", False),
        ("bad", OK, False),
        ("cancelled", "CANCELLED", True),
        ("small", "CANCELLED", False),
        ("hurried", "DEADLINE_EXCEEDED", True),
        ("small", "DEADLINE_EXCEEDED", False),
        ("flood", "RESOURCE_EXHAUSTED", True),
        ("large", "RESOURCE_EXHAUSTED", False),
    ],
)
def test_each_kind_of_call_may_be_told_what_it_asked_for(
    path: Path, kind: str, code: str, good: bool
) -> None:
    assert judged(path, (call(kind=kind, answers=int(code == OK)), code)).good is good


@pytest.mark.parametrize(("reason", "good"), [("POISON_REQUEST", True), ("MODEL_ERROR", False)])
def test_poison_is_told_that_it_is_poison(path: Path, reason: str, good: bool) -> None:
    assert judged(path, (call(kind="poison", answers=0), "INTERNAL"), reason=reason).good is good


def test_the_rate_is_back_when_it_is(path: Path) -> None:
    def ending(moments: Callable[[int], float], count: int, begin: int) -> list[tuple[Call, str]]:
        return [(call(begin + n, began=moments(n) - 1), OK) for n in range(count)]

    before = ending(lambda n: 100 + n / 100, 300, 0)  # 100 a second from 100 to 103
    after = ending(lambda n: 105 + n / 100, 300, 1000)  # and from 105 to 108
    verdict = judged(path, *before, *after)
    assert 2.4 <= verdict.back_after(103.0) <= 2.6
    slow = ending(lambda n: 105 + n / 50, 150, 1000)
    assert judged(path, *before, *slow).back_after(103.0) == float("inf")


def test_a_history_gives_back_what_was_taken_down(path: Path) -> None:
    judged(path, (call(detail="ü"), OK), Strike("kill", [], 1.0, 2.0))
    (found,) = calls(path, ["small"])
    assert (found.id, found.ended, found.digest) == ("grpc-0-1", 101.0, PAYLOAD.digest())
    assert not list(calls(path, ["large"]))
