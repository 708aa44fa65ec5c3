"""The gateway's ledger of unanswered requests: what a sender does that is no I/O.

Each accepted request is entered once, ends once (``_settle``), and is sent as often as needed between.
"""

import abc
import asyncio
import os
import time
from collections.abc import Container, Sequence
from functools import partial

from penstock.queue.v1.envelope_pb2 import RequestHeader
from penstock_kit.errors import Reason, ResourceExhausted, Unavailable
from penstock_kit.queue import keys
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.waiting import (
    Deadlines,
    Done,
    Lane,
    Outcome,
    ReplyStream,
    Waiting,
    deadline_exceeded,
    settle,
)

# Redis refuses strings over 512 MiB (proto-max-bulk-len) by closing the connection.
MAX_PAYLOAD_BYTES = 256 << 20
MAX_UNANSWERED = 65_536
MAX_UNANSWERED_BYTES = 512 << 20


class Ledger(abc.ABC):
    """Holds each request until it is answered. See ``ports.Sender`` for what it promises.

    A subclass sends (``_send``) and takes off the queue (``_take_off``), and calls ``_answer`` for each
    reply. All on one event loop.
    """

    def __init__(self, gateway_name: str, max_unanswered: int, max_unanswered_bytes: int) -> None:
        self._gateway = gateway_name
        self._max_unanswered = max_unanswered
        self._max_bytes = max_unanswered_bytes
        self._waiting: dict[bytes, Waiting] = {}
        self._lanes: dict[str, Lane] = {}
        self._bytes = 0
        self._nonce = os.urandom(8)
        self._counter = 0
        self._deadlines: Deadlines | None = None
        # For metrics: replies that nobody waited for, and requests sent more than once.
        self.unmatched_replies = 0
        self.sent_again = 0

    @abc.abstractmethod
    def _send(self, waiting: Waiting) -> None:
        """Put a request on its queue now; if that is impossible now, as soon as it is possible."""

    @abc.abstractmethod
    def _take_off(self, gone: Sequence[Waiting]) -> None:
        """Remove entries, delivered or not; a replica that streams into one notices it."""

    def _open(self) -> None:
        """From now on, accept requests."""
        # Kept: asking for the running loop is a system call (getpid) on Python 3.11, for every request.
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, self._expire)

    def _shut(self) -> None:
        """Accept no more; answer what is unanswered with Unavailable."""
        for waiting in list(self._waiting.values()):
            self._settle(
                waiting,
                Unavailable(
                    "The gateway is shutting down. Retry: another one answers.", reason=Reason.SHUTTING_DOWN
                ),
            )
        if self._deadlines is not None:
            self._deadlines.stop()
            self._deadlines = None

    def submit(
        self, queue: str, header: RequestHeader, payload: bytes, priority: int = keys.PRIORITY_NORMAL
    ) -> asyncio.Future[Reply]:
        """Send one request that has one reply."""
        waiting = self._admit(queue, header, payload, priority)
        future: asyncio.Future[Reply] = self._loop.create_future()
        waiting.done = partial(settle, future)
        self._send(waiting)
        return future

    def submit_call(
        self,
        queue: str,
        header: RequestHeader,
        payload: bytes,
        priority: int,
        done: Done,
    ) -> None:
        """Send one request that has one reply, which `done` gets: a future costs more than all else here."""
        waiting = self._admit(queue, header, payload, priority)
        waiting.done = done
        self._send(waiting)

    def submit_stream(
        self, queue: str, header: RequestHeader, payload: bytes, priority: int = keys.PRIORITY_NORMAL
    ) -> ReplyStream:
        """Send one request that has many replies."""
        waiting = self._admit(queue, header, payload, priority)
        waiting.parts = ReplyStream(partial(self.cancel, waiting.id))
        self._send(waiting)
        return waiting.parts

    def cancel(self, request_id: bytes) -> bool:
        """Forget a request and take it off the queue; False if it was answered already."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return False
        self._settle(waiting, asyncio.CancelledError())
        self._take_off([waiting])
        return True

    def reroute(self, queue: str, new_queue: str, ids: Container[bytes] | None = None) -> int:
        """Send what is unanswered in ``queue`` to ``new_queue`` instead."""
        if queue == new_queue:
            return 0
        lane = self._lane(new_queue)
        movable = [w for w in self._of(queue, ids) if not w.begun]
        for waiting in movable:
            other = waiting.moved(lane)
            self._waiting[other.id] = other.bucket[other.id] = other
            waiting.lane.unanswered -= 1
            lane.unanswered += 1
            waiting.gone = True
            self._send(other)
        self._take_off(movable)
        return len(movable)

    def fail(self, queue: str, error: Exception, ids: Container[bytes] | None = None) -> int:
        """Answer what is unanswered in a queue with an error."""
        ended = self._of(queue, ids)
        for waiting in ended:
            self._settle(waiting, error)
        self._take_off(ended)
        return len(ended)

    def unanswered(self, queue: str | None = None) -> int:
        """How many requests wait in a queue, or in all."""
        if queue is None:
            return len(self._waiting)
        lane = self._lanes.get(queue)
        return 0 if lane is None else lane.unanswered

    def _admit(self, queue: str, header: RequestHeader, payload: bytes, priority: int) -> Waiting:
        deadlines = self._deadlines
        if deadlines is None:
            raise Unavailable("The gateway is not running. Retry.", reason=Reason.SHUTTING_DOWN)
        size = len(payload)
        if size > MAX_PAYLOAD_BYTES:
            raise ResourceExhausted(
                f"A request of {size} bytes is over the limit of {MAX_PAYLOAD_BYTES}. Send less at once.",
                reason=Reason.PAYLOAD_TOO_LARGE,
            )
        if len(self._waiting) >= self._max_unanswered or self._bytes + size > self._max_bytes:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests with {self._bytes} bytes wait for an answer already. Retry.",
                reason=Reason.OVERLOADED,
                retry_after_seconds=1.0,
            )
        if priority not in keys.PRIORITIES:
            raise ValueError(f"Priority {priority} does not exist; use 0 (high), 1 (normal) or 2 (low).")
        now = time.time_ns() // 1000
        if header.deadline_unix_micros <= now:
            raise deadline_exceeded()
        request_id = header.id
        if not request_id:
            self._counter += 1
            request_id = header.id = self._nonce + self._counter.to_bytes(8, "little")
        elif request_id in self._waiting:
            raise ValueError("A request with this id is unanswered already.")
        header.gateway = self._gateway
        if not header.enqueue_unix_micros:
            header.enqueue_unix_micros = now
        lane = self._lanes.get(queue) or self._lane(queue)
        bucket = deadlines.bucket(header.deadline_unix_micros)
        waiting = Waiting(request_id, lane, priority, header.SerializeToString(), payload, bucket)
        self._waiting[request_id] = bucket[request_id] = waiting
        lane.unanswered += 1
        self._bytes += waiting.size
        return waiting

    def _of(self, queue: str, ids: Container[bytes] | None) -> list[Waiting]:
        return [
            waiting
            for waiting in self._waiting.values()
            if waiting.lane.queue == queue and (ids is None or waiting.id in ids)
        ]

    def _lane(self, queue: str) -> Lane:
        return self._lanes.setdefault(queue, Lane(queue))

    def _settle(self, waiting: Waiting, outcome: Outcome) -> None:
        """End one request, whatever the outcome. Every ending passes here, once."""
        del self._waiting[waiting.id]
        waiting.bucket.pop(waiting.id, None)
        waiting.lane.unanswered -= 1
        self._bytes -= waiting.size
        waiting.gone = True
        waiting.end(outcome)

    def _expire(self, late: list[Waiting]) -> None:
        for waiting in late:
            self._settle(waiting, deadline_exceeded())
        self._take_off(late)

    def _answer(self, reply: Reply) -> None:
        waiting = self._waiting.get(reply.header.id)
        if waiting is None:
            self.unmatched_replies += 1
            return
        outcome: Outcome = reply
        if waiting.parts is not None:
            verdict = waiting.parts.accept(reply)
            if waiting.parts.run:  # a reclaim moves entries: this is where it runs
                waiting.entry_id = waiting.parts.run
            if verdict is None:
                return
            if not isinstance(verdict, Reply):  # the stream is broken, and nobody waits for the rest of it
                self._settle(waiting, verdict)
                self._take_off([waiting])
                return
            outcome = verdict
        elif reply.header.more:
            return  # the caller wants one reply: the last
        waiting.answered = True
        self._settle(waiting, outcome)

    def _tidy(self) -> None:
        """Let go of what no request needs any more; called each second."""
        if self._deadlines is not None:
            self._deadlines.prune()
        for queue in [queue for queue, lane in self._lanes.items() if not lane.unanswered]:
            del self._lanes[queue]

    def _send_again(self, waiting: Waiting) -> None:
        self.sent_again += 1
        self._send(waiting)
