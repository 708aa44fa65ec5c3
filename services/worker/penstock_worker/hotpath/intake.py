"""Where the reading thread puts what the computing thread takes."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable

from penstock_kit.queue.messages import Request
from penstock_worker.domain.batching import BatchQueue
from penstock_worker.domain.pacing import Pacer
from penstock_worker.hotpath.execution import Work

# So much before the model is expected to be free the next batch is read: earlier, it could take requests that
# an idle replica would have computed by then; later, the model waits. Reading and decoding 32 rows takes 1 to
# 2 ms, and calls of some milliseconds vary by as much on a machine that does other things: half a call then.
_LEAD_SECONDS = 0.002
_MOST_LEAD_SECONDS = 0.004
# The main thread must not sleep longer: a signal that the kernel gives to another thread does not wake it,
# and Python runs its handler only there.
_SLEEP_SECONDS = 0.25


@dataclasses.dataclass(slots=True)
class Waiting:
    """A request that was read and decoded. Times are those of `time.monotonic`."""

    work: Work
    key: Hashable
    """Its bucket, see `BatchQueue.add`."""
    since: float
    """When it was queued."""
    due: float
    """When its caller stops waiting."""


@dataclasses.dataclass(slots=True)
class Batch:
    """What is to be computed next."""

    works: list[Work]
    late: list[Work]
    """Not to be computed: their deadlines would pass meanwhile."""


class Intake:
    """At most one batch that waits beside the one that is computed.

    Args:
        queue: The batches; only this object touches it.
        read_limit: Requests to read at once at most.
        pacer: Says how large a batch may be, and when a free model should wait for more. Only this object
            touches it, and who holds its lock.
    """

    def __init__(self, queue: BatchQueue[Work], read_limit: int, pacer: Pacer) -> None:
        self._queue = queue
        self._suspects: deque[Request] = deque()
        self._read_limit = read_limit
        self._pacer = pacer
        self.lock = threading.Lock()
        """Held while the pacer is looked at or changed."""
        self._arrived = threading.Condition(self.lock)
        self._emptied = threading.Condition(self.lock)
        # So many rows wake the computing thread up; fewer are not what it waits for.
        self._wanted = 1
        self._closed = False
        # time.monotonic() when the next batch should be read, as the model will be free soon; 0 while it is.
        self._read_at = 0.0

    def room(self, timeout: float) -> int:
        """Wait until more should be read; return how many requests, 0 if `timeout` seconds pass first."""
        deadline = time.monotonic() + timeout
        with self.lock:
            while True:
                now = time.monotonic()
                room = min(self._read_limit, self._pacer.limit) - len(self._queue)
                if room > 0 and self._queue.rows < self._pacer.limit and not self._suspects:
                    pause = self._read_at - now
                    if pause <= 0:
                        return room
                else:
                    pause = deadline - now
                if now >= deadline:
                    return 0
                self._emptied.wait(min(pause, deadline - now))

    def put(self, arrived: Iterable[Waiting], suspects: Iterable[Request]) -> None:
        """Add what was read."""
        with self.lock:
            for one in arrived:
                rows = one.work.infer.rows
                self._queue.add(one.work, one.key, rows, one.since, one.due)
                self._pacer.returns.arrived(one.since, rows)
            self._suspects.extend(suspects)
            if self._suspects or self._queue.rows >= self._wanted:
                self._arrived.notify()

    def take(self, *, wait: bool) -> Batch | Request | None:
        """Take the next batch or suspect.

        Args:
            wait: Whether to wait for one. Without, None says that none should begin now.

        Returns:
            None, with `wait`: it is closed and empty.
        """
        with self.lock:
            self._read_at = 0.0
            self._emptied.notify()
            paused_since = 0.0
            while True:
                if self._suspects:
                    return self._suspects.popleft()
                now = time.monotonic()
                if self._closed:
                    return self._next(now, 0.0) if len(self._queue) else None
                left = self._queue.seconds_left(now)
                self._wanted = 1
                if left == 0.0:
                    paused_since = paused_since or now
                    left, self._wanted = self._pacer.pause(now, self._queue.rows, *self._queue.urgency())
                    if not left:
                        return self._next(now, now - paused_since)
                if not wait:
                    return None
                self._arrived.wait(_SLEEP_SECONDS if left is None else min(left, _SLEEP_SECONDS))

    def computing(self, rows: int) -> None:
        """Say that the model is busy with so many rows from now on."""
        with self.lock:
            seconds = self._pacer.curve.seconds(rows)
            lead = min(max(_LEAD_SECONDS, seconds / 2), _MOST_LEAD_SECONDS)
            self._read_at = time.monotonic() + seconds - lead
            self._emptied.notify()

    def computed(self, rows: int, seconds: float) -> None:
        """Say that a call of the model with so many rows has ended, and its answers go out."""
        with self.lock:
            self._pacer.computed(rows, seconds, time.monotonic())

    def close(self) -> None:
        """Say that nothing more comes."""
        with self.lock:
            self._closed = True
            self._arrived.notify()
            self._emptied.notify()

    def _next(self, now: float, paused: float) -> Batch:
        pacer = self._pacer
        if self._closed:  # nothing is waited for any more, the others' company included
            works, late = self._queue.take(math.inf, pacer.limit)
        else:
            works, late = self._queue.take(now, pacer.limit, pacer.curve.seconds, saturated=pacer.saturated)
        pacer.begun(sum([work.infer.rows for work in works]), self._queue.rows, paused)
        return Batch(works, late)
