"""From a model name to a request in the right queue: routing, admission, cancellation."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from functools import partial

from penstock.queue.v1.envelope_pb2 import PayloadFormat, RequestHeader
from penstock_gateway.domain.admission import NOWHERE, Backlog, Waitlist
from penstock_gateway.domain.traffic import NOBODY, Tallies, Tally
from penstock_gateway.hotpath import lanes
from penstock_gateway.hotpath.cache import DEFAULT_LIMIT_BYTES, ResponseCache
from penstock_gateway.hotpath.flights import Leavable
from penstock_gateway.hotpath.lanes import Lane
from penstock_gateway.hotpath.mirror import Mirror
from penstock_gateway.hotpath.replies import error_of
from penstock_gateway.hotpath.spans import InferenceSpan
from penstock_kit.errors import (
    Code,
    NotFound,
    PenstockError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from penstock_kit.queue.keys import PRIORITY_NORMAL
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.ports import Sender
from penstock_kit.queue.waiting import settle
from penstock_kit.routing.table import Table, Target, not_ready, split_name

_CANCELLED = int(Code.CANCELLED)
_DEADLINE_EXCEEDED = int(Code.DEADLINE_EXCEEDED)
# When to come back to a full queue whose pace is not known yet.
_RETRY_SECONDS = 1.0
# A shorter pause only makes callers knock.
_MIN_RETRY_SECONDS = 0.01


# A reply without an error code, an error of the tree, or CancelledError.
Outcome = Reply | BaseException
Done = Callable[[Outcome], None]


class Ticket:
    """One accepted request, until it is answered.

    Attributes:
        header: What the replica gets beside the payload; its id names the request.
        selector: The version or alias that the caller asked for; empty if none.
        backlog: Where the request waits.
        flight: What answers it, if it is in no queue by itself.
        reckoned: Seconds that those ahead of it were expected to take when it came.
        tally: Where the version's answers are counted.
    """

    __slots__ = (
        "_dispatcher",
        "backlog",
        "done",
        "flight",
        "header",
        "lane",
        "reckoned",
        "selector",
        "span",
        "started",
        "tally",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        lane: Lane,
        header: RequestHeader,
        done: Done,
        backlog: Backlog,
        reckoned: float,
        tally: Tally,
    ) -> None:
        self._dispatcher = dispatcher
        self.lane = lane
        self.header = header
        self.done = done
        self.backlog = backlog
        self.reckoned = reckoned
        self.tally = tally
        self.started = time.monotonic()
        self.selector = ""
        self.span: InferenceSpan | None = None
        self.flight: Leavable | None = None

    def end(self, outcome: Outcome) -> None:
        """Take the outcome from the queue, count it, and hand it on."""
        now = time.monotonic()
        took = now - self.started
        if isinstance(outcome, Reply):
            code = outcome.header.code
            if code:
                outcome = error_of(outcome)
            if code == _DEADLINE_EXCEEDED:
                self.backlog.missed(now, took, self.reckoned)
            else:
                self.backlog.answered(now, took, self.reckoned)
        else:
            code = int(outcome.code) if isinstance(outcome, PenstockError) else _CANCELLED
            if code == _DEADLINE_EXCEEDED:
                self.backlog.missed(now, took, self.reckoned)
            else:
                self.backlog.leave()
        if isinstance(outcome, BaseException):
            left = self.header.deadline_unix_micros / 1e6 - time.time()
            self.tally.err(outcome, took, left, self.reckoned)
        else:
            self.tally.succeed(took)
        self._dispatcher.forget(self, code, took)
        self.done(outcome)


class Dispatcher:
    """Sends requests to queues, and knows all that are unanswered.

    Args:
        sender: The gateway's end of the queue.
        default_timeout: Seconds that an inference may take if nobody says otherwise.
        traced: Whether each inference gets a span.
        cache_bytes: Bytes of answers kept for equal requests at most.
        draw: Gives fractions: where the choice by weight begins, and where requests go whose queue vanished.

    Attributes:
        table: The routing table of the moment.
        lanes: What is counted, by deployment.
        waitlists: What waits, by queue.
        tallies: What came of the requests for each version, for the scheduler.
        cache: Answers of deployments that have a policy for equal requests.
        mirror: Versions that get copies of requests.
        draining: Whether new inferences are refused because the process ends.
        changed: Set when the next routing table comes, and replaced then.
        wanting: Set when a request begins to wait for a replica where there is none.
    """

    def __init__(
        self,
        sender: Sender,
        *,
        default_timeout: float = 60.0,
        traced: bool = False,
        cache_bytes: int = DEFAULT_LIMIT_BYTES,
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
        self.waitlists: dict[str, Waitlist] = {}
        self.tallies = Tallies()
        self.wanting = asyncio.Event()
        self.cache = ResponseCache(sender, cache_bytes)
        self.mirror = Mirror(sender)
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
        self.tallies.follow(
            {
                (name, target.model, target.version): target.ready
                for name, route in table.routes.items()
                for target in route.targets
            }
        )
        for name, route in table.routes.items():
            lane = self.lanes.get(name)
            if lane is None:
                self.lanes[name] = Lane(route, self._draw())
            else:
                lane.update(route)
            for target in route.targets:
                waitlist = self.waitlists.get(target.queue)
                if waitlist is None:
                    waitlist = self.waitlists[target.queue] = Waitlist(target.queue)
                waitlist.tally = self.tallies.of((name, target.model, target.version))
                waitlist.offer(target.ready_replicas, target.description.max_batch_size)
        for name in self.lanes.keys() - table.routes.keys():
            if self.lanes[name].in_flight == 0:
                del self.lanes[name]
            else:
                self.lanes[name].only = None  # kept for those on their way; nothing new may follow them
        self.cache.follow(table)
        self.mirror.follow(table, self.tallies)
        for name, lane in self.lanes.items():
            lane.shelf = self.cache.shelves.get(name)
            lane.shadows = self.mirror.shadows.get(name, ())
        for queue in gone:
            self._resettle(queue, owners[queue])
            del self.waitlists[queue]
        for route in table.routes.values():
            if route.failed:  # as those are told who come now
                for target in route.targets:
                    if not target.ready and self._sender.unanswered(target.queue):
                        self._sender.fail(target.queue, not_ready(route))
        if any(one.waiting and not one.tally.ready for one in self.waitlists.values()):
            self.wanting.set()
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _resettle(self, queue: str, deployment: str) -> None:
        """Send what waits in a queue that vanished elsewhere, or say why that cannot be.

        Those who asked for a version get that version or an error: another one's answer is not theirs.
        """
        route = self.table.routes.get(deployment)
        chosen: dict[str, list[Ticket]] = {}
        backlogs = self.waitlists[queue].backlogs
        for ticket in self._tickets.values():
            if ticket.backlog in backlogs:
                chosen.setdefault(ticket.selector, []).append(ticket)
        others = chosen.pop("", [])
        for selector, tickets in chosen.items():
            ids = {ticket.header.id for ticket in tickets}
            try:
                successor = self.table.find(deployment).named(selector).queue
            except PenstockError as error:
                self._sender.fail(queue, error, ids)
                continue
            self._move(tickets, queue, successor)
            self._sender.reroute(queue, successor, ids)
        try:
            if route is None:
                raise NotFound(
                    f"Deployment {deployment} was deleted before this request was answered.",
                    reason=Reason.DEPLOYMENT_NOT_FOUND,
                    metadata={"deployment": deployment},
                )
            successor = route.weighted(self._draw()).queue
            self._move(others, queue, successor)
            self._sender.reroute(queue, successor)
        except PenstockError as error:
            self._sender.fail(queue, error)

    def _move(self, tickets: list[Ticket], queue: str, successor: str) -> None:
        """Count requests where they are sent now."""
        old, new = self.waitlists[queue].backlogs, self.waitlists[successor]
        for ticket in tickets:
            ticket.backlog.leave()
            ticket.backlog = new.backlogs[old.index(ticket.backlog)]
            ticket.backlog.join()
            ticket.reckoned = 0.0
            ticket.tally = new.tally
            new.tally.arrived += 1

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
        lane = self.lanes[name]
        target = route.named(selector) if selector else route.weighted(lane.draw())
        if not target.ready:
            if not route.may_wait:
                lane.refuse(lanes.NOT_READY)
                self.waitlists[target.queue].tally.arrived += 1
                raise not_ready(route)
            self.wanting.set()
        return lane, target

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
            ResourceExhausted: Too much is unanswered already, or the deadline would not be met.
            DeadlineExceeded: The deadline has passed.
            Unavailable: Nothing would answer, or the gateway is shutting down.
        """
        lane, target = self.resolve(name, selector)
        waitlist = self.waitlists[target.queue]
        backlog, tally = waitlist.backlogs[priority], waitlist.tally
        look = None
        if lane.shelf is not None:
            look = lane.shelf.look(target, name, format, json_length, payload, priority)
        if look is None or look.computes:
            tally.arrived += 1
        else:
            tally = NOBODY
        if lane.in_flight >= lane.limits[priority] and (look is None or look.reply is None):
            lane.refuse(lanes.QUEUE_FULL)
            tally.overloaded += 1
            raise full(lane, backlog)
        if self.draining:
            lane.refuse(lanes.SHUTTING_DOWN)
            raise Unavailable(
                "This gateway is shutting down. Retry: another one answers.",
                reason=Reason.SHUTTING_DOWN,
                retry_after_seconds=0.1,
            )
        left = deadline - time.time()
        reckoned = 0.0
        if look is None or look.computes:
            # What is late already is the sender's to refuse; replicas that come back have no pace yet.
            reckoned = backlog.enter(left if left > 0.0 and target.ready else math.inf)
        else:
            backlog = NOWHERE
        if reckoned < 0.0:
            lane.refuse(lanes.TOO_LATE)
            tally.overloaded += 1
            raise too_late(lane, backlog, left)
        if lane.shadows and tally is not NOBODY:
            done = self.mirror.watch(
                lane.shadows, target, name, payload, format, json_length, deadline - time.time(), done
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
        ticket = Ticket(self, lane, header, done, backlog, reckoned, tally)
        try:
            if look is None:
                self._sender.submit_call(target.queue, header, payload, priority, ticket.end)
            else:
                look.begin(ticket, target.queue, payload, priority)
        except BaseException as error:
            backlog.leave()
            if isinstance(error, ResourceExhausted):
                tally.err(error, 0.0, left)
            raise
        ticket.span = span
        if selector or "@" in name:
            ticket.selector = split_name(name, selector)[1]
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

    def forget(self, ticket: Ticket, code: int, took: float) -> None:
        """Count the end of a request; called by its ticket."""
        lane = ticket.lane
        lane.in_flight -= 1
        lane.count(code, took)
        self._tickets.pop(ticket.header.id, None)
        if ticket.span is not None:
            ticket.span.end(code)

    def cancel(self, ticket: Ticket) -> None:
        """Take a request off its queue because the caller went away; nothing if it is answered."""
        if ticket.flight is None:
            self._sender.cancel(ticket.header.id)
        else:
            ticket.flight.leave(ticket)


def full(lane: Lane, backlog: Backlog) -> ResourceExhausted:
    """Return the error of a deployment with too many unanswered requests."""
    return ResourceExhausted(
        f"Deployment {lane.route.deployment} has {lane.in_flight} unanswered requests at this gateway, "
        f"the most it takes at this priority. Retry later, or add replicas.",
        metadata={"deployment": lane.route.deployment},
        retry_after_seconds=max(backlog.expected_wait or _RETRY_SECONDS, _MIN_RETRY_SECONDS),
    )


def too_late(lane: Lane, backlog: Backlog, left: float) -> ResourceExhausted:
    """Return the error of a request that would be answered after its deadline.

    The time to retry after is the time in which all that waits now is answered, at the pace measured.
    """
    wait = backlog.expected_wait
    return ResourceExhausted(
        f"Deployment {lane.route.deployment} would answer in {wait:.3g} s, and this request allows "
        f"{left:.3g} s: {backlog.waiting + backlog.others} are ahead of it. Retry later, allow more time, "
        "or add replicas.",
        metadata={"deployment": lane.route.deployment, "expected_wait_ms": str(round(wait * 1000))},
        retry_after_seconds=max(wait, _MIN_RETRY_SECONDS),
    )
