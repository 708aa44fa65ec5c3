"""Copies of requests for versions that are tried in the shadow: computed, compared, never returned.

    begin ── chosen? ──▶ the caller is answered ──▶ copy to the shadow's queue ──▶ its answer ──▶ compare
                              (as without it)         under an id of its own                    (a thread)

A copy is made only of what was computed and went well, and only after the caller has the answer: nothing of
this can delay or fail it. Copies go to the stream of low priority. Their number, and the bytes that they
hold, are bounded; what is over is not copied, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, PayloadFormat, RequestHeader
from penstock_gateway.domain.traffic import Tallies, Tally
from penstock_gateway.hotpath.replies import error_of
from penstock_kit.errors import Code, PenstockError
from penstock_kit.queue.keys import PRIORITY_LOW
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.ports import Sender
from penstock_kit.routing.table import Table, Target

log = logging.getLogger(__name__)

Outcome = Reply | BaseException
Done = Callable[[Outcome], None]

# Unanswered copies of one shadow at this gateway: four calls of the model for each replica, within these.
FEWEST_IN_FLIGHT, MOST_IN_FLIGHT, CALLS_EACH = 16, 256, 4
# Bytes of copies and of answers to compare, over all shadows.
MOST_BYTES = 64 << 20
# Answers larger than this are not compared. A parser of JSON lets no other thread run meanwhile: 1.6 ms.
MOST_ANSWER_BYTES = 16 << 20
MOST_JSON_BYTES = 64 << 10
# The comparing thread lets answers gather, works for a while, and rests four times as long as that took: a
# fifth of a core at most goes there.
GATHER_SECONDS, WORK_SECONDS = 0.002, 0.001
MOST_COMPARING, REST_FACTOR, MOST_REST_SECONDS = 1024, 4.0, 0.1
# A copy may take as long as its caller allowed, but no longer than this.
MOST_SECONDS = 60.0
# How long the comparing thread may run while the event loop wants to; five milliseconds by default.
SWITCH_SECONDS = 0.0005
_ENDING_SECONDS = 5.0
# The fraction of √2: successive multiples spread evenly over the unit, and no other choice follows them.
_STEP = 2**0.5 - 1
# Codes that say nothing of what the shadow would have answered.
_SILENT = frozenset({Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE, Code.CANCELLED})

BUSY, LARGE, NOT_READY, LOST = "busy", "too_large", "not_ready", "lost"


class Shadow:
    """A version that gets copies of a deployment's requests.

    Attributes:
        target: As the scheduler last told it.
        tally: Of the version.
        in_flight: Ids of copies that are not answered yet.
        answered: When it last answered a copy, on the clock of `time.monotonic`.
        dropped: Requests that were chosen and not compared, by reason.
    """

    __slots__ = ("_at", "answered", "dropped", "in_flight", "tally", "target")

    def __init__(self, target: Target, tally: Tally) -> None:
        self.target = target
        self.tally = tally
        self.in_flight: set[bytes] = set()
        self.answered = 0.0
        self.dropped: dict[str, int] = {}
        self._at = random.random()  # noqa: S311 - several gateways shall not choose in step

    def chooses(self) -> bool:
        """Say whether the next request is copied: so many percent of them, evenly spread."""
        self._at = (self._at + _STEP) % 1.0
        return self._at * 100.0 < self.target.mirror_percent

    @property
    def room(self) -> int:
        """Copies that may be unanswered at once."""
        wanted = CALLS_EACH * self.target.ready_replicas * max(self.target.description.max_batch_size, 1)
        return min(max(wanted, FEWEST_IN_FLIGHT), MOST_IN_FLIGHT)

    def drop(self, reason: str) -> None:
        """Count a request that is not compared."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Mirror:
    """The shadows of all deployments.

    Args:
        sender: The gateway's end of the queue.

    Attributes:
        shadows: By deployment; only those that have any.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self.shadows: dict[str, tuple[Shadow, ...]] = {}
        self._comparer = Comparer()
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of copies and of answers that are being compared."""
        return self._held + self._comparer.held

    def follow(self, table: Table, tallies: Tallies) -> None:
        """Take a new routing table; copies for what is no shadow any more are taken off their queues.

        To be called before requests in queues that vanished are sent elsewhere: copies are not.
        """
        before = {(s.target.queue, name): s for name, shadows in self.shadows.items() for s in shadows}
        self.shadows = {}
        for name, route in table.routes.items():
            found = []
            for target in route.targets:
                if target.mirror_percent <= 0:
                    continue
                shadow = before.pop((target.queue, name), None)
                if shadow is None:
                    shadow = Shadow(target, tallies.of((name, target.model, target.version)))
                shadow.target = target
                found.append(shadow)
            if found:
                self.shadows[name] = tuple(found)
        for shadow in before.values():
            for copy in list(shadow.in_flight):
                self._sender.cancel(copy)

    def watch(
        self,
        shadows: Sequence[Shadow],
        target: Target,
        name: str,
        payload: bytes,
        payload_format: PayloadFormat.ValueType,
        json_length: int,
        seconds: float,
        done: Done,
    ) -> Done:
        """Return what takes the outcome of a request: `done` itself if no shadow gets a copy of it.

        Args:
            shadows: Of the deployment.
            target: What answers the caller.
            name: The model name as the caller wrote it.
            payload: What the caller sent.
            payload_format: How it is written.
            json_length: Length of its JSON part, where binary tensors follow it.
            seconds: How long the caller allows.
            done: Takes the outcome for the caller.
        """
        chosen = [s for s in shadows if s.chooses() and s.target.queue != target.queue]
        if not chosen:
            return done

        def answered(outcome: Outcome) -> None:
            done(outcome)
            if isinstance(outcome, Reply):
                for shadow in chosen:
                    self._send(
                        *(shadow, name, payload, payload_format, json_length),
                        min(seconds, MOST_SECONDS),
                        outcome,
                    )

        return answered

    def stop(self) -> None:
        """End the thread that compares."""
        self._comparer.stop()

    def _send(
        self,
        shadow: Shadow,
        name: str,
        payload: bytes,
        payload_format: PayloadFormat.ValueType,
        json_length: int,
        seconds: float,
        answer: Reply,
    ) -> None:
        """Queue a copy, if there is room for it."""
        size = len(payload) + len(answer.payload)
        if not shadow.target.ready:
            shadow.drop(NOT_READY)
            return
        if not _comparable(payload_format, answer):
            shadow.drop(LARGE)
            return
        if len(shadow.in_flight) >= shadow.room or self._comparer.full or self.held + size > MOST_BYTES:
            shadow.drop(BUSY)
            return
        own = RequestHeader(
            deadline_unix_micros=int((time.time() + seconds) * 1e6),
            format=payload_format,
            json_length=json_length,
            model_name=name,
        )
        began = time.monotonic()

        def ended(outcome: Outcome) -> None:
            shadow.in_flight.discard(own.id)
            self._held -= size
            self._judge(shadow, payload_format, answer, outcome, began, seconds)

        try:
            self._sender.submit_call(shadow.target.queue, own, payload, PRIORITY_LOW, ended)
        except PenstockError:
            shadow.drop(BUSY)
            return
        self._held += size
        shadow.in_flight.add(own.id)

    def _judge(
        self,
        shadow: Shadow,
        payload_format: int,
        answer: Reply,
        outcome: Outcome,
        began: float,
        seconds: float,
    ) -> None:
        """Take what became of a copy."""
        now = time.monotonic()
        took = now - began
        if isinstance(outcome, Reply) and outcome.header.code:
            outcome = error_of(outcome)
        if isinstance(outcome, Reply):
            shadow.answered = now
            shadow.tally.succeed(took)
            if not _comparable(payload_format, outcome):
                shadow.drop(LARGE)
            elif not self._comparer.put(shadow, payload_format, answer, outcome):
                shadow.drop(BUSY)
            return
        failures = shadow.tally.failed
        # Late while others were answered is want of capacity; while nothing was, the shadow hangs.
        waited = seconds if shadow.answered > began else 0.0
        shadow.tally.err(outcome, took, seconds - took, waited)
        said = isinstance(outcome, PenstockError) and outcome.code not in _SILENT
        if shadow.tally.failed > failures or said:
            shadow.tally.disagreed += 1
        else:
            shadow.drop(LOST)


def _comparable(payload_format: int, answer: Reply) -> bool:
    size = len(answer.payload)
    if payload_format == PAYLOAD_FORMAT_OIP_GRPC:
        return size <= MOST_ANSWER_BYTES
    return size <= MOST_ANSWER_BYTES and (answer.header.json_length or size) <= MOST_JSON_BYTES


class Comparer:
    """A thread that compares answers; it is begun by the first of them, and tells the loop of each.

    Attributes:
        held: Bytes that wait to be compared.
    """

    def __init__(self) -> None:
        self.held = 0
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._verdicts: deque[tuple[Shadow, int, bool | None]] = deque()
        self._thread: threading.Thread | None = None
        self._ending = False

    @property
    def full(self) -> bool:
        """Whether as many answers wait as may."""
        return self._jobs.qsize() >= MOST_COMPARING

    def put(self, shadow: Shadow, payload_format: int, first: Reply, second: Reply) -> bool:
        """Have two answers compared and the result counted; False if too much waits already."""
        size = len(first.payload) + len(second.payload)
        if self.full or self.held + size > MOST_BYTES:
            return False
        if self._thread is None:
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(
                target=self._work, args=(loop,), name="compare answers", daemon=True
            )
            self._thread.start()
        self.held += size
        self._jobs.put((shadow, payload_format, first, second, size))
        return True

    def stop(self) -> None:
        """End the thread, after what it compares now."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ending = True
            self._jobs.put(None)
            thread.join(_ENDING_SECONDS)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        # Not before it is needed: a gateway without shadows has no numpy in it.
        from penstock_gateway.hotpath.answers import agree

        while (job := self._jobs.get()) is not None:
            # Others join: each time that this thread wakes, the event loop has to share Python's lock.
            time.sleep(GATHER_SECONDS)
            began = time.perf_counter()
            while job is not None and not self._ending:
                shadow, payload_format, first, second, size = job
                try:
                    verdict = agree(
                        payload_format,
                        (first.payload, first.header.json_length),
                        (second.payload, second.header.json_length),
                        shadow.target.mirror_tolerance,
                    )
                except Exception:
                    log.exception("two answers of %s cannot be compared", shadow.tally.deployment)
                    verdict = None
                self._verdicts.append((shadow, size, verdict))
                if time.perf_counter() - began > WORK_SECONDS or self._jobs.empty():
                    break
                job = self._jobs.get()
            if job is None or self._ending:
                return
            loop.call_soon_threadsafe(self._count)
            time.sleep(min((time.perf_counter() - began) * REST_FACTOR, MOST_REST_SECONDS))

    def _count(self) -> None:
        while self._verdicts:
            shadow, size, verdict = self._verdicts.popleft()
            self.held -= size
            if verdict is None:
                shadow.drop(LOST)
            elif verdict:
                shadow.tally.agreed += 1
            else:
                shadow.tally.disagreed += 1


_Job = tuple[Shadow, int, Reply, Reply, int]
