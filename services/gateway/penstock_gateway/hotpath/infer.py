"""ModelInfer over gRPC: the shortest way from the wire to the queue and back.

What `grpc_framing` does for any call is done here for one message each way, in two functions: one takes
the request to the queue, the other its answer to the wire. The request's tensors are never looked at.
"""

from __future__ import annotations

import time
from functools import partial

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC
from penstock_gateway.hotpath.bounds import bounds, header_priority
from penstock_gateway.hotpath.dispatch import Dispatcher, Outcome, Ticket
from penstock_gateway.hotpath.grpc_framing import (
    ACCEPT_ENCODING,
    encodings,
    error_headers,
    hide,
    parse_timeout,
)
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.ports import Plan, Responder
from penstock_gateway.hotpath.messages import MessageReader, frame, too_large
from penstock_gateway.hotpath.scan import read_parameters, scan
from penstock_kit.errors import InvalidArgument, PenstockError, Reason
from penstock_kit.queue.messages import Reply

_OK = ((b"grpc-status", b"0"),)
_PREFIX = 5


class InferHandler:
    """Serves /inference.GRPCInferenceService/ModelInfer.

    Args:
        dispatcher: Queues requests.
        limit: Bytes of one message at most.
        default_timeout: Seconds for a call that gives no deadline.
    """

    def __init__(self, dispatcher: Dispatcher, *, limit: int, default_timeout: float) -> None:
        self._dispatcher = dispatcher
        self._limit = limit
        self._default_timeout = default_timeout

    def plan(self, head: Head) -> Plan:
        """Return how calls with this head are served."""
        try:
            timeout = head.fields.get(b"grpc-timeout")
            seconds = self._default_timeout if timeout is None else parse_timeout(timeout)
            encoding, answer_encoding = encodings(head.fields)
            priority = header_priority(head.fields)
        except PenstockError as error:
            return _Refusal(error)
        traceparent = head.fields.get(b"traceparent", b"").decode("latin-1")
        return _Infer(
            self._dispatcher, self._limit, seconds, priority, encoding, answer_encoding, traceparent
        )


class _Infer:
    """Calls with one head.

    Args:
        dispatcher: Queues requests.
        limit: Bytes of one message at most.
        timeout: Seconds that the caller waits.
        priority: That the metadata ask for.
        encoding: Of the requests; "identity" if they are not compressed.
        answer_encoding: Of the answers; empty if they are not compressed.
        traceparent: W3C trace context of the caller.
    """

    __slots__ = (
        "_answer_encoding",
        "_dispatcher",
        "_encoding",
        "_message_limit",
        "_priority",
        "_traceparent",
        "limit",
        "timeout",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        limit: int,
        timeout: float,
        priority: int,
        encoding: str,
        answer_encoding: str,
        traceparent: str,
    ) -> None:
        self._dispatcher = dispatcher
        self._message_limit = limit
        self.limit = limit + _PREFIX
        self.timeout = timeout
        self._priority = priority
        self._encoding = encoding
        self._answer_encoding = answer_encoding
        self._traceparent = traceparent

    def run(self, responder: Responder, body: bytes) -> Ticket | None:
        """Queue one call."""
        deadline = time.time() + self.timeout
        try:
            if body[:1] == b"\x00" and len(body) == _PREFIX + int.from_bytes(body[1:_PREFIX], "big"):
                message = body[_PREFIX:]
            else:
                message = self._unusual(body)
            name, version, _, parameters = scan(message)
            priority = self._priority
            if parameters and (b"priority" in parameters or b"timeout" in parameters):
                deadline, priority = bounds(read_parameters(parameters), deadline, priority)
            return self._dispatcher.begin(
                name,
                version,
                message,
                partial(self._answer, responder),
                deadline=deadline,
                format=PAYLOAD_FORMAT_OIP_GRPC,
                traceparent=self._traceparent,
                priority=priority,
            )
        except PenstockError as error:
            responder.answer_grpc(error_headers(error))
        except Exception as error:  # noqa: BLE001 - the edge: nothing unknown may leak
            responder.answer_grpc(error_headers(hide(error, "ModelInfer")))
        return None

    def cancel(self, work: Ticket) -> None:
        """Take a call off its queue."""
        self._dispatcher.cancel(work)

    def refuse(self, responder: Responder, error: PenstockError) -> None:
        """Answer with an error."""
        responder.answer_grpc(error_headers(error))

    def _answer(self, responder: Responder, outcome: Outcome) -> None:
        if isinstance(outcome, Reply):
            if self._answer_encoding:
                encoding = ((b"grpc-encoding", self._answer_encoding.encode()),)
                responder.answer_grpc(_OK, frame(outcome.payload, self._answer_encoding), encoding)
            else:
                responder.answer_message(outcome.payload)
        elif isinstance(outcome, PenstockError):
            responder.answer_grpc(error_headers(outcome))
        # else cancelled: the caller went away

    def _unusual(self, body: bytes) -> bytes:
        """Return the message of a body that is compressed, or not of one whole message."""
        reader = MessageReader(self._encoding, self._message_limit)
        reader.feed(body)
        message = reader.next()
        if message is None:
            what = "The stream ends within a message." if body else "The call has no message."
            raise InvalidArgument(what, reason=Reason.MALFORMED_BODY)
        if reader.pending:
            raise InvalidArgument("The call has more than one message.", reason=Reason.MALFORMED_BODY)
        if len(message) > self._message_limit:
            raise too_large(len(message), self._message_limit)
        return message


class _Refusal:
    """Calls whose head says that they cannot be served.

    Args:
        error: Why.
    """

    def __init__(self, error: PenstockError) -> None:
        self._error = error
        self.timeout = 0.0
        self.limit = 0

    def run(self, responder: Responder, body: bytes) -> None:
        """Answer with the error."""
        responder.answer_grpc([*error_headers(self._error), ACCEPT_ENCODING])

    def cancel(self, work: None) -> None:
        """Do nothing: there is no work."""

    def refuse(self, responder: Responder, error: PenstockError) -> None:
        """Answer with the error of the head, which came first."""
        self.run(responder, b"")
