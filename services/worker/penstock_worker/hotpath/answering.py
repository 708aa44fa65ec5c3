"""Requests to work, outcomes to replies: the two ends of the hot path inside a replica."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader
from penstock_kit.errors import Internal, PenstockError, Unavailable
from penstock_kit.oip import Codec, Encoded
from penstock_kit.queue.messages import Buffer, Request
from penstock_kit.queue.ports import Done, Reader
from penstock_worker.hotpath.execution import Call, Outcome, Work, expired
from penstock_worker.hotpath.statistics import Counters

log = logging.getLogger(__name__)

Tracer = Callable[[Outcome, int], None]
"""Records the span of one answered request: the outcome, and when it ended in nanoseconds."""


class Answering:
    """Decodes what was read and answers what was computed. Any thread may call it.

    Args:
        reader: The replica's end of the queue.
        codec: The version's wire forms.
        counters: Counts what is answered.
        tracer: Records spans; None for no tracing.
    """

    def __init__(self, reader: Reader, codec: Codec, counters: Counters, tracer: Tracer | None) -> None:
        self._reader = reader
        self._codec = codec
        self._counters = counters
        self._tracer = tracer

    def decode(self, request: Request) -> Work | Outcome:
        """Return a request's work, or its outcome if it is refused or too late."""
        start = time.time_ns()
        header = request.header
        if header.deadline_unix_micros <= start // 1000:
            return expired(request, start)
        try:
            infer = self._codec.decode(header.format, request.payload, header.json_length)
        except PenstockError as error:
            return Outcome(request, None, error, start)
        except Exception as error:  # noqa: BLE001 - logged; it is this request's alone
            return Outcome(request, None, _unexpected(error, "decode the request"), start)
        if infer.parameters and _hurry(header, infer.parameters) <= start // 1000:
            return expired(request, start)
        return Work(request, infer, time.time_ns() - start, start)

    def answer(self, outcomes: Sequence[Outcome], calls: Sequence[Call]) -> None:
        """Encode and send the replies to requests, and take them off the queue."""
        done, output_ns = self._replies(outcomes)
        try:
            self._reader.finish(done)
        except Unavailable as error:
            _unsent(done, error)
        self._record(outcomes, calls, output_ns)

    def answer_and_read(
        self, outcomes: Sequence[Outcome], calls: Sequence[Call], max_entries: int, block_ms: int
    ) -> list[Request]:
        """Do what `answer` does, and read the next requests in the same step. The reading thread calls it."""
        if not outcomes:
            return self._reader.read(max_entries, block_ms)
        done, output_ns = self._replies(outcomes)
        # Before the wait for what comes next: the answers count from now on.
        self._record(outcomes, calls, output_ns)
        try:
            return self._reader.exchange(done, max_entries, block_ms)
        except Unavailable as error:
            _unsent(done, error)
            return []

    def _replies(self, outcomes: Sequence[Outcome]) -> tuple[list[Done], int]:
        """Return the answers, encoded, and how many nanoseconds that took."""
        start = time.time_ns()
        done: list[Done] = []
        for outcome in outcomes:
            header: ReplyHeader | None = None
            payload: Buffer = b""
            if not isinstance(outcome.result, PenstockError):
                try:
                    payload, json_length = self._encode(outcome)
                except PenstockError as error:
                    outcome.result = error
                else:
                    if json_length:
                        header = ReplyHeader(json_length=json_length)
            if isinstance(outcome.result, PenstockError):
                header = _describe(outcome.result)
            done.append((outcome.request, header, payload))
        return done, time.time_ns() - start

    def _record(self, outcomes: Sequence[Outcome], calls: Sequence[Call], output_ns: int) -> None:
        end = time.time_ns()
        self._counters.record(outcomes, calls, output_ns, end)
        if self._tracer is not None:
            for outcome in outcomes:
                if outcome.request.header.traceparent:
                    self._tracer(outcome, end)

    def _encode(self, outcome: Outcome) -> Encoded:
        header = outcome.request.header
        result, infer = outcome.result, outcome.infer
        if infer is None or isinstance(result, PenstockError):
            raise Internal("There is no result to encode.")
        try:
            return self._codec.encode(header.format, infer, header.model_name, result)
        except PenstockError:
            raise
        except Exception as error:
            raise _unexpected(error, "encode the answer") from error


def _hurry(header: RequestHeader, parameters: Mapping[str, object]) -> int:
    """Note the deadline that the parameter `timeout` gives, in microseconds from its queueing; return it.

    Gateways do not look for it in JSON that is long, so that it may be sooner than the header's.
    """
    timeout = parameters.get("timeout")
    if isinstance(timeout, int) and timeout > 0 and header.enqueue_unix_micros:
        deadline = min(header.deadline_unix_micros, header.enqueue_unix_micros + timeout)
        header.deadline_unix_micros = deadline
    return header.deadline_unix_micros


def _describe(error: PenstockError) -> ReplyHeader:
    return ReplyHeader(
        code=int(error.code), reason=int(error.reason), message=error.message, metadata=error.metadata
    )


def _unsent(done: Sequence[Done], error: Unavailable) -> None:
    log.warning(
        "answers could not be sent: the queue was away too long",
        extra={"requests": len(done), "error": str(error)},
    )


def _unexpected(error: Exception, what: str) -> Internal:
    """Return what the caller of one request sees of a fault of ours; its neighbours go on."""
    log.error("could not %s", what, exc_info=error)
    return Internal(f"The replica could not {what}; its log says why.")
