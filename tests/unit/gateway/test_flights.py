"""Equal requests that are computed once, with the queue's own in-memory sender."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, ReplyHeader, RequestHeader
from penstock_gateway.domain.admission import Backlog
from penstock_gateway.domain.traffic import Tally
from penstock_gateway.hotpath.cache import ResponseCache
from penstock_gateway.hotpath.flights import Leavable, Outcome
from penstock_kit.errors import Code, DeadlineExceeded, ResourceExhausted, Unavailable
from penstock_kit.queue.memory import MemoryBroker, MemoryReader, MemorySender
from penstock_kit.queue.messages import Reply, Request
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import CachePolicy, Route, Table, Target

QUEUE = "m:1:abc"
TARGET = Target("models/m", 1, 100, QUEUE, 1, Description(), digest="sha256:abc")
BOTH = CachePolicy(keep=True, coalesce=True)


def table(policy: CachePolicy | None, *queues: str) -> Table:
    targets = tuple(Target("models/m", 1, 100, queue, 1, Description()) for queue in queues or (QUEUE,))
    return Table(1, {"m": Route("m", targets, 100, cache=policy)})


BACKLOG = Backlog()


class Caller:
    """A ticket: takes one outcome."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.header = RequestHeader(
            deadline_unix_micros=int((time.time() + seconds) * 1e6), format=PAYLOAD_FORMAT_OIP_GRPC
        )
        self.flight: Leavable | None = None
        self.backlog = BACKLOG
        self.backlog.join()
        self.reckoned = 0.0
        self.tally = Tally()
        self.outcomes: list[Outcome] = []
        self._ended = asyncio.Event()

    async def wait(self) -> None:
        async with asyncio.timeout(10):
            await self._ended.wait()

    def end(self, outcome: Outcome) -> None:
        assert self.flight is None
        self.outcomes.append(outcome)
        self._ended.set()

    @property
    def outcome(self) -> Outcome:
        (only,) = self.outcomes
        return only

    @property
    def answer(self) -> oip.ModelInferResponse:
        assert isinstance(self.outcome, Reply), self.outcome
        assert self.outcome.header.code == 0
        return oip.ModelInferResponse.FromString(self.outcome.payload)


class Bench:
    """One deployment's cache on a queue whose replica is the test."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.sender = MemorySender(self.broker, "gateway-test")
        self.cache = ResponseCache(self.sender)
        self.reader = MemoryReader(self.broker, QUEUE, "replica.1")

    def ask(self, text: str = "x", request_id: str = "", *, priority: int = 1, seconds: float = 30) -> Caller:
        caller = Caller(seconds)
        payload = oip.ModelInferRequest(model_name="m", id=request_id)
        payload.raw_input_contents.append(text.encode())
        data = payload.SerializeToString()
        look = self.cache.shelves["m"].look(TARGET, "m", PAYLOAD_FORMAT_OIP_GRPC, 0, data, priority)
        assert look is not None
        look.begin(caller, QUEUE, data, priority)
        return caller

    def computed(self) -> list[Request]:
        return self.reader.read(100, 0)

    async def reply(self, request: Request, code: int = 0) -> None:
        asked = oip.ModelInferRequest.FromString(request.payload)
        answer = oip.ModelInferResponse(model_name="m", id=asked.id)
        answer.raw_output_contents.extend(asked.raw_input_contents)
        header = ReplyHeader(code=code, message="so it is")
        self.reader.finish([(request, header, b"" if code else answer.SerializeToString())])
        await asyncio.sleep(0)  # the broker calls into the loop
        await asyncio.sleep(0)

    async def answer(self) -> int:
        """Answer all that is to be computed; return how many that were."""
        requests = self.computed()
        for request in requests:
            await self.reply(request)
        return len(requests)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.sender.start()
    made.cache.follow(table(BOTH))
    yield made
    await made.sender.stop()


async def test_equal_requests_are_computed_once_and_each_gets_its_own_id(bench: Bench) -> None:
    callers = [bench.ask("x", name) for name in ("first", "", "third")]
    assert await bench.answer() == 1
    assert [caller.answer.id for caller in callers] == ["first", "", "third"]
    assert {caller.answer.raw_output_contents[0] for caller in callers} == {b"x"}
    later = bench.ask("x", "fourth")
    assert not later.outcomes  # not before its caller has got hold of the ticket
    await asyncio.sleep(0)
    assert later.answer.id == "fourth"
    assert b"first" not in later.outcome.payload  # type: ignore[union-attr]
    tally = bench.cache.tallies()[QUEUE]
    assert (tally.hits, tally.joined, tally.misses) == (1, 2, 1)


async def test_different_requests_are_computed_each(bench: Bench) -> None:
    callers = [bench.ask(text) for text in "abc"]
    assert await bench.answer() == 3
    assert [caller.answer.raw_output_contents[0] for caller in callers] == [b"a", b"b", b"c"]


async def test_without_coalescing_each_is_computed_until_one_is_answered(bench: Bench) -> None:
    bench.cache.follow(table(CachePolicy(keep=True)))
    callers = [bench.ask(), bench.ask()]
    assert await bench.answer() == 2
    callers.append(bench.ask())
    await asyncio.sleep(0)
    assert await bench.answer() == 0
    assert all(caller.answer for caller in callers)


async def test_without_keeping_only_what_comes_at_once_is_shared(bench: Bench) -> None:
    bench.cache.follow(table(CachePolicy(coalesce=True)))
    callers = [bench.ask("x", "a"), bench.ask("x", "b")]
    assert await bench.answer() == 1
    callers.append(bench.ask("x", "c"))
    assert await bench.answer() == 1
    assert [caller.answer.id for caller in callers] == ["a", "b", "c"]
    assert (bench.cache.bytes, len(bench.cache.shelves["m"])) == (0, 0)


async def test_who_began_may_leave_and_the_others_are_answered(bench: Bench) -> None:
    first, second, third = (bench.ask("x", name) for name in ("first", "second", "third"))
    assert first.flight is not None
    first.flight.leave(first)
    assert isinstance(first.outcome, asyncio.CancelledError)
    assert await bench.answer() == 1
    assert (second.answer.id, third.answer.id) == ("second", "third")
    assert b"first" not in second.outcome.payload  # type: ignore[union-attr]
    assert len(first.outcomes) == 1


async def test_one_who_is_left_alone_gets_no_other_ones_id(bench: Bench) -> None:
    bench.cache.follow(table(CachePolicy(coalesce=True)))
    first, second = bench.ask("x", "first"), bench.ask("x")
    assert first.flight is not None
    first.flight.leave(first)
    await bench.answer()
    assert second.answer.id == ""


async def test_when_the_last_one_leaves_nothing_is_computed(bench: Bench) -> None:
    callers = [bench.ask(), bench.ask()]
    for caller in callers:
        assert caller.flight is not None
        caller.flight.leave(caller)
    assert bench.computed() == []
    assert bench.sender.unanswered() == 0
    assert not bench.cache.flights
    bench.ask()
    assert await bench.answer() == 1


async def test_who_is_answered_out_of_the_cache_may_still_leave(bench: Bench) -> None:
    bench.ask()
    await bench.answer()
    caller = bench.ask()
    assert caller.flight is not None
    caller.flight.leave(caller)
    await asyncio.sleep(0)
    assert isinstance(caller.outcome, asyncio.CancelledError)


async def test_a_deadline_ends_only_whose_it_is_and_the_rest_are_computed_for(bench: Bench) -> None:
    first = bench.ask("x", "first", seconds=0.05)
    second, third = bench.ask("x", "second"), bench.ask("x", "third", seconds=60)
    (late,) = bench.computed()
    await first.wait()
    assert isinstance(first.outcome, DeadlineExceeded)
    assert not second.outcomes
    (again,) = bench.computed()
    assert again.header.deadline_unix_micros == third.header.deadline_unix_micros
    await bench.reply(late)  # nobody waits for the first run any more
    assert not second.outcomes
    await bench.reply(again)
    assert (second.answer.id, third.answer.id) == ("second", "third")


async def test_a_replica_that_finds_the_request_late_ends_nobody_with_more_time(bench: Bench) -> None:
    first, second = bench.ask(seconds=20), bench.ask(seconds=30)
    (late,) = bench.computed()
    await bench.reply(late, int(Code.DEADLINE_EXCEEDED))
    assert isinstance(first.outcome, Reply)
    assert first.outcome.header.code == Code.DEADLINE_EXCEEDED
    assert await bench.answer() == 1
    assert second.answer


async def test_one_with_less_time_than_the_computation_has_is_not_kept_waiting(bench: Bench) -> None:
    first, hurried = bench.ask("x", "first"), bench.ask("x", "hurried", seconds=0.05)
    await hurried.wait()
    assert isinstance(hurried.outcome, DeadlineExceeded)
    assert await bench.answer() == 1
    assert first.answer.id == "first"
    with pytest.raises(DeadlineExceeded):
        bench.ask("y", seconds=-1)
    bench.ask("z")
    with pytest.raises(DeadlineExceeded):
        bench.ask("z", seconds=-1)


async def test_after_a_second_start_short_deadlines_are_watched_too(bench: Bench) -> None:
    first = bench.ask(seconds=0.05)
    short, long = bench.ask(seconds=0.3), bench.ask(seconds=30)
    await short.wait()
    assert isinstance(first.outcome, DeadlineExceeded)
    assert isinstance(short.outcome, DeadlineExceeded)
    assert not long.outcomes
    *_, last = bench.computed()
    await bench.reply(last)
    assert long.answer


async def test_an_error_of_the_model_is_everybodys_and_is_not_kept(bench: Bench) -> None:
    callers = [bench.ask(), bench.ask()]
    (request,) = bench.computed()
    await bench.reply(request, int(Code.INVALID_ARGUMENT))
    for caller in callers:
        assert isinstance(caller.outcome, Reply)
        assert caller.outcome.header.code == Code.INVALID_ARGUMENT
    bench.ask()
    assert await bench.answer() == 1


async def test_more_urgent_requests_do_not_wait_for_less_urgent_ones(bench: Bench) -> None:
    low, high, other = bench.ask(priority=2), bench.ask(priority=0), bench.ask(priority=2)
    requests = bench.computed()
    assert len(requests) == 2
    for request in requests:
        await bench.reply(request)
    assert all(caller.answer for caller in (low, high, other))


async def test_when_the_version_goes_everybody_waits_alone_and_nothing_is_kept(bench: Bench) -> None:
    callers = [bench.ask("x", str(number)) for number in range(3)]
    (begun,) = bench.computed()
    bench.cache.follow(table(BOTH, "m:2:def"))
    assert bench.sender.unanswered(QUEUE) == 3
    assert not bench.cache.flights
    await bench.reply(begun)  # nobody waits for what was begun together
    assert await bench.answer() == 3
    assert [caller.answer.id for caller in callers] == ["0", "1", "2"]
    assert all(len(caller.outcomes) == 1 for caller in callers)
    assert bench.cache.bytes == 0


async def test_what_lands_after_the_cache_was_switched_off_is_given_and_not_kept(bench: Bench) -> None:
    callers = [bench.ask(), bench.ask()]
    bench.cache.follow(table(None))
    assert await bench.answer() == 1
    assert all(caller.answer for caller in callers)
    assert (bench.cache.bytes, bench.cache.shelves) == (0, {})


async def test_a_full_queue_refuses_who_begins_and_nobody_is_stranded(bench: Bench) -> None:
    await bench.sender.stop()
    bench.sender = bench.cache.sender = MemorySender(bench.broker, "gateway-test", max_unanswered=1)
    await bench.sender.start()
    first = bench.ask("x")
    with pytest.raises(ResourceExhausted):
        bench.ask("y")
    joined = bench.ask("x")
    assert await bench.answer() == 1
    assert first.answer == joined.answer
    bench.ask("y")
    assert await bench.answer() == 1


async def test_a_gateway_that_stops_answers_everybody(bench: Bench) -> None:
    callers = [bench.ask() for _ in range(3)]
    await bench.sender.stop()
    assert all(isinstance(caller.outcome, Unavailable) for caller in callers)


async def test_very_many_are_answered_in_turns(bench: Bench) -> None:
    callers = [bench.ask("x", str(number)) for number in range(300)]
    (request,) = bench.computed()
    await bench.reply(request)
    assert 0 < sum(bool(caller.outcomes) for caller in callers) < 300
    leaving = next(caller for caller in callers if not caller.outcomes)
    assert leaving.flight is not None
    leaving.flight.leave(leaving)
    for _ in range(10):
        await asyncio.sleep(0)
    assert isinstance(leaving.outcome, asyncio.CancelledError)
    for number, caller in enumerate(callers):
        assert caller is leaving or caller.answer.id == str(number)
