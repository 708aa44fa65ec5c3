"""What the end of a rank means for its task."""

import signal

import pytest

from penstock_kit.errors import InvalidArgument, NotFound, Unavailable
from penstock_worker.adapters.jobs.rank import end_of
from penstock_worker.domain.task import Allowance, DesiredTask, End, EndKind, KilledRank, worst
from penstock_worker.usecases.job_context import JobFailure

GIB = 1024**3
FAILED = EndKind.FAILED


@pytest.mark.parametrize(
    ("error", "kind", "cause", "permanent"),
    [
        (JobFailure("bad", "INVALID_DATA"), FAILED, "INVALID_DATA", True),
        (JobFailure("x", "DIVERGED", permanent=False), FAILED, "DIVERGED", False),
        (OSError(28, "No space left on device"), FAILED, "OUT_OF_DISK", False),
        (OSError(2, "No such file"), FAILED, "ERROR", False),
        (OSError(9, "Bad file descriptor", 7), FAILED, "ERROR", False),
        (OSError(28, "No space left on device", b"/tmp/bytes"), FAILED, "OUT_OF_DISK", False),
        (MemoryError(), FAILED, "OUT_OF_MEMORY", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), FAILED, "OUT_OF_MEMORY", True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), FAILED, "OUT_OF_MEMORY", True),
        (RuntimeError("[pair.cc] Connection closed by peer [::1]"), EndKind.PEERS_LOST, "", False),
        (RuntimeError("shape mismatch"), FAILED, "ERROR", False),
        (Unavailable("The registry is away."), FAILED, "UNAVAILABLE", False),
        (InvalidArgument("The manifest has no entrypoint."), FAILED, "INVALID_REQUEST", True),
        (NotFound("no such dataset"), FAILED, "RESOURCE_NOT_FOUND", False),
    ],
)
def test_an_exception_out_of_the_work_has_a_kind_and_a_cause(
    error: BaseException, kind: EndKind, cause: str, permanent: bool
) -> None:
    end = end_of(error, GIB)
    assert (end.kind, end.cause, end.permanent) == (kind, cause, permanent)


def test_what_an_exception_was_raised_from_counts_too() -> None:
    error = ValueError("cannot save")
    error.__cause__ = OSError(28, "No space left on device", "/data/x")
    assert end_of(error, GIB).cause == "OUT_OF_DISK"


def test_the_end_that_says_most_stands_for_the_group() -> None:
    lost, bug = End(EndKind.PEERS_LOST), End(FAILED, "a bug", "ERROR")
    data = End(FAILED, "NaN", "INVALID_DATA", permanent=True)
    assert worst([End(EndKind.SUCCEEDED), lost, bug]) == bug
    assert worst([lost, bug, data]) == data
    assert worst([End(EndKind.SUCCEEDED)]) == End(EndKind.SUCCEEDED)
    assert worst([]) is None
    assert End.from_fields(data.to_fields()) == data


@pytest.mark.parametrize(("used", "permanent"), [(2 * GIB, True), (GIB // 2, False)])
def test_a_rank_killed_for_lack_of_memory_would_be_again_only_if_it_took_too_much(
    used: int, permanent: bool
) -> None:
    end = KilledRank(1, signal.SIGKILL, used, GIB, short=True).out_of_memory()
    assert end is not None
    assert (end.cause, end.permanent) == ("OUT_OF_MEMORY", permanent)
    assert "1074 MB" in end.message


def test_a_rank_that_somebody_killed_says_nothing_of_memory() -> None:
    assert KilledRank(0, signal.SIGKILL, 2 * GIB, GIB, short=False).out_of_memory() is None


def test_an_allowance_fills_up_again_with_time() -> None:
    allowance = Allowance(2, 1.0)
    assert [allowance.take(1, 10.0) for _ in range(3)] == [True, True, False]
    assert allowance.take(1, 11.0)
    assert not allowance.take(1, 11.5)
    assert [allowance.take(1, 99.0) for _ in range(3)] == [True, True, False]


def test_threads_of_a_rank_are_the_whole_cores_of_its_part() -> None:
    def task(cpu_millis: int, ranks: int) -> DesiredTask:
        return DesiredTask("jobs/j/tasks/0", "j", 0, 1, 0, 1, 1, ranks, "train", b"", cpu_millis, GIB, ())

    assert [task(500, 1).threads, task(4000, 2).threads, task(7500, 2).threads] == [1, 2, 3]
    assert [task(1000, 1).distributed, task(1000, 2).distributed] == [False, True]
