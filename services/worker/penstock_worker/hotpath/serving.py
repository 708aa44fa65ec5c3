"""The loop of a replica, in one of two shapes.

inline      one thread reads, decodes, computes, encodes and replies. For models so fast that handing work
            from thread to thread would cost more than it hides.
overlapped  a thread reads and decodes the next batch and another encodes and sends the last answers while
            the model computes; torch and ONNX Runtime release the interpreter lock meanwhile. The model
            stays on the thread that loaded it.

It begins inline if the warm-up was fast, and changes over for good when calls turn out to be slow.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence

from penstock_kit.errors import Unavailable
from penstock_kit.queue.messages import Request
from penstock_kit.queue.ports import AWAY_SECONDS, Reader
from penstock_worker.domain.batching import BatchQueue
from penstock_worker.domain.curve import LatencyCurve
from penstock_worker.domain.pacing import Pacer, Policy
from penstock_worker.domain.replica import Curve
from penstock_worker.hotpath.answering import Answering
from penstock_worker.hotpath.execution import Call, Executor, Outcome, Work, expired, late
from penstock_worker.hotpath.intake import Batch, Intake, Waiting

log = logging.getLogger(__name__)

# Calls slower than this are worth two more threads; measured: a hand-over costs some 50 µs.
INLINE_SECONDS = 0.001
# So many more slow calls than fast ones end the inline shape. Fewer may be chance: on a busy machine a
# call of microseconds takes milliseconds now and then, and there is no way back.
_SLOW_CALLS = 16
# How long reading waits for a request before it looks whether it should end.
_BLOCK_MS = 250
# While ending: how long the queue must be empty before it counts as finished.
_IDLE_SECONDS = 0.5
# Of fast models, so much computing is read at once and shares one round trip to Redis.
_READ_AHEAD_SECONDS = 0.004
_READ_LIMIT = 128
# Batches whose answers wait for the sending thread; more would only hide that Redis is slow.
_ANSWERS_WAITING = 4
# Answers that the computing thread sends itself while nothing waits. Encoding and sending 32 takes a
# millisecond or more, in which the next batch may come; a hand-over costs what a few of them do.
_ANSWERED_ALONE = 4
_RETRY_SECONDS = 0.1
# Of the difference between a request's age and the least one, what is added to the latter.
_DRIFT = 1e-4

_Computed = tuple[list[Outcome], list[Call]]


class Serving:
    """Serves one queue until told to stop.

    Args:
        reader: The replica's end of the queue.
        executor: The model; it is used on the thread that calls `run`.
        answering: Decodes requests and sends answers.
        max_delay_seconds: How long a request may wait for others to join it.
        objective_seconds: Latency that most requests should keep; 0 for none.
        seconds_of_max: Time of a full batch, as the warm-up measured it.
        seconds_of_one: Time of one row.
        drain_seconds: How long it may go on after `stop`.
        profile: How long calls take by their rows, as it was measured before on this kind of device.
    """

    def __init__(
        self,
        reader: Reader,
        executor: Executor,
        answering: Answering,
        *,
        max_delay_seconds: float,
        objective_seconds: float,
        seconds_of_one: float,
        seconds_of_max: float,
        drain_seconds: float,
        profile: Curve = (),
    ) -> None:
        self._reader = reader
        self._executor = executor
        self._answering = answering
        self._max_delay = max_delay_seconds
        self._seconds_of_max = seconds_of_max
        self._drain_seconds = drain_seconds
        self._handed_over = False
        self._waiting: BatchQueue[Work] = BatchQueue(executor.max_rows, max_delay_seconds)
        fast = max(seconds_of_one, 20e-6)
        self._read_limit = max(executor.max_rows, min(_READ_LIMIT, int(_READ_AHEAD_SECONDS / fast)))
        self._stopped_at = math.inf
        self._last_request = 0.0
        self._slow_calls = 0
        self._failure: BaseException | None = None
        curve = LatencyCurve(executor.max_rows, seconds_of_one, seconds_of_max, profile)
        self._pacer = Pacer(curve, executor.max_rows, objective_seconds)
        self._intake: Intake | None = None
        # The least time from a gateway's clock to ours that was seen: what clocks differ, and the way.
        self._least_age = math.inf

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
        if self._seconds_of_max <= INLINE_SECONDS:
            self._run_inline()
            if self._ended():
                return
            log.info(
                "the model is slower than its warm-up; computing overlaps reading and answering from now on"
            )
        self._run_overlapped()

    def policy(self) -> Policy:
        """Return how batches are made now. Any thread may ask."""
        intake = self._intake
        if intake is None:
            # Inline, the curve has only what the warm-up measured; the statistics of batches have the rest.
            return self._pacer.policy()
        with intake.lock:
            return self._pacer.policy()

    # inline

    def _run_inline(self) -> None:
        outcomes: list[Outcome] = []
        calls: list[Call] = []
        while not self._ended() and self._slow_calls < _SLOW_CALLS:
            left = self._waiting.seconds_left(time.monotonic())
            block_ms = _BLOCK_MS if left is None else int(left * 1000)
            ready, outcomes = outcomes, []
            made, calls = calls, []
            # The answers to the last requests and the question for the next cross to Redis together.
            requests = self._answering.answer_and_read(ready, made, self._read_limit, self._block(block_ms))
            arrived, suspects, outcomes = self._sort(requests)
            for one in arrived:
                self._waiting.add(one.work, one.key, one.work.infer.rows, one.since)
            while batch := self._waiting.take(time.monotonic())[0]:
                start = time.perf_counter()
                outcomes += self._executor.run(batch)
                self._note(time.perf_counter() - start)
                calls += self._executor.calls
                self._executor.calls.clear()
            if suspects and outcomes:
                # What was computed before must not be lost with a process that a suspect kills.
                self._answering.answer(outcomes, calls)
                outcomes, calls = [], []
            for suspect in suspects:
                self._run_suspect(suspect)
        if outcomes:
            self._answering.answer(outcomes, calls)

    def _note(self, seconds: float) -> None:
        self._slow_calls = max(0, self._slow_calls + (1 if seconds > INLINE_SECONDS else -1))

    # overlapped

    def _run_overlapped(self) -> None:
        max_rows = self._executor.max_rows
        limit = max_rows if self._seconds_of_max > INLINE_SECONDS or self._slow_calls else self._read_limit
        intake = self._intake = Intake(self._waiting, limit, self._pacer)
        answers: queue.Queue[_Computed | None] = queue.Queue(_ANSWERS_WAITING)
        threads = [
            self._thread("reading", self._read_all, intake),
            self._thread("answering", self._answer_all, answers),
        ]
        try:
            computed: _Computed | None = None
            while True:
                taken = intake.take(wait=computed is None)
                if computed is not None:
                    if isinstance(taken, Batch) or (taken is None and len(computed[0]) > _ANSWERED_ALONE):
                        self._put(answers, computed)
                    else:
                        # The model is free anyway: a hand-over would only cost time. Before a suspect, what
                        # was computed must not be lost with a process that the suspect kills.
                        self._wait_until(lambda: not answers.unfinished_tasks)
                        self._answering.answer(*computed)
                    computed = None
                elif taken is None:
                    break
                if isinstance(taken, Batch):
                    computed = self._compute(intake, taken)
                elif taken is not None:
                    self._wait_until(lambda: not answers.unfinished_tasks)
                    self._run_suspect(taken)
        except BaseException as error:
            # Nobody computes any more what would be read: the reading thread must not go on.
            self._failure = self._failure or error
            raise
        finally:
            self.stop()
            intake.close()
            reading, answering = threads
            reading.join(timeout=self._drain_seconds + 10)
            # What was computed is answered, whatever failed.
            while answering.is_alive():
                with contextlib.suppress(queue.Full):
                    answers.put(None, timeout=_BLOCK_MS / 1000)
                    break
            answering.join(timeout=self._drain_seconds + 10)
        if self._failure is not None:
            raise self._failure

    def _compute(self, intake: Intake, batch: Batch) -> _Computed:
        outcomes = [late(work) for work in batch.late]
        works = batch.works
        if works:
            rows = sum([work.infer.rows for work in works])
            intake.computing(rows)
            start = time.perf_counter()
            outcomes += self._executor.run(works)
            intake.computed(rows, time.perf_counter() - start)
        calls = self._executor.calls
        self._executor.calls = []
        return outcomes, calls

    def _read_all(self, intake: Intake) -> None:
        try:
            while not self._ended():
                room = intake.room(_BLOCK_MS / 1000)
                if not room:
                    # Busy is not idle: what waits in the queue is still to be read.
                    self._last_request = time.monotonic()
                    continue
                arrived, suspects, refused = self._sort(self._reader.read(room, self._block(_BLOCK_MS)))
                if arrived or suspects:
                    intake.put(arrived, suspects)
                if refused:
                    self._answering.answer(refused, ())
        finally:
            intake.close()

    def _answer_all(self, answers: queue.Queue[_Computed | None]) -> None:
        while (item := answers.get()) is not None:
            self._answering.answer(*item)
            answers.task_done()

    def _thread(self, name: str, target: Callable[..., None], argument: object) -> threading.Thread:
        def guarded() -> None:
            try:
                target(argument)
            except BaseException as error:
                log.exception("the %s thread failed", name)
                self._failure = error

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _put(self, answers: queue.Queue[_Computed | None], item: _Computed) -> None:
        while True:
            try:
                answers.put(item, timeout=_BLOCK_MS / 1000)
            except queue.Full:
                if self._failure is not None:
                    raise self._failure from None
            else:
                return

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition() and self._failure is None:
            time.sleep(0.001)

    # both

    def _sort(self, requests: Sequence[Request]) -> tuple[list[Waiting], list[Request], list[Outcome]]:
        """Return what can be computed, the suspects, and the outcomes of what is refused."""
        arrived: list[Waiting] = []
        suspects: list[Request] = []
        refused: list[Outcome] = []
        if not requests:
            return arrived, suspects, refused
        now = self._last_request = time.monotonic()
        # From Unix time to that clock.
        offset = now - time.time()
        for request in requests:
            if request.attempt:
                suspects.append(request)
                continue
            work = self._answering.decode(request)
            if isinstance(work, Outcome):
                refused.append(work)
                continue
            header = request.header
            since = self._since(header.enqueue_unix_micros, now, offset)
            due = header.deadline_unix_micros / 1e6 + offset
            arrived.append(Waiting(work, self._executor.key(work.infer), since, due))
        return arrived, suspects, refused

    def _since(self, queued_unix_micros: int, now: float, offset: float) -> float:
        """Return when a request was queued, on our clock.

        Clocks of several machines differ. The least age that was seen of a request counts as none; it rises
        slowly, so that it follows clocks that drift.
        """
        if not queued_unix_micros:
            return now
        age = now - (queued_unix_micros / 1e6 + offset)
        if age < self._least_age:
            self._least_age = age
        else:
            self._least_age += _DRIFT * (age - self._least_age)
        return now - (age - self._least_age)

    def _run_suspect(self, request: Request) -> None:
        """Compute a request that was with a replica when it died: alone, and announced."""
        while True:
            if request.expired():
                self._answering.answer([expired(request, time.time_ns())], ())
                return
            try:
                self._reader.mark_running(request)
            except Unavailable:
                if time.monotonic() >= self._stopped_at + AWAY_SECONDS:
                    return  # to whoever reads it next
                time.sleep(_RETRY_SECONDS)
            else:
                break
        log.warning("running a request alone, whose replica died", extra={"attempt": request.attempt})
        work = self._answering.decode(request)
        outcomes = [work] if isinstance(work, Outcome) else self._executor.run([work])
        self._answering.answer(outcomes, self._executor.calls)
        self._executor.calls.clear()
        try:
            self._reader.mark_running(None)
        except Unavailable as error:
            # The next suspect overwrites the mark; one that names an answered request does no harm.
            log.info("could not take the mark off a suspect", extra={"error": str(error)})

    def _block(self, block_ms: int) -> int:
        return min(block_ms, 100) if self._stopped_at < math.inf else block_ms

    def _ended(self) -> bool:
        now = time.monotonic()
        if self._failure is not None:
            return True
        if now < self._stopped_at:
            return False
        if self._handed_over or now >= self._stopped_at + self._drain_seconds:
            return True
        return now - max(self._last_request, self._stopped_at) >= _IDLE_SECONDS
