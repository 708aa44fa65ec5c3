"""Which waiting requests make the next batch.

Requests are joined only within a bucket: same inputs, same shapes beyond the batch (or of any length, where
the manifest allows padding). The next batch is taken from the bucket whose oldest request waits longest, so
that no shape starves another. A request without a key is never joined.

A batch does not grow so far that a member is late that a smaller one would have answered in time; members
that cannot wait for another batch come first. That favours few over many: where the model is the bottleneck
(`saturated`), batches stay full, and what would be late is handed back instead of being computed in vain.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

Seconds = Callable[[float], float]
"""How long a call with so many rows takes; 0 if that is unknown."""

# Of what a call is expected to take, so much more is allowed for.
_CAUTION = 1.1


@dataclasses.dataclass(slots=True)
class _Waiting(Generic[T]):
    item: T
    rows: int
    since: float
    due: float


class BatchQueue(Generic[T]):
    """Requests that wait to be computed.

    Args:
        max_rows: Rows in one batch at most. A request with more is a batch by itself.
        max_delay_seconds: How long a request may wait for others; 0 takes what is there.
    """

    def __init__(self, max_rows: int, max_delay_seconds: float = 0.0) -> None:
        self._max_rows = max(1, max_rows)
        self._max_delay = max_delay_seconds
        # In order of the oldest request: a bucket that is served moves to where its next request belongs.
        self._buckets: dict[Hashable, deque[_Waiting[T]]] = {}
        self._alone = 0
        self.rows = 0
        """Rows that wait."""

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def add(self, item: T, key: Hashable, rows: int, since: float, due: float = math.inf) -> None:
        """Put a request into its bucket.

        Args:
            item: The request.
            key: Equal for requests that can be joined; None for one that must run alone.
            rows: Its rows.
            since: When it was queued, on the clock that is given to `take`.
            due: When it must be answered.
        """
        if key is None:
            self._alone += 1
            key = (_ALONE, self._alone)
        self._buckets.setdefault(key, deque()).append(_Waiting(item, rows, since, due))
        self.rows += rows

    def take(
        self, now: float, limit: int = 0, seconds: Seconds | None = None, *, saturated: bool = False
    ) -> tuple[list[T], list[T]]:
        """Take the next batch; empty if there is none, or if it pays to wait (see `seconds_left`).

        Args:
            now: The time.
            limit: Rows in the batch at most, if fewer than `max_rows`.
            seconds: The model's curve; None for one so fast that no batch is too large.
            saturated: Whether more comes than the model can compute.

        Returns:
            The batch; and those which would be late, and are not to be computed.
        """
        key = self._next(now)
        if key is None:
            return [], []
        limit = min(limit, self._max_rows) if limit else self._max_rows
        late: list[_Waiting[T]] = []
        if seconds is not None:
            late = self._order(key, now, limit, seconds, saturated=saturated)
        bucket = self._buckets[key]
        batch: list[T] = []
        rows, latest = 0, math.inf
        while bucket:
            first = bucket[0]
            if rows:
                if rows + first.rows > limit:
                    break
                if seconds is not None and not saturated:
                    took = _CAUTION * seconds(rows + first.rows)
                    if now + took > min(latest, _bearable(first, now, seconds)):
                        break
            if seconds is not None:
                latest = min(latest, _bearable(first, now, seconds))
            rows += first.rows
            batch.append(bucket.popleft().item)
        if not bucket:
            del self._buckets[key]
        self.rows -= rows + sum(waiting.rows for waiting in late)
        return batch, [waiting.item for waiting in late]

    def urgency(self) -> tuple[float, float]:
        """Return since when the oldest request waits, and when the most urgent must be answered."""
        since = due = math.inf
        for bucket in self._buckets.values():
            since = min(since, bucket[0].since)
            due = min(due, min(waiting.due for waiting in bucket))
        return since, due

    def seconds_left(self, now: float) -> float | None:
        """Return how long the next batch may wait for more; 0 if it may not, None if nothing waits."""
        if not self._buckets:
            return None
        if self._next(now) is not None:
            return 0.0
        oldest = min(bucket[0].since for bucket in self._buckets.values())
        return max(0.0, oldest + self._max_delay - now)

    def _order(
        self, key: Hashable, now: float, limit: int, seconds: Seconds, *, saturated: bool
    ) -> list[_Waiting[T]]:
        """Put those first that cannot wait for the batch after the next; return those that would be late."""
        bucket = self._buckets[key]
        if not bucket:
            return []
        full = seconds(min(limit, sum(waiting.rows for waiting in bucket)))
        soonest = min(waiting.due for waiting in bucket)
        if saturated and now + full > soonest:
            late = [waiting for waiting in bucket if now + max(full, seconds(waiting.rows)) > waiting.due]
            # Where all would be late, the estimate may be what is wrong: computing them corrects it.
            if len(late) == len(bucket):
                return []
            dropped = {id(waiting) for waiting in late}
            self._buckets[key] = deque(waiting for waiting in bucket if id(waiting) not in dropped)
            return late
        urgent = now + 2 * _CAUTION * full
        if not saturated and len(bucket) > 1 and soonest < urgent:
            # Those that can be in time, but not with the batch after this one, soonest first; then all others
            # as they came.
            def rank(waiting: _Waiting[T]) -> float:
                return min(waiting.due, urgent) if now + seconds(waiting.rows) <= waiting.due else urgent

            self._buckets[key] = deque(sorted(bucket, key=rank))
        return []

    def _next(self, now: float) -> Hashable | None:
        ready: Hashable | None = None
        oldest = math.inf
        for key, bucket in self._buckets.items():
            since = bucket[0].since
            if since < oldest and (since + self._max_delay <= now or self._full(key, bucket)):
                ready, oldest = key, since
        return ready

    def _full(self, key: Hashable, bucket: deque[_Waiting[T]]) -> bool:
        if isinstance(key, tuple) and key and key[0] is _ALONE:
            return True
        return sum(waiting.rows for waiting in bucket) >= self._max_rows


def _bearable(waiting: _Waiting[T], now: float, seconds: Seconds) -> float:
    """When a member of a batch must be answered; whenever, if it is late even alone."""
    return waiting.due if now + seconds(waiting.rows) <= waiting.due else math.inf


_ALONE = object()
