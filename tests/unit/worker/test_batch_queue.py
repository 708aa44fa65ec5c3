"""Which requests make the next batch."""

from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from penstock_worker.domain.batching import BatchQueue

T = TypeVar("T")


def taken(queue: BatchQueue[T], now: float) -> list[T]:
    """The next batch of requests that have all the time in the world."""
    batch, late = queue.take(now)
    assert not late
    return batch


def test_requests_of_one_bucket_are_joined_up_to_the_limit() -> None:
    queue: BatchQueue[str] = BatchQueue(max_rows=4)
    for index, rows in enumerate((2, 1, 2, 1)):
        queue.add(f"r{index}", "shape", rows, since=index)
    assert taken(queue, 9) == ["r0", "r1"]
    assert taken(queue, 9) == ["r2", "r3"]
    assert taken(queue, 9) == []
    assert queue.rows == 0


def test_the_bucket_of_the_oldest_request_comes_first() -> None:
    queue: BatchQueue[str] = BatchQueue(max_rows=8)
    for item, key, since in (("a", 1, 0.0), ("b", 2, 1.0), ("c", 1, 2.0)):
        queue.add(item, key, 1, since)
    assert taken(queue, 9) == ["a", "c"]
    assert taken(queue, 9) == ["b"]


def test_requests_without_a_key_are_never_joined() -> None:
    queue: BatchQueue[str] = BatchQueue(max_rows=8, max_delay_seconds=10)
    queue.add("a", None, 1, since=0)
    queue.add("b", None, 1, since=0)
    assert queue.seconds_left(now=0) == 0
    assert taken(queue, 0) == ["a"]
    assert taken(queue, 0) == ["b"]


def test_a_request_over_the_limit_is_a_batch_by_itself() -> None:
    queue: BatchQueue[str] = BatchQueue(max_rows=4)
    queue.add("small", "s", 1, since=0)
    queue.add("large", "s", 9, since=0)
    queue.add("small too", "s", 1, since=0)
    assert [taken(queue, 0), taken(queue, 0), taken(queue, 0)] == [["small"], ["large"], ["small too"]]


def test_a_request_waits_for_others_no_longer_than_the_delay() -> None:
    queue: BatchQueue[str] = BatchQueue(max_rows=3, max_delay_seconds=2)
    assert queue.seconds_left(now=0) is None
    queue.add("a", "s", 1, since=10)
    assert taken(queue, 11) == []
    assert queue.seconds_left(now=11) == 1
    queue.add("b", "s", 1, since=11)
    assert queue.seconds_left(now=11.5) == 0.5
    assert taken(queue, 12) == ["a", "b"]


def test_a_full_batch_does_not_wait() -> None:
    queue: BatchQueue[str] = BatchQueue(max_rows=2, max_delay_seconds=100)
    queue.add("a", "s", 1, since=0)
    queue.add("b", "t", 1, since=0)
    queue.add("c", "t", 1, since=0)
    assert taken(queue, 0) == ["b", "c"]
    assert taken(queue, 0) == []


requests = st.lists(st.tuples(st.sampled_from([None, "s", "t"]), st.integers(1, 6)), max_size=30)


@given(requests, st.integers(1, 5))
def test_every_request_comes_out_once_in_batches_that_keep_the_rules(
    added: list[tuple[str | None, int]], max_rows: int
) -> None:
    queue: BatchQueue[int] = BatchQueue(max_rows)
    for index, (key, rows) in enumerate(added):
        queue.add(index, key, rows, since=index)
    seen: list[int] = []
    while batch := taken(queue, 100):
        assert len(batch) == 1 or sum(added[index][1] for index in batch) <= max_rows
        assert len({added[index][0] for index in batch}) == 1
        assert len(batch) == 1 or added[batch[0]][0] is not None
        assert batch == sorted(batch)
        seen += batch
    assert sorted(seen) == list(range(len(added)))
    assert (len(queue), queue.rows) == (0, 0)


def seconds(rows: float) -> float:
    """A call takes 5 seconds, and one for each row."""
    return 5 + rows


def with_deadlines(*dues: float, rows: int = 1) -> BatchQueue[int]:
    queue: BatchQueue[int] = BatchQueue(max_rows=8)
    for index, due in enumerate(dues):
        queue.add(index, "s", rows, since=index, due=due)
    return queue


def test_a_batch_does_not_grow_beyond_what_a_member_bears() -> None:
    queue = with_deadlines(100, 109, 200, 300, 400, 500)
    # 1.1 × (5 + 3) fits into 9 seconds, 1.1 × (5 + 4) does not.
    assert queue.take(100, 8, seconds) == ([1, 0, 2], [])
    assert queue.take(108, 8, seconds) == ([3, 4, 5], [])


def test_one_that_is_late_in_any_case_makes_no_batch_smaller() -> None:
    queue = with_deadlines(101, 500, 500, 500)
    assert queue.take(100, 8, seconds) == ([0, 1, 2, 3], [])


def test_who_cannot_wait_for_another_batch_comes_first() -> None:
    queue = with_deadlines(500, 500, 500, 500, 500, 500, 500, 500, 125, 120)
    assert queue.take(100, 8, seconds) == ([9, 8, 0, 1, 2, 3, 4, 5], [])


def test_a_limit_below_the_most_binds() -> None:
    queue = with_deadlines(500, 500, 500, 500)
    assert queue.take(0, 3, seconds) == ([0, 1, 2], [])


def test_where_the_model_is_the_bottleneck_batches_stay_full_and_the_late_are_handed_back() -> None:
    queue = with_deadlines(107, *[500] * 9)
    assert queue.take(100, 8, seconds, saturated=True) == ([1, 2, 3, 4, 5, 6, 7, 8], [0])
    assert (len(queue), queue.rows) == (1, 1)


def test_if_all_would_be_late_the_estimate_is_put_to_the_test() -> None:
    queue = with_deadlines(101, 102, 103)
    assert queue.take(100, 8, seconds, saturated=True) == ([0, 1, 2], [])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0, 60)), min_size=1, max_size=20),
    st.integers(1, 8),
    st.booleans(),
)
def test_no_member_is_late_whom_a_smaller_batch_would_have_served(
    added: list[tuple[int, float]], limit: int, saturated: bool
) -> None:
    queue: BatchQueue[int] = BatchQueue(max_rows=8)
    for index, (rows, due) in enumerate(added):
        queue.add(index, "s", rows, since=0, due=due)
    seen: list[int] = []
    now = 0.0
    while len(queue):
        batch, late = queue.take(now, limit, seconds, saturated=saturated)
        assert batch
        rows = sum(added[index][0] for index in batch)
        assert len(batch) == 1 or rows <= limit
        ends = now + seconds(rows)
        for index in batch:
            own, due = added[index]
            if not saturated and now + seconds(own) <= due:
                assert len(batch) == 1 or ends <= due
        for index in late:
            assert saturated
            assert now + seconds(max(limit, added[index][0])) > added[index][1]
        seen += batch + late
        now = ends
    assert sorted(seen) == list(range(len(added)))
    assert queue.rows == 0
