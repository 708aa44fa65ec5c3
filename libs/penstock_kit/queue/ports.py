"""What the two ends of the queue promise, whoever implements them.

``RequestSender``/``QueueReader`` (Redis) and ``MemorySender``/``MemoryReader`` (one process, for tests)
keep the same contract; the contract tests run on both.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader
from penstock_kit.queue.messages import Buffer, Reply, Request

Done = tuple[Request, ReplyHeader | None, Buffer]
"""A request, the header of its answer (None if it went well and there is nothing to add), and its payload."""

AWAY_SECONDS = 3.0
"""How long a process that is to end waits for a Redis that is away: most restarts of Redis are shorter."""


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What became of the requests that a dead consumer held.

    Attributes:
        requeued: given back to the queue, to be run alone.
        poisoned: answered POISON_REQUEST and kept in the dead letters.
    """

    requeued: int = 0
    poisoned: int = 0


class Sender(Protocol):
    """The gateway's end: sends requests, and holds each until it is answered. All on one event loop.

    Every accepted request is answered exactly once: by its reply, or by an error of the
    ``penstock_kit.errors`` tree.
    """

    @property
    def connected(self) -> bool:
        """Whether requests reach the queue now; while not, they wait for that or for their deadline."""
        ...

    async def start(self) -> None:
        """Connect. Returns after the first try, successful or not; it goes on trying by itself."""
        ...

    async def stop(self) -> None:
        """Answer what is unanswered with Unavailable (SHUTTING_DOWN), and disconnect."""
        ...

    def submit(
        self, queue: str, header: RequestHeader, payload: bytes, priority: int = 1
    ) -> asyncio.Future[Reply]:
        """Send one request that has one reply.

        The caller fills ``deadline_unix_micros``, ``format``, ``model_name`` and what else it knows; this
        sets ``gateway``, and, unless the caller did, ``id`` and ``enqueue_unix_micros`` in the given header,
        which must not be changed afterwards. A reply with an error code is a result of the future too:
        look at ``reply.header.code``.

        The future fails with DeadlineExceeded after the deadline, ResourceExhausted if Redis is out of
        memory, Unavailable after ``stop``, or what was given to ``fail``. A caller that stops waiting
        calls ``cancel(header.id)``.

        Raises:
            ResourceExhausted: as many requests, or bytes, as allowed are unanswered already.
            DeadlineExceeded: the deadline has passed already.
            Unavailable: not started, or stopped.
        """
        ...

    def submit_call(
        self,
        queue: str,
        header: RequestHeader,
        payload: bytes,
        priority: int,
        done: Callable[[Reply | BaseException], None],
    ) -> None:
        """Send like ``submit``, but hand the outcome to ``done``: the cheapest way to wait.

        ``done`` is called once, on the loop, with the reply or with what the future would have failed with
        (CancelledError after ``cancel``). It must not block, nor raise.
        """
        ...

    def submit_stream(
        self, queue: str, header: RequestHeader, payload: bytes, priority: int = 1
    ) -> AsyncIterator[Reply]:
        """Send one request that has many replies: those with ``header.more``, then the last one.

        Sent when this returns, and refused like ``submit``. The parts come in order without gap or
        repetition; if a replica dies after the first part, iteration fails with Unavailable, because a
        second run could go on differently. Leaving the iteration early: ``cancel(header.id)``, or
        ``aclose()`` of the iterator.
        """
        ...

    def cancel(self, request_id: bytes) -> bool:
        """Forget a request: take it off the queue and cancel its future. False if it was answered."""
        ...

    def reroute(self, queue: str, new_queue: str, ids: Container[bytes] | None = None) -> int:
        """Send what is unanswered in a queue to another one instead; returns how many that were.

        With ``ids``, only those requests. A stream that has begun is not moved.
        """
        ...

    def fail(self, queue: str, error: Exception, ids: Container[bytes] | None = None) -> int:
        """Answer what is unanswered in a queue with an error; returns how many that were.

        With ``ids``, only those requests.
        """
        ...

    def unanswered(self, queue: str | None = None) -> int:
        """How many requests of this gateway process wait in a queue, or in all of them."""
        ...


class Reader(Protocol):
    """The replica's end. Synchronous; ``read`` and ``exchange`` belong to one thread, all else to any thread.

    A consumer is one life of one replica process: ``<replica id>.<incarnation>``. It must call
    ``heartbeat`` each second from its own thread, or others take its requests after three.
    """

    def read(self, max_entries: int, block_ms: int) -> list[Request]:
        """Take up to ``max_entries`` requests, higher priorities first; wait if there is none.

        Lower priorities that wait get a part of each read all the same, see ``shares``.

        ``block_ms`` 0 does not wait. Returns ``[]`` when nothing came, also while Redis is away (it
        then waits out ``block_ms`` and reconnects by itself): never raises for that.
        Expired requests come too (``request.expired()``): answer them without computing.
        """
        ...

    def finish(self, done: Sequence[Done]) -> None:
        """Answer requests and take them off the queue, in one step.

        ``ReplyHeader.id`` is filled in. While Redis is away this waits for it, at most until the last of
        the requests is past its deadline, or as ``hurry`` says.

        Raises:
            Unavailable: nobody waits for any of these any more, or not for this replica. There is nothing
                left to do for them here.
        """
        ...

    def exchange(self, done: Sequence[Done], max_entries: int, block_ms: int) -> list[Request]:
        """``finish``, then ``read``, for less than both cost. Raises like ``finish``, before it reads."""
        ...

    def push_partial(self, request: Request, header: ReplyHeader, payload: Buffer) -> bool:
        """Send one part of a streamed answer; ``finish`` sends the last one.

        Fills in ``id``, ``more``, ``run``, ``attempt`` and ``sequence``. Returns False if the caller went
        away or the request was given to another replica: stop computing and call ``finish`` all the same.

        Raises:
            Unavailable: Redis was away for longer than the deadline of the request, or than ``hurry`` says.
        """
        ...

    def abandoned(self, requests: Sequence[Request]) -> list[Request]:
        """Say which of the requests that were read nobody waits for here any more.

        Their callers went away or stopped waiting, or they were given to another replica. They are forgotten:
        do not ``finish`` them. Nothing while Redis is away; never raises for that.
        """
        ...

    def mark_running(self, request: Request | None) -> None:
        """Say which suspect is computed now, before computing it; None after it.

        Raises:
            Unavailable: Redis is away; do not compute the suspect yet.
        """
        ...

    def heartbeat(self) -> bool:
        """Renew the lease. False if Redis is away; never raises for that."""
        ...

    def publish_statistics(self, statistics: bytes) -> bool:
        """Publish a serialized ReplicaStatistics. False if Redis is away; never raises for that."""
        ...

    def reclaim_lost(self) -> Reclaimed:
        """Take back what consumers without a lease hold. Nothing happens while Redis is away."""
        ...

    def depth(self) -> int:
        """How many requests the queue holds, those being computed included.

        Raises:
            Unavailable: Redis is away.
        """
        ...

    def hurry(self) -> None:
        """Say that this process is to end: answers wait ``AWAY_SECONDS`` at most for a Redis that is away.

        What cannot be answered by then is given to another replica, or sent again by its gateway. May be
        called from a signal handler.
        """
        ...

    def leave(self) -> None:
        """Give back what was read but not finished, and sign off. The reader is closed afterwards."""
        ...
