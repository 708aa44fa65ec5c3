"""The loop of a replica whose model works on many requests at once, as an ensemble does.

main thread    reads and decodes, and begins what it read; as many requests at a time as the model takes
the model's    calls back with each outcome
answering      checks, encodes and sends what has ended, as much as there is at a time
watching       looks for requests that nobody waits for any more, and gives them up
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from penstock_kit.errors import Internal, PenstockError, Unavailable
from penstock_kit.oip import Signature
from penstock_kit.queue.keys import PRIORITIES, stream
from penstock_kit.queue.messages import Request
from penstock_kit.queue.ports import AWAY_SECONDS, Reader
from penstock_worker.domain.runtime import Batch, Call, ConcurrentServable
from penstock_worker.hotpath import execution
from penstock_worker.hotpath.answering import Answering
from penstock_worker.hotpath.execution import Outcome, Work, check_output, expired

log = logging.getLogger(__name__)

# How long reading waits for a request before it looks whether it should end.
_BLOCK_MS = 250
_ENDING_BLOCK_MS = 100
# While ending: how long the queue must be empty before it counts as finished.
_IDLE_SECONDS = 0.5
_READ_LIMIT = 64
_RETRY_SECONDS = 0.1
# Answers that are sent together at most.
_ANSWERS_AT_ONCE = 128

# Requests older than this are looked after, as often: most end before.
_WATCH_SECONDS = 0.25


@dataclasses.dataclass(slots=True)
class _Begun:
    """One request that the model works on."""

    work: Work
    begun_ns: int
    call: Call | None = None
    result: Batch | PenstockError | None = None
    abandoned: bool = False


class ConcurrentServing:
    """Serves one queue until told to stop.

    Args:
        reader: The replica's end of the queue.
        servable: The model.
        signature: What it takes and gives.
        answering: Decodes requests and sends answers.
        queue_name: Name of the queue.
        drain_seconds: How long it may go on after `stop`.
    """

    def __init__(
        self,
        reader: Reader,
        servable: ConcurrentServable,
        signature: Signature,
        answering: Answering,
        *,
        queue_name: str,
        drain_seconds: float,
    ) -> None:
        self._reader = reader
        self._servable = servable
        self._outputs = {spec.name: spec for spec in signature.outputs}
        self._batched = signature.batched
        self._answering = answering
        self._priorities = {stream(queue_name, priority): priority for priority in PRIORITIES}
        self._drain_seconds = drain_seconds
        self._handed_over = False
        self._stopped_at = float("inf")
        self._last_request = 0.0
        self._failure: BaseException | None = None
        self._ended_calls: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        # In the order of their age.
        self._in_flight: dict[int, _Begun] = {}
        self._finished = threading.Event()

    def stop(self, *, handed_over: bool = False) -> None:
        """End after what is queued is answered. May be called from a signal handler.

        Args:
            handed_over: Others answer what is queued: end after what was begun.
        """
        self._handed_over = self._handed_over or handed_over
        self._stopped_at = min(self._stopped_at, time.monotonic())
        self._reader.hurry()

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            Exception: A fault of ours that this process cannot go on with.
        """
        self._last_request = time.monotonic()
        answering = self._thread("answering", self._answer_all)
        watching = self._thread("watching", self._watch)
        try:
            while not self._ended():
                room = self._room(_BLOCK_MS / 1000)
                if room:
                    block = _BLOCK_MS if self._stopped_at == float("inf") else _ENDING_BLOCK_MS
                    self._take(self._reader.read(room, block))
            self._wait_for_all(self._stopped_at + self._drain_seconds)
        finally:
            self.stop()
            self._finished.set()
            self._ended_calls.put(None)
            for thread in (answering, watching):
                thread.join(timeout=self._drain_seconds + 10)
        if self._failure is not None:
            raise self._failure

    # The main thread

    def _room(self, timeout: float) -> int:
        """Wait until more may be begun; return how many requests, 0 if `timeout` seconds pass first."""
        with self._changed:
            if len(self._in_flight) >= self._servable.limit:
                # Busy is not idle: what waits in the queue is still to be read.
                self._last_request = time.monotonic()
                self._changed.wait(timeout)
            return min(_READ_LIMIT, self._servable.limit - len(self._in_flight))

    def _take(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        self._last_request = time.monotonic()
        works: list[Work] = []
        refused: list[Outcome] = []
        suspects: list[Request] = []
        for request in requests:
            if request.attempt:
                suspects.append(request)
                continue
            work = self._answering.decode(request)
            if isinstance(work, Outcome):
                refused.append(work)
            else:
                works.append(work)
        if works:
            self._begin(works)
        if refused:
            self._answering.answer(refused, ())
        if suspects:
            log.warning("beginning requests whose replica died", extra={"requests": len(suspects)})
        for suspect in suspects:
            self._begin_suspect(suspect)

    def _begin(self, works: Sequence[Work], *, wait: bool = False) -> None:
        now = time.time_ns()
        begun = [_Begun(work, now) for work in works]
        calls = [self._call(one) for one in begun]
        with self._changed:
            self._in_flight.update({id(one): one for one in begun})
        self._servable.begin(calls, wait=wait)

    def _call(self, begun: _Begun) -> Call:
        work = begun.work
        header = work.request.header
        begun.call = Call(
            inputs=work.infer.inputs,
            outputs=work.infer.outputs,
            deadline_unix_micros=header.deadline_unix_micros,
            priority=self._priorities.get(work.request.stream, 1),
            traceparent=header.traceparent,
            depth=header.depth,
            done=partial(self._done, begun),
        )
        return begun.call

    def _begin_suspect(self, request: Request) -> None:
        """Begin a request that was with a replica when it died: announced, for as long as that takes.

        A request that kills this process does so most likely here, where it is decoded and taken apart. Later
        it only waits for others: whoever kills the process then is not to be blamed on it. One that kills it
        in the end all the same is tried again until its deadline.
        """
        while self._failure is None:
            if request.expired():
                self._answering.answer([expired(request, time.time_ns())], ())
                return
            with contextlib.suppress(Unavailable):
                self._reader.mark_running(request)
                break
            if time.monotonic() >= self._stopped_at + AWAY_SECONDS:
                return  # to whoever reads it next
            time.sleep(_RETRY_SECONDS)
        work = self._answering.decode(request)
        if isinstance(work, Outcome):
            self._answering.answer([work], ())
        else:
            self._begin([work], wait=True)
        # The next suspect overwrites the mark; one that names an answered request does no harm.
        with contextlib.suppress(Unavailable):
            self._reader.mark_running(None)

    def _wait_for_all(self, deadline: float) -> None:
        """Wait until nothing is in flight: each request ends by its own deadline."""
        with self._changed:
            while self._in_flight and self._failure is None and time.monotonic() < deadline:
                self._changed.wait(_BLOCK_MS / 1000)

    def _ended(self) -> bool:
        now = time.monotonic()
        if self._failure is not None:
            return True
        if now < self._stopped_at:
            return False
        if self._handed_over or now >= self._stopped_at + self._drain_seconds:
            return True
        return now - max(self._last_request, self._stopped_at) >= _IDLE_SECONDS

    # The model's thread

    def _done(self, begun: _Begun, result: Batch | PenstockError) -> None:
        begun.result = result
        self._ended_calls.put(begun)

    # The other threads

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                target()
            except BaseException as error:
                log.exception("the %s thread failed", name)
                self._failure = error
                with self._changed:
                    self._changed.notify_all()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _watch(self) -> None:
        while not self._finished.wait(_WATCH_SECONDS):
            old = time.time_ns() - int(_WATCH_SECONDS * 1e9)
            with self._changed:
                open_requests = {
                    id(one.work.request): one for one in self._in_flight.values() if one.begun_ns <= old
                }
            left = self._reader.abandoned([one.work.request for one in open_requests.values()])
            gone = [open_requests[id(request)] for request in left]
            for one in gone:
                one.abandoned = True
            if gone:
                self._servable.abandon([one.call for one in gone if one.call is not None])

    def _answer_all(self) -> None:
        waiting = self._ended_calls
        going = True
        while going:
            ended = [waiting.get()]
            with contextlib.suppress(queue.Empty):
                while len(ended) < _ANSWERS_AT_ONCE:
                    ended.append(waiting.get_nowait())
            going = ended[-1] is not None
            over = [one for one in ended if one is not None]
            # Their callers may ask anew, under the same id: an answer to the first time must not reach them.
            outcomes = [self._outcome(one) for one in over if not one.abandoned]
            calls = [
                execution.Call(outcome.infer.rows, outcome.input_ns, outcome.compute_ns)
                for outcome in outcomes
                if outcome.infer is not None
            ]
            if outcomes:
                self._answering.answer(outcomes, calls)
            with self._changed:
                for one in over:
                    self._in_flight.pop(id(one), None)
                self._changed.notify_all()

    def _outcome(self, begun: _Begun) -> Outcome:
        compute_ns = time.time_ns() - begun.begun_ns
        work, result = begun.work, begun.result
        try:
            if result is None:
                raise Internal("The model ended a request without an outcome.")
            if not isinstance(result, PenstockError):
                result = self._checked(work, result)
        except PenstockError as error:
            result = error
        return Outcome(work.request, work.infer, result, work.started_ns, work.decode_ns, compute_ns)

    def _checked(self, work: Work, given: Mapping[str, object]) -> Batch:
        names = work.infer.outputs or self._outputs
        rows = work.infer.rows if self._batched else 0
        return {name: check_output(self._outputs[name], given, rows) for name in names}
