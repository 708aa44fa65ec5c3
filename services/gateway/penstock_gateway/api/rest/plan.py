"""POST /v2/models/{model}/infer the short way: no task, no second look at a head that came before."""

from __future__ import annotations

import re
import time
from functools import partial

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_REST
from penstock_gateway.api.rest.http import HttpError, RequestHead, encode, failure
from penstock_gateway.api.rest.inference import BODY_TYPES, answer, json_bounds, json_part
from penstock_gateway.hotpath.dispatch import Dispatcher, Outcome, Ticket
from penstock_gateway.hotpath.grpc_framing import hide
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.ports import Plan, Responder
from penstock_kit.errors import PenstockError
from penstock_kit.queue.messages import Reply

_INFER = re.compile(r"/v2/models/([^/:]+)(?:/versions/([^/:]+))?/infer")


class InferPlanner:
    """Makes plans for inferences whose body comes whole: of a known length, not compressed.

    Args:
        dispatcher: Queues requests.
        limit: Bytes of one body at most.
        default_timeout: Seconds for a request that gives no deadline.
    """

    def __init__(self, dispatcher: Dispatcher, *, limit: int, default_timeout: float) -> None:
        self._dispatcher = dispatcher
        self._limit = limit
        self._default_timeout = default_timeout

    def plan(self, head: Head) -> Plan | None:
        """Return a plan; None for all else, and for heads that are wrong, which `Inference` answers."""
        match = _INFER.fullmatch(head.path)
        if (
            match is None
            or head.method != "POST"
            or head.content_length is None
            or head.content_length > self._limit
            or head.fields.get(b"content-encoding", b"identity") != b"identity"
        ):
            return None
        try:
            request = RequestHead(head.method, head.path, head.fields, head.query, self._default_timeout)
            request.require(*BODY_TYPES)
            priority = request.priority
        except (PenstockError, HttpError):
            return None
        return _Infer(self._dispatcher, request, match[1], match[2] or "", priority, self._limit)


class _Infer:
    """Requests with one head.

    Args:
        dispatcher: Queues requests.
        request: What their head says.
        model: In their path.
        version: In their path, or empty.
        priority: That their headers ask for.
        limit: Bytes of one body at most.
    """

    __slots__ = ("_dispatcher", "_model", "_priority", "_request", "_version", "limit", "timeout")

    def __init__(
        self,
        dispatcher: Dispatcher,
        request: RequestHead,
        model: str,
        version: str,
        priority: int,
        limit: int,
    ) -> None:
        self._dispatcher = dispatcher
        self._request = request
        self._model = model
        self._version = version
        self._priority = priority
        self.limit = limit
        self.timeout = request.timeout

    def run(self, responder: Responder, body: bytes) -> Ticket | None:
        """Queue one request."""
        try:
            json_length = json_part(self._request.headers, body)
            deadline, priority = json_bounds(body, json_length, time.time() + self.timeout, self._priority)
            return self._dispatcher.begin(
                self._model,
                self._version,
                body,
                partial(self._answer, responder),
                deadline=deadline,
                format=PAYLOAD_FORMAT_OIP_REST,
                json_length=json_length,
                traceparent=self._request.traceparent,
                priority=priority,
            )
        except PenstockError as error:
            self.refuse(responder, error)
        except Exception as error:  # noqa: BLE001 - the edge: nothing unknown may leak
            self.refuse(responder, hide(error, "infer"))
        return None

    def cancel(self, work: Ticket) -> None:
        """Take a request off its queue."""
        self._dispatcher.cancel(work)

    def refuse(self, responder: Responder, error: PenstockError) -> None:
        """Answer with an error."""
        response = failure(error)
        responder.answer_http(response.status, *encode(response, self._request.headers))

    def _answer(self, responder: Responder, outcome: Outcome) -> None:
        if isinstance(outcome, Reply):
            responder.answer_http(200, *encode(answer(outcome), self._request.headers))
        elif isinstance(outcome, PenstockError):
            self.refuse(responder, outcome)
        # else cancelled: the caller went away
