"""From a model name to a request in the right queue: routing, admission, cancellation."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from functools import partial

from penstock.queue.v1.envelope_pb2 import PayloadFormat, RequestHeader
from penstock_gateway.domain.routing import Table, Target, not_ready, split_name
from penstock_gateway.hotpath.lanes import Lane
from penstock_gateway.hotpath.scan import Parameter
from penstock_gateway.hotpath.spans import InferenceSpan
from penstock_kit.errors import (
    Code,
    InvalidArgument,
    NotFound,
    PenstockError,
    Reason,
    ResourceExhausted,
    Unavailable,
    error_for,
)
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.ports import Sender
from penstock_kit.queue.waiting import settle

PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW = 0, 1, 2
_CANCELLED = int(Code.CANCELLED)
# A full queue drains at the pace of its replicas, which a second says something about.
_RETRY_SECONDS = 1.0


# A reply without an error code, an error of the tree, or CancelledError.
Outcome = Reply | BaseException
Done = Callable[[Outcome], None]


class Ticket:
    """One accepted request, until it is answered.

    Attributes:
        header: What the replica gets beside the payload; its id names the request.
        selector: The version or alias that the caller asked for; empty if none.
        queue: Where the request waits, if there is a selector.
    """

    __slots__ = ("_dispatcher", "done", "header", "lane", "queue", "selector", "span", "started")

    def __init__(self, dispatcher: Dispatcher, lane: Lane, header: RequestHeader, done: Done) -> None:
        self._dispatcher = dispatcher
        self.lane = lane
        self.header = header
        self.done = done
        self.started = time.monotonic()
        self.selector = self.queue = ""
        self.span: InferenceSpan | None = None

    def end(self, outcome: Outcome) -> None:
        """Take the outcome from the queue, count it, and hand it on."""
        if isinstance(outcome, Reply):
            code = outcome.header.code
            if code:
                outcome = error_of(outcome)
        else:
            code = int(outcome.code) if isinstance(outcome, PenstockError) else _CANCELLED
        self._dispatcher.forget(self, code)
        self.done(outcome)


class Dispatcher:
    """Sends requests to queues, and knows all that are unanswered.

    Args:
        sender: The gateway's end of the queue.
        default_timeout: Seconds that an inference may take if nobody says otherwise.
        traced: Whether each inference gets a span.
        draw: Gives fractions for the choice by weight.

    Attributes:
        table: The routing table of the moment.
        lanes: What is counted, by deployment.
        draining: Whether new inferences are refused because the process ends.
        changed: Set when the next routing table comes, and replaced then.
    """

    def __init__(
        self,
        sender: Sender,
        *,
        default_timeout: float = 60.0,
        traced: bool = False,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._sender = sender
        self.default_timeout = default_timeout
        self.changed = asyncio.Event()
        self._draw = draw
        self._traced = traced
        self._tickets: dict[bytes, Ticket] = {}
        self.table = Table()
        self.lanes: dict[str, Lane] = {}
        self.draining = False

    @property
    def in_flight(self) -> int:
        """Calls that are not answered yet."""
        return len(self._tickets)

    @property
    def problem(self) -> str:
        """Why no inference would be answered now, whatever the deployment; empty if they would."""
        if self.draining:
            return "the gateway is shutting down"
        if not self._sender.connected:
            return "Redis cannot be reached"
        if self.table.generation == 0:
            return "the scheduler has not sent a routing table yet"
        return ""

    def update(self, table: Table) -> None:
        """Take a new routing table; requests in queues that vanished go to where their name leads now."""
        gone = self.table.queues() - table.queues()
        owners = {t.queue: route.deployment for route in self.table.routes.values() for t in route.targets}
        self.table = table
        for name, route in table.routes.items():
            lane = self.lanes.get(name)
            if lane is None:
                self.lanes[name] = Lane(route)
            else:
                lane.update(route)
        for name in self.lanes.keys() - table.routes.keys():
            if self.lanes[name].in_flight == 0:
                del self.lanes[name]
            else:
                self.lanes[name].only = None  # kept for those on their way; nothing new may follow them
        for queue in gone:
            self._resettle(queue, owners[queue])
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _resettle(self, queue: str, deployment: str) -> None:
        """Send what waits in a queue that vanished elsewhere, or say why that cannot be.

        Those who asked for a version get that version or an error: another one's answer is not theirs.
        """
        route = self.table.routes.get(deployment)
        chosen: dict[str, set[bytes]] = {}
        for request_id, ticket in self._tickets.items():
            if ticket.selector and ticket.queue == queue:
                chosen.setdefault(ticket.selector, set()).add(request_id)
        for selector, ids in chosen.items():
            try:
                successor = self.table.find(deployment).named(selector).queue
            except PenstockError as error:
                self._sender.fail(queue, error, ids)
                continue
            for request_id in ids:
                self._tickets[request_id].queue = successor
            self._sender.reroute(queue, successor, ids)
        try:
            if route is None:
                raise NotFound(
                    f"Deployment {deployment} was deleted before this request was answered.",
                    reason=Reason.DEPLOYMENT_NOT_FOUND,
                    metadata={"deployment": deployment},
                )
            self._sender.reroute(queue, route.weighted(self._draw()).queue)
        except PenstockError as error:
            self._sender.fail(queue, error)

    def resolve(self, name: str, selector: str) -> tuple[Lane, Target]:
        """Return where a request goes.

        Raises:
            NotFound: No such deployment, version or alias.
            Unavailable: Nothing would answer, and waiting would not help.
        """
        lane = self.lanes.get(name)
        if lane is not None and not selector:
            target = lane.only
            if target is not None:
                return lane, target
        if "@" in name:
            name, selector = split_name(name, selector)
        route = self.table.find(name)
        target = route.select(selector, self._draw())
        if not target.ready and not route.may_wait:
            raise not_ready(route)
        return self.lanes[name], target

    def begin(
        self,
        name: str,
        selector: str,
        payload: bytes,
        done: Done,
        *,
        deadline: float,
        format: PayloadFormat.ValueType,  # noqa: A002 - the proto's word
        json_length: int = 0,
        traceparent: str = "",
        priority: int = PRIORITY_NORMAL,
    ) -> Ticket:
        """Accept a request and queue it.

        Args:
            name: The model name as the caller wrote it.
            selector: The version as the caller wrote it.
            payload: Goes to the replica as it is.
            done: Gets the outcome, once, on the loop; not called if this raises.
            deadline: Unix time in seconds.
            format: How the payload is written.
            json_length: Length of its JSON part, where binary tensors follow it.
            traceparent: W3C trace context.
            priority: Which stream of the queue.

        Raises:
            NotFound: No such deployment, version or alias.
            ResourceExhausted: Too much is unanswered already.
            DeadlineExceeded: The deadline has passed.
            Unavailable: Nothing would answer, or the gateway is shutting down.
        """
        lane, target = self.resolve(name, selector)
        if lane.in_flight >= lane.limit:
            raise full(lane)
        if self.draining:
            raise Unavailable(
                "This gateway is shutting down. Retry: another one answers.",
                reason=Reason.SHUTTING_DOWN,
                retry_after_seconds=0.1,
            )
        span = InferenceSpan(name, traceparent) if self._traced else None
        if span is not None:
            traceparent = span.traceparent
        header = RequestHeader(
            deadline_unix_micros=int(deadline * 1e6),
            format=format,
            json_length=json_length,
            model_name=name,
            traceparent=traceparent,
        )
        ticket = Ticket(self, lane, header, done)
        self._sender.submit_call(target.queue, header, payload, priority, ticket.end)
        ticket.span = span
        if selector or "@" in name:
            ticket.selector, ticket.queue = split_name(name, selector)[1], target.queue
        self._tickets[header.id] = ticket
        lane.in_flight += 1
        return ticket

    def submit(
        self,
        name: str,
        selector: str,
        payload: bytes,
        *,
        deadline: float,
        format: PayloadFormat.ValueType,  # noqa: A002 - the proto's word
        json_length: int = 0,
        traceparent: str = "",
        priority: int = PRIORITY_NORMAL,
    ) -> asyncio.Future[Reply]:
        """Accept a request like `begin`, for those who wait with `await`.

        Whoever cancels the future, or the task that waits for it, takes the request off its queue.
        """
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        ticket = self.begin(
            name,
            selector,
            payload,
            partial(settle, future),
            deadline=deadline,
            format=format,
            json_length=json_length,
            traceparent=traceparent,
            priority=priority,
        )

        def left(ended: asyncio.Future[Reply]) -> None:
            if ended.cancelled():
                self.cancel(ticket)

        future.add_done_callback(left)
        return future

    def forget(self, ticket: Ticket, code: int) -> None:
        """Count the end of a request; called by its ticket."""
        lane = ticket.lane
        lane.in_flight -= 1
        lane.count(code, time.monotonic() - ticket.started)
        self._tickets.pop(ticket.header.id, None)
        if ticket.span is not None:
            ticket.span.end(code)

    def cancel(self, ticket: Ticket) -> None:
        """Take a request off its queue because the caller went away; nothing if it is answered."""
        self._sender.cancel(ticket.header.id)


def full(lane: Lane) -> ResourceExhausted:
    """Return the error of a deployment with too many unanswered requests."""
    return ResourceExhausted(
        f"Deployment {lane.route.deployment} has {lane.in_flight} unanswered requests at this gateway, "
        f"the most it takes. Retry later, or add replicas.",
        metadata={"deployment": lane.route.deployment},
        retry_after_seconds=_RETRY_SECONDS,
    )


def error_of(reply: Reply) -> PenstockError:
    """Return the error that a reply carries."""
    header = reply.header
    try:
        reason = Reason(header.reason)
    except ValueError:
        reason = Reason.UNSPECIFIED  # a newer replica's word
    return error_for(header.code, header.message, reason=reason, metadata=dict(header.metadata))


def bounds(parameters: Mapping[str, Parameter], deadline: float) -> tuple[float, int]:
    """Return deadline and stream that the request parameters `timeout` and `priority` ask for.

    `timeout` is in microseconds and only shortens the deadline. `priority` is Triton's: 0 is the
    default, 1 the highest; here 1 is high, 2 normal, and all above are low.

    Raises:
        InvalidArgument: One of them is no whole number that is 0 or more.
    """
    timeout = _count(parameters, "timeout")
    if timeout:
        deadline = min(deadline, time.time() + timeout / 1e6)
    rank = _count(parameters, "priority")
    if rank == 1:
        return deadline, PRIORITY_HIGH
    return deadline, PRIORITY_LOW if rank > 2 else PRIORITY_NORMAL


def _count(parameters: Mapping[str, Parameter], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"The request parameter {name!r} must be a whole number, 0 or more.")
    return value
