"""When a call is tried again: bounded, spread out, within the caller's time, and only if it may help."""

from __future__ import annotations

import time

import pytest

from penstock.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from penstock.transport import Attempts


def ago(seconds: float) -> float:
    return time.monotonic() - seconds


def test_a_call_that_waited_long_before_its_gateway_died_is_tried_again() -> None:
    attempts = Attempts(timeout=30.0, retry_seconds=10.0, _start=ago(15.0))
    assert 0 < attempts.pause_after(Unavailable("Socket closed")) < 1
    assert attempts.count == 2


def test_nobody_tries_for_longer_than_the_retry_time_after_the_first_failure() -> None:
    attempts = Attempts(timeout=30.0, retry_seconds=10.0, _start=ago(15.0), _failing_since=ago(10.0))
    with pytest.raises(Unavailable):
        attempts.pause_after(Unavailable("Socket closed"))


def test_nobody_waits_beyond_the_callers_deadline() -> None:
    attempts = Attempts(timeout=15.0, retry_seconds=10.0, _start=ago(14.999))
    with pytest.raises(Unavailable):
        attempts.pause_after(Unavailable("Socket closed"))


def test_pauses_grow_and_differ_from_caller_to_caller() -> None:
    def pauses() -> list[float]:
        attempts = Attempts(timeout=1e6, retry_seconds=1e6)
        return [attempts.pause_after(Unavailable("Socket closed")) for _ in range(8)]

    first, second = pauses(), pauses()
    assert first != second
    assert first[0] < 0.1 < first[4]
    assert max(first) <= 1.3


@pytest.mark.parametrize("error", [Internal("broken"), ResourceExhausted("full", retry_after_seconds=1.0)])
def test_what_a_retry_does_not_help_is_told_at_once(error: Exception) -> None:
    with pytest.raises(type(error)):
        Attempts(timeout=30.0, retry_seconds=10.0).pause_after(error)  # type: ignore[arg-type]


def test_a_stream_that_goes_on_after_a_break_forgets_it() -> None:
    attempts = Attempts(timeout=30.0, retry_seconds=10.0, _start=ago(15.0), _failing_since=ago(9.99))
    attempts.answered()
    assert attempts.pause_after(Unavailable("Socket closed")) < 0.1
    attempts.answered()
    attempts.timeout = 1.0
    with pytest.raises(DeadlineExceeded):
        attempts.left()
