"""What is counted of each version, and when the scheduler is told."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, ReplyHeader
from penstock_gateway.domain.traffic import LATENCY_BUCKETS, Tallies, Tally
from penstock_gateway.hotpath.dispatch import Dispatcher, Outcome, Ticket
from penstock_gateway.usecases import traffic
from penstock_gateway.usecases.traffic import Reported, TrafficReport
from penstock_kit.errors import (
    Cancelled,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PenstockError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from penstock_kit.queue.memory import MemoryBroker, MemorySender
from penstock_kit.queue.messages import Reply
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import CachePolicy, Route, Table, Target

PATIENCE_SECONDS = 10.0


def table(*versions: int, ready: int = 1, depth: int = 9, cache: CachePolicy | None = None) -> Table:
    targets = tuple(Target("models/m", v, 50, f"m:{v}:abc", ready, Description()) for v in versions)
    return Table(1, {"m": Route("m", targets, depth, may_wait=True, cache=cache)})


@pytest.fixture
async def dispatcher() -> AsyncIterator[Dispatcher]:
    sender = MemorySender(MemoryBroker(), "gateway-test")
    await sender.start()
    yield Dispatcher(sender, draw=lambda: 0.0)
    await sender.stop()


def ask(dispatcher: Dispatcher, selector: str = "", payload: bytes = b"") -> Ticket:
    outcomes: list[Outcome] = []
    return dispatcher.begin(
        "m", selector, payload, outcomes.append, deadline=time.time() + 30, format=PAYLOAD_FORMAT_OIP_GRPC
    )


def answer(ticket: Ticket, code: int = 0, reason: Reason = Reason.UNSPECIFIED) -> None:
    ticket.end(Reply(ReplyHeader(id=ticket.header.id, code=code, reason=int(reason)), b""))


def counts(dispatcher: Dispatcher, version: int = 1) -> tuple[int, int, int, int]:
    tally = dispatcher.tallies.of(("m", "models/m", version))
    return tally.arrived, tally.succeeded, tally.failed, tally.overloaded


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0.0, 0),
        (0.000_118, 0),
        (0.000_119, 1),
        (0.000_199, 3),
        (0.000_2, 4),
        (0.000_21, 4),
        (5.4, 62),
        (5.6, 63),
        (3600.0, 63),
    ],
)
def test_a_latency_falls_into_the_bucket_that_the_contract_names(seconds: float, bucket: int) -> None:
    tally = Tally("m", "models/m", 1)
    tally.succeed(seconds)
    assert tally.latencies[bucket] == 1
    assert sum(tally.latencies) == 1
    assert len(tally.latencies) == LATENCY_BUCKETS


@pytest.mark.parametrize(
    ("error", "failed", "overloaded"),
    [
        (Internal("x", reason=Reason.MODEL_ERROR), 1, 0),
        (Internal("x", reason=Reason.POISON_REQUEST), 1, 0),
        (FailedPrecondition("x", reason=Reason.MANIFEST_MISMATCH), 1, 0),
        (Unavailable("x", reason=Reason.DEPENDENCY_UNAVAILABLE), 1, 0),
        (DeadlineExceeded(), 1, 0),
        (ResourceExhausted("x", reason=Reason.OVERLOADED), 0, 1),
        (ResourceExhausted("x", reason=Reason.PAYLOAD_TOO_LARGE), 0, 0),
        (InvalidArgument("x", reason=Reason.INVALID_TENSOR), 0, 0),
        (NotFound("x"), 0, 0),
        (Cancelled("x"), 0, 0),
        (asyncio.CancelledError(), 0, 0),
        (Unavailable("x", reason=Reason.NOT_READY), 0, 0),
        (Unavailable("x", reason=Reason.SHUTTING_DOWN), 0, 0),
    ],
)
def test_errors_are_counted_by_whose_doing_they_are(
    error: BaseException, failed: int, overloaded: int
) -> None:
    tally = Tally("m", "models/m", 1)
    tally.ready = True
    tally.err(error, 0.01, 1.0)
    assert (tally.failed, tally.overloaded, tally.succeeded) == (failed, overloaded, 0)
    assert sum(tally.latencies) == failed


def test_who_is_late_with_a_queue_or_no_replica_ahead_is_no_failure_of_the_version() -> None:
    tally = Tally("m", "models/m", 1)
    tally.err(DeadlineExceeded(), 0.25, 0.0)
    tally.ready = True
    tally.err(DeadlineExceeded(), 0.25, 0.0, reckoned=0.2)
    assert (tally.failed, tally.overloaded) == (0, 2)
    tally.err(DeadlineExceeded(), 0.25, 0.0)
    assert tally.failed == 1, "a model that hangs"


def test_who_leaves_when_the_time_is_over_was_late_and_who_leaves_before_says_nothing() -> None:
    tally = Tally("m", "models/m", 1)
    tally.ready = True
    tally.err(asyncio.CancelledError(), took=0.5, left=0.5)
    assert tally.failed == 0
    tally.err(asyncio.CancelledError(), took=0.998, left=0.002)
    assert tally.failed == 1


def test_a_version_that_comes_back_counts_on_and_the_longest_gone_are_forgotten() -> None:
    tallies = Tallies(limit=2)
    keys = [("m", "models/m", version) for version in range(1, 5)]
    tallies.follow(dict.fromkeys(keys, True))
    first, last = tallies.of(keys[0]), tallies.of(keys[3])
    for gone in range(1, 5):
        tallies.follow(dict.fromkeys(keys[gone:], True))
    assert len(tallies) == 2
    assert not last.ready
    tallies.follow({keys[0]: False, keys[3]: True})
    assert tallies.of(keys[3]) is last
    assert tallies.of(keys[0]) is not first
    assert last.ready


async def test_each_version_has_its_own_counts(dispatcher: Dispatcher) -> None:
    dispatcher.update(table(1, 2))
    answer(ask(dispatcher))
    answer(ask(dispatcher, "2"), int(Code.INTERNAL), Reason.MODEL_ERROR)
    dispatcher.cancel(ask(dispatcher, "2"))
    assert counts(dispatcher, 1) == (1, 1, 0, 0)
    assert counts(dispatcher, 2) == (2, 0, 1, 0)


async def test_who_is_refused_for_want_of_room_has_arrived_and_counts_as_overload(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.update(table(1, depth=1))
    ask(dispatcher)
    with pytest.raises(ResourceExhausted):
        ask(dispatcher)
    assert counts(dispatcher) == (2, 0, 0, 1)


async def test_what_is_answered_without_computing_is_not_counted(dispatcher: Dispatcher) -> None:
    dispatcher.update(table(1, cache=CachePolicy(coalesce=True)))
    leader, follower = ask(dispatcher), ask(dispatcher)
    assert counts(dispatcher) == (1, 0, 0, 0)
    dispatcher.cancel(leader)
    assert counts(dispatcher) == (1, 0, 0, 0)
    answer(follower)
    assert counts(dispatcher) == (1, 1, 0, 0), "the one who stayed ends what the other one began"


async def test_requests_that_move_count_where_they_are_answered(dispatcher: Dispatcher) -> None:
    dispatcher.update(table(1))
    ticket = ask(dispatcher)
    dispatcher.update(table(2))
    answer(ticket)
    assert counts(dispatcher, 2) == (1, 1, 0, 0)
    (gone,) = dispatcher.tallies.gone
    assert (gone.version, gone.arrived, gone.succeeded) == (1, 1, 0)


class Scheduler:
    """Takes reports, or does not."""

    def __init__(self) -> None:
        self.reports: list[list[Reported]] = []
        self.refuses = False
        self.asked = 0
        self._heard = asyncio.Event()

    async def report(self, gateway: str, uptime_seconds: float, targets: Sequence[Reported]) -> None:
        self.asked += 1
        self._heard.set()
        if self.refuses:
            raise Unavailable("Another scheduler leads.")
        self.reports.append(list(targets))

    async def until(self, asked: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.asked < asked:
                await self._heard.wait()
                self._heard.clear()


async def test_a_report_tells_of_every_version_also_those_without_change(dispatcher: Dispatcher) -> None:
    scheduler = Scheduler()
    report = TrafficReport("g", dispatcher, scheduler)
    dispatcher.update(table(1, 2))
    ask(dispatcher)
    assert await report.report()
    dispatcher.update(table(1, ready=0))
    assert await report.report()
    told = [[(r.tally.version, r.waiting, r.waiting_for_replica) for r in one] for one in scheduler.reports]
    assert told == [[(1, 1, 0), (2, 0, 0)], [(1, 1, 1), (2, 0, 0)]]


async def test_a_report_is_never_longer_than_a_scheduler_takes(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "MAX_TARGETS", 3)
    report = TrafficReport("g", dispatcher, Scheduler())
    dispatcher.update(table(1, 2))
    dispatcher.update(table(3, 4))
    assert [one.tally.version for one in report.targets()] == [3, 4, 2]
    dispatcher.update(table(5, 6, 7, 8))
    assert len(report.targets()) == 3


async def test_a_request_that_needs_a_replica_is_told_of_until_a_scheduler_has_heard(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "REPORT_SECONDS", 3600.0)
    monkeypatch.setattr(traffic, "URGENT_SECONDS", 0.001)
    scheduler = Scheduler()
    report = TrafficReport("g", dispatcher, scheduler)
    dispatcher.update(table(1, ready=0))
    running = asyncio.ensure_future(report.run())
    try:
        await scheduler.until(1)
        scheduler.refuses = True
        ask(dispatcher)
        await scheduler.until(4)
        assert len(scheduler.reports) == 1
        scheduler.refuses = False
        await scheduler.until(scheduler.asked + 1)
        ((one,),) = scheduler.reports[1:]
        assert (one.tally.arrived, one.waiting, one.waiting_for_replica) == (1, 1, 1)
        assert not dispatcher.wanting.is_set()
    finally:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_requests_whose_replicas_vanish_ask_for_one(dispatcher: Dispatcher) -> None:
    dispatcher.update(table(1))
    ask(dispatcher)
    assert not dispatcher.wanting.is_set()
    dispatcher.update(table(1, ready=0))
    assert dispatcher.wanting.is_set()


def test_a_refusal_says_why_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler()
    scheduler.refuses = True

    async def twice() -> None:
        sender = MemorySender(MemoryBroker(), "gateway-test")
        report = TrafficReport("g", Dispatcher(sender), scheduler)
        assert not await report.report()
        assert not await report.report()

    asyncio.run(twice())
    assert caplog.text.count("Another scheduler leads.") == 1


def test_every_error_of_the_tree_has_its_place() -> None:
    for code in Code:
        tally = Tally()
        error = PenstockError("x")
        error.code = code
        tally.err(error, 0.0, 1.0)
        assert tally.failed + tally.overloaded <= 1
