"""What a gateway knows of each request that waits for its answer. No I/O here.

``Waiting`` is one request, ``Lane`` counts those of one queue, ``ReplyStream`` collects the parts of a
streamed answer, ``Deadlines`` ends requests in time.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from penstock_kit.errors import Aborted, DeadlineExceeded, Reason, ResourceExhausted, Unavailable
from penstock_kit.queue import keys
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.resp import bulk

# Parts of one answer that may wait for a slow caller before its stream is given up.
MAX_UNREAD_PARTS = 16_384

log = logging.getLogger(__name__)

Outcome = Reply | BaseException
# Called once, on the loop, when a request ends; must not block.
Done = Callable[[Outcome], None]


class Lane:
    """One queue, as its gateway sees it."""

    __slots__ = ("prefixes", "queue", "streams", "unanswered")

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.unanswered = 0
        self.streams = keys.streams(queue)
        # XADD <stream> * h <header> a 0 b <payload>, up to the length of the header.
        self.prefixes = [
            b"*9\r\n$4\r\nXADD\r\n" + bulk(stream) + b"$1\r\n*\r\n$1\r\nh\r\n" for stream in self.streams
        ]


class Waiting:
    """One unanswered request.

    ``entry_id`` is None until Redis has confirmed the write. ``gone`` is set when nobody waits any more;
    if the write is confirmed only then, the entry is taken off the queue (unless the answer has come).
    """

    __slots__ = (
        "answered",
        "bucket",
        "done",
        "entry_id",
        "gone",
        "header",
        "id",
        "lane",
        "parts",
        "payload",
        "priority",
    )

    def __init__(
        self,
        request_id: bytes,
        lane: Lane,
        priority: int,
        header: bytes,
        payload: bytes,
        bucket: dict[bytes, Any],
    ) -> None:
        self.id = request_id
        self.lane = lane
        self.priority = priority
        self.header = header
        self.payload = payload
        self.bucket = bucket
        self.entry_id: bytes | None = None
        self.done: Done | None = None
        self.parts: ReplyStream | None = None
        self.gone = False
        self.answered = False

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return len(self.header) + len(self.payload)

    @property
    def begun(self) -> bool:
        """Whether a part of a streamed answer has been passed on."""
        return self.parts is not None and self.parts.begun

    def moved(self, lane: Lane) -> "Waiting":
        """The same request, bound for another queue."""
        other = Waiting(self.id, lane, self.priority, self.header, self.payload, self.bucket)
        other.done = self.done
        other.parts = self.parts
        return other

    def command(self) -> bytes:
        """The XADD that puts it on its queue."""
        header = self.header
        payload = self.payload
        return b"%b$%d\r\n%b\r\n$1\r\na\r\n$1\r\n0\r\n$1\r\nb\r\n$%d\r\n%b\r\n" % (
            self.lane.prefixes[self.priority],
            len(header),
            header,
            len(payload),
            payload,
        )

    def end(self, outcome: Outcome) -> None:
        """Give the caller its answer or its error."""
        if self.parts is not None:
            self.parts.end(outcome)
        elif self.done is not None:
            try:
                self.done(outcome)
            except Exception:  # the answers that came in the same read are others' and must go on
                log.exception("an answer could not be handed on")


def settle(future: asyncio.Future[Reply], outcome: Outcome) -> None:
    """Give a future its outcome, unless it has one."""
    if future.done():
        return
    if isinstance(outcome, Reply):
        future.set_result(outcome)
    elif isinstance(outcome, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(outcome)
        future.exception()  # a caller that has left does not make it "never retrieved"


class ReplyStream:
    """The parts of one streamed answer, in order: an asynchronous iterator of ``Reply``.

    Parts of a second run of the request are never mixed with those of the first.
    """

    def __init__(self, abandon: Callable[[], object]) -> None:
        self._abandon = abandon
        self._parts: deque[Reply] = deque()
        self._waker: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._run = b""
        self._attempt = 0
        self._next = 0

    @property
    def begun(self) -> bool:
        """Whether a part has come."""
        return self._next > 0

    @property
    def run(self) -> bytes:
        """Entry id of the run that this stream follows; empty before it has begun."""
        return self._run

    def accept(self, reply: Reply) -> Outcome | None:
        """Take one reply; returns how the request ends, or None while it goes on."""
        header = reply.header
        if not header.run:  # of a run that never began to stream, or from whoever buried the request
            return reply if header.code or not self.begun else None
        if not self.begun:
            if header.sequence != 0:
                return None  # the tail of a run whose beginning was lost, or that an earlier life was given
            self._run, self._attempt = header.run, header.attempt
        elif header.run != self._run:
            if header.attempt > self._attempt:
                self._run = header.run
                return Unavailable(
                    "The replica died in the middle of this answer. Retry the call.",
                    reason=Reason.NOT_READY,
                )
            return None
        if header.sequence < self._next:
            return None  # pushed again after a reconnection
        if header.sequence > self._next:
            return Unavailable(
                "Redis lost a part of this answer. Retry the call.", reason=Reason.DEPENDENCY_UNAVAILABLE
            )
        if len(self._parts) >= MAX_UNREAD_PARTS:
            return ResourceExhausted(
                f"The caller left {MAX_UNREAD_PARTS} parts of this answer unread.", reason=Reason.OVERLOADED
            )
        self._next += 1
        if not header.more:
            return reply
        self._parts.append(reply)
        self._wake()
        return None

    def end(self, outcome: Outcome) -> None:
        """Give the last part, or the error that ends the stream."""
        if self._ended:
            return
        self._ended = True
        if isinstance(outcome, Reply):
            self._parts.append(outcome)
        else:
            self._error = outcome
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Reply:
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            if self._waker is not None:
                raise Aborted("Two tasks read one stream; only one may.", reason=Reason.WRONG_STATE)
            self._waker = asyncio.get_running_loop().create_future()
            try:
                await self._waker
            finally:
                self._waker = None
        return self._parts.popleft()

    async def aclose(self) -> None:
        """Leave the stream; the replica is told."""
        if not self._ended:
            self._abandon()

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)


class Deadlines:
    """Ends requests at their deadline, up to 17 ms late.

    Requests due in the same 2¹⁴ µs share one bucket and one timer of the loop: a timer for each request
    costs more than all else that is done for it here.
    """

    SHIFT = 14
    # Longer timers are set again on the way, because the wall clock may be moved meanwhile.
    LONGEST_SECONDS = 3600.0

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[list[Waiting]], None]) -> None:
        self._loop = loop
        self._expire = expire
        self._buckets: dict[int, dict[bytes, Waiting]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def bucket(self, deadline_unix_micros: int) -> dict[bytes, Waiting]:
        """Where to put a request with that deadline; take it out when it is answered."""
        slot = deadline_unix_micros >> self.SHIFT
        found = self._buckets.get(slot)
        if found is None:
            found = self._buckets[slot] = {}
            self._arm(slot)
        return found

    def stop(self) -> None:
        """Forget all timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._buckets.clear()

    def prune(self) -> None:
        """Let go of what is answered; called now and then.

        An empty bucket is worth keeping while requests with its deadline may still come, which is over
        soon: those who allow an hour come with another deadline each 17 ms.
        """
        for slot in [slot for slot, bucket in self._buckets.items() if not bucket]:
            self._timers.pop(slot).cancel()
            del self._buckets[slot]

    def __len__(self) -> int:
        return len(self._buckets)

    def _arm(self, slot: int) -> None:
        delay = ((slot + 1) << self.SHIFT) / 1e6 - time.time()
        self._timers[slot] = self._loop.call_later(
            min(max(delay, 0.0), self.LONGEST_SECONDS), self._due, slot
        )

    def _due(self, slot: int) -> None:
        if (slot + 1) << self.SHIFT > time.time_ns() // 1000 + 1000 and self._buckets[slot]:
            self._arm(slot)
            return
        del self._timers[slot]
        late = list(self._buckets.pop(slot).values())
        if late:
            self._expire(late)


def deadline_exceeded() -> DeadlineExceeded:
    """The error of a request that was not answered in time."""
    return DeadlineExceeded(
        "The deadline passed before the answer. Allow more time, or add replicas.",
        reason=Reason.DEADLINE_EXCEEDED,
    )
