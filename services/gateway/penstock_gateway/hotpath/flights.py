"""Equal requests that are computed once: a flight, and those aboard.

                    join                       land
    look ──▶ begin ──────▶ aboard, each with ──────▶ answered, each with its own id
               │ launch     its own deadline
               ▼
         one request in the queue

A flight belongs to nobody: whoever began it may leave, or run out of time, and the rest fly on. Its request
has the deadline that was the latest when it was sent; if that passes while somebody aboard has more time, it
is sent again. When the last one leaves, it is taken off the queue. An error of the model is everybody's, a
deadline only theirs whose it is. Without coalescing a flight has one passenger, and only its answer is kept.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Protocol

from penstock.queue.v1.envelope_pb2 import RequestHeader
from penstock_gateway.domain.admission import NOWHERE, Backlog
from penstock_gateway.domain.statistics import CacheCounters
from penstock_gateway.domain.traffic import NOBODY, Tally
from penstock_gateway.hotpath.canonical import Unusual, with_id, without_id
from penstock_kit.errors import Code, DeadlineExceeded, PenstockError
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.waiting import deadline_exceeded

if TYPE_CHECKING:
    from penstock_gateway.hotpath.cache import ResponseCache, Shelf

_DEADLINE_EXCEEDED = int(Code.DEADLINE_EXCEEDED)
# So many are answered before others have their turn: an answer takes some 20 µs to write.
_AT_ONCE = 64
# Ids of requests that are in no queue by themselves; those of the queue's ledger begin with random bytes.
_numbers = itertools.count(1)

Outcome = Reply | BaseException


class Leavable(Protocol):
    """What answers a ticket that is in no queue by itself."""

    def leave(self, ticket: Caller) -> None:
        """Answer a ticket with CancelledError at once, because its caller went away."""
        ...


class Caller(Protocol):
    """What the dispatcher's ticket is to this module."""

    header: RequestHeader
    flight: Leavable | None
    backlog: Backlog
    reckoned: float
    tally: Tally

    def end(self, outcome: Outcome) -> None:
        """Take the outcome, once."""
        ...


class Look:
    """What is known of one request before it is admitted.

    Attributes:
        reply: The kept answer; None if there is none.
        flight: An equal request that is being computed; None if there is none, or it shall not be joined.
        lookup_ns: What looking it up took, if nothing was found.
    """

    __slots__ = ("_cache", "_key", "_request_id", "_shelf", "_tally", "flight", "lookup_ns", "reply")

    def __init__(
        self, cache: ResponseCache, shelf: Shelf, key: bytes, request_id: bytes, tally: CacheCounters
    ) -> None:
        self._cache = cache
        self._shelf = shelf
        self._key = key
        self._request_id = request_id
        self._tally = tally
        self.reply: Reply | None = None
        self.flight: Flight | None = None
        self.lookup_ns = 0

    @property
    def computes(self) -> bool:
        """Whether the request would have to be computed, and so needs a place in the queue."""
        return self.reply is None and self.flight is None

    def begin(self, ticket: Caller, queue: str, payload: bytes, priority: int) -> None:
        """Answer a ticket: out of the cache, with a flight that is under way, or with one of its own.

        Raises:
            PenstockError: The queue does not take the request; the ticket is not answered then.
        """
        if self.reply is not None:
            ticket.header.id = _own_id()
            Landed(ticket, _addressed(self.reply, self._request_id) if self._request_id else self.reply)
        elif self.flight is not None:
            self.flight.join(ticket, self._request_id)
            self._tally.joined += 1
            self._tally.last_hit_ms = time.time_ns() // 1_000_000
        else:
            Flight(self._cache, self._shelf, self._key, queue, payload, priority, self._tally).launch(
                ticket, self._request_id
            )
            if self._shelf.policy.keep:
                self._tally.misses += 1
                self._tally.miss_ns += self.lookup_ns


class Landed:
    """A ticket that is answered in this turn of the loop, after its caller has got hold of it."""

    __slots__ = ("_handle", "_reply")

    def __init__(self, ticket: Caller, reply: Reply) -> None:
        self._reply = reply
        ticket.flight = self
        self._handle = asyncio.get_running_loop().call_soon(self._give, ticket)

    def _give(self, ticket: Caller) -> None:
        ticket.flight = None
        ticket.end(self._reply)

    def leave(self, ticket: Caller) -> None:
        """See `Leavable`."""
        self._handle.cancel()
        ticket.flight = None
        ticket.end(asyncio.CancelledError())


class _Seat:
    """One who waits for a flight."""

    __slots__ = ("deadline", "request_id", "timer")

    def __init__(self, request_id: bytes, deadline: int) -> None:
        self.request_id = request_id
        self.deadline = deadline
        self.timer: asyncio.TimerHandle | None = None


class Flight:
    """One computation, and those who wait for it.

    Args:
        cache: Of the process.
        shelf: Of the deployment.
        key: What is computed.
        queue: Where the request waits.
        payload: It goes to the replica as it is.
        priority: Which stream of the queue.
        tally: Of the version.
    """

    __slots__ = (
        "_aboard",
        "_backlog",
        "_bare",
        "_cache",
        "_counted",
        "_deadline",
        "_header",
        "_key",
        "_landed",
        "_payload",
        "_payload_id",
        "_priority",
        "_queue",
        "_shelf",
        "_tally",
    )

    def __init__(
        self,
        cache: ResponseCache,
        shelf: Shelf,
        key: bytes,
        queue: str,
        payload: bytes,
        priority: int,
        tally: CacheCounters,
    ) -> None:
        self._cache = cache
        self._shelf = shelf
        self._key = key
        self._queue = queue
        self._payload = payload
        self._priority = priority
        self._tally = tally
        self._aboard: dict[Caller, _Seat] = {}
        self._payload_id = b""
        self._bare = True  # the answer carries nobody's id
        self._deadline = 0
        self._landed = False

    def launch(self, ticket: Caller, request_id: bytes) -> None:
        """Send the request of the first one aboard.

        Raises:
            PenstockError: The queue does not take it.
        """
        self._payload_id = request_id
        header = ticket.header
        shared = self._shelf.policy.coalesce
        if shared:  # an id of its own: whoever cancels a ticket that is answered must not meet the others'
            header = RequestHeader()
            header.CopyFrom(ticket.header)
            ticket.header.id = _own_id()
        self._send(header)
        self._aboard[ticket] = _Seat(request_id, self._deadline)
        self._backlog = ticket.backlog
        self._counted = ticket.tally
        ticket.flight = self
        if shared:
            self._shelf.flights[self._key, self._priority] = self

    def join(self, ticket: Caller, request_id: bytes) -> None:
        """Take one more aboard.

        Raises:
            DeadlineExceeded: Its deadline has passed.
        """
        deadline = ticket.header.deadline_unix_micros
        if deadline <= time.time_ns() // 1000:
            raise deadline_exceeded()
        seat = _Seat(request_id, deadline)
        self._watch(ticket, seat)
        ticket.header.id = _own_id()
        ticket.flight = self
        self._aboard[ticket] = seat

    def leave(self, ticket: Caller) -> None:
        """See `Leavable`."""
        self._end(ticket, asyncio.CancelledError())

    def scatter(self) -> None:
        """Give everybody aboard a request of their own in the flight's queue, whose answers are not kept."""
        aboard, self._aboard = self._aboard, {}
        self._withdraw()
        self._cache.sender.cancel(self._header.id)
        for ticket, seat in aboard.items():
            self._leave_seat(ticket, seat)
            if ticket.backlog is not self._backlog:
                ticket.backlog = self._backlog
                ticket.backlog.join()
                ticket.tally = self._counted
                ticket.tally.arrived += 1
            payload = self._payload
            if seat.request_id != self._payload_id:
                payload = with_id(payload, seat.request_id)
            try:
                self._cache.sender.submit_call(
                    self._queue, ticket.header, payload, self._priority, ticket.end
                )
            except PenstockError as error:
                ticket.end(error)

    # The request in the queue

    def _send(self, header: RequestHeader) -> None:
        self._cache.sender.submit_call(self._queue, header, self._payload, self._priority, self._land)
        self._header = header
        self._deadline = header.deadline_unix_micros
        self._cache.flights.setdefault(self._queue, set()).add(self)

    def _withdraw(self) -> None:
        """Nobody may join any more."""
        flights = self._cache.flights[self._queue]
        flights.discard(self)
        if not flights:
            del self._cache.flights[self._queue]
        if self._shelf.flights.get((self._key, self._priority)) is self:
            del self._shelf.flights[self._key, self._priority]

    def _land(self, outcome: Outcome) -> None:
        if not self._aboard:
            return  # the last one left, and took the request off the queue
        late = isinstance(outcome, DeadlineExceeded)
        if isinstance(outcome, Reply):
            late = outcome.header.code == _DEADLINE_EXCEEDED
            if not outcome.header.code:
                outcome = self._keep(outcome)
        if late and any(seat.deadline > self._deadline for seat in self._aboard.values()):
            self._fly_on(outcome)
            return
        self._withdraw()
        self._landed = True
        self._deliver(outcome)

    def _keep(self, reply: Reply) -> Reply:
        """Keep an answer; return it without the id of whoever began the flight, if that is needed."""
        begun = time.perf_counter_ns()
        payload = reply.payload
        shelf = self._shelf
        keeps = shelf.policy.keep and len(payload) <= shelf.policy.max_bytes
        self._bare = not self._payload_id
        if self._payload_id and (
            keeps or any(seat.request_id != self._payload_id for seat in self._aboard.values())
        ):
            try:
                payload = without_id(payload)
            except Unusual:
                return reply  # of a newer release: it is not kept, and each id is put over that of the first
            self._bare = True
            reply = Reply(reply.header, payload)
        if keeps:
            shelf.keep(self._key, self._queue, reply.header.json_length, payload)
            self._tally.miss_ns += time.perf_counter_ns() - begun
        return reply

    def _fly_on(self, outcome: Outcome) -> None:
        """End the time of those whose deadline the request had; send it again for the others."""
        for ticket in [t for t, seat in self._aboard.items() if seat.deadline <= self._deadline]:
            seat = self._aboard.pop(ticket)
            self._leave_seat(ticket, seat)
            self._hand_over(ticket)
            ticket.end(outcome)
        header = RequestHeader()
        header.CopyFrom(self._header)
        for name in ("id", "enqueue_unix_micros"):
            header.ClearField(name)
        header.deadline_unix_micros = max(seat.deadline for seat in self._aboard.values())
        try:
            self._send(header)
        except PenstockError as error:
            self._withdraw()
            self._landed = True
            self._deliver(error)
            return
        for ticket, seat in self._aboard.items():
            if seat.timer is None:
                self._watch(ticket, seat)

    # Those aboard

    def _watch(self, ticket: Caller, seat: _Seat) -> None:
        """Set a timer for a deadline that the request in the queue outlives; its own ends all others."""
        if seat.deadline < self._deadline:
            left = max(seat.deadline / 1e6 - time.time(), 0.0)
            seat.timer = asyncio.get_running_loop().call_later(left, self._expire, ticket)

    def _expire(self, ticket: Caller) -> None:
        self._end(ticket, deadline_exceeded())

    def _end(self, ticket: Caller, outcome: Outcome) -> None:
        """Let one go; the last one takes the request off the queue."""
        seat = self._aboard.pop(ticket, None)
        if seat is None:
            return
        self._leave_seat(ticket, seat)
        if not self._aboard and not self._landed:
            self._withdraw()
            self._cache.sender.cancel(self._header.id)
        self._hand_over(ticket)
        ticket.end(outcome)

    def _hand_over(self, ticket: Caller) -> None:
        """Let another one aboard be counted for the request in the queue when the one who was goes."""
        if ticket.backlog is self._backlog and self._aboard and not self._landed:
            heir = next(iter(self._aboard))
            heir.backlog, heir.reckoned, heir.tally = ticket.backlog, ticket.reckoned, ticket.tally
            ticket.backlog, ticket.tally = NOWHERE, NOBODY

    def _deliver(self, outcome: Outcome) -> None:
        """Answer those aboard, some in each turn of the loop."""
        for _ in range(min(_AT_ONCE, len(self._aboard))):
            ticket = next(iter(self._aboard))
            seat = self._aboard.pop(ticket)
            self._leave_seat(ticket, seat)
            ticket.end(self._for(seat, outcome))
        if self._aboard:
            asyncio.get_running_loop().call_soon(self._deliver, outcome)

    def _for(self, seat: _Seat, outcome: Outcome) -> Outcome:
        """Return the outcome with the id of one aboard."""
        carried = b"" if self._bare else self._payload_id
        if isinstance(outcome, Reply) and not outcome.header.code and seat.request_id != carried:
            return _addressed(outcome, seat.request_id)
        return outcome

    @staticmethod
    def _leave_seat(ticket: Caller, seat: _Seat) -> None:
        ticket.flight = None
        if seat.timer is not None:
            seat.timer.cancel()


def _addressed(reply: Reply, request_id: bytes) -> Reply:
    return Reply(reply.header, with_id(reply.payload, request_id))


def _own_id() -> bytes:
    return b"follower" + next(_numbers).to_bytes(8, "little")
