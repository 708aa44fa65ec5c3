"""Which waiting requests make the next batch.

Requests are joined only within a bucket: same inputs, same shapes beyond the batch (or of any length, where
the manifest allows padding). The next batch is taken from the bucket whose oldest request waits longest, so
that no shape starves another. A request without a key is never joined.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class _Waiting(Generic[T]):
    item: T
    rows: int
    since: float


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

    def add(self, item: T, key: Hashable, rows: int, since: float) -> None:
        """Put a request into its bucket.

        Args:
            item: The request.
            key: Equal for requests that can be joined; None for one that must run alone.
            rows: Its rows.
            since: When it was queued, on the clock that is given to `take`.
        """
        if key is None:
            self._alone += 1
            key = (_ALONE, self._alone)
        self._buckets.setdefault(key, deque()).append(_Waiting(item, rows, since))
        self.rows += rows

    def take(self, now: float) -> list[T]:
        """Take the next batch; empty if there is none, or if it pays to wait (see `seconds_left`)."""
        key = self._next(now)
        if key is None:
            return []
        bucket = self._buckets[key]
        batch = [bucket.popleft()]
        rows = batch[0].rows
        while bucket and rows + bucket[0].rows <= self._max_rows:
            rows += bucket[0].rows
            batch.append(bucket.popleft())
        if not bucket:
            del self._buckets[key]
        self.rows -= rows
        return [waiting.item for waiting in batch]

    def seconds_left(self, now: float) -> float | None:
        """Return how long the next batch may wait for more; 0 if it may not, None if nothing waits."""
        if not self._buckets:
            return None
        if self._next(now) is not None:
            return 0.0
        oldest = min(bucket[0].since for bucket in self._buckets.values())
        return max(0.0, oldest + self._max_delay - now)

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


_ALONE = object()
