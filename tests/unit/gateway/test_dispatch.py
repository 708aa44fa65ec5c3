"""Admission, limits, re-routing and counting, with the queue's own in-memory sender."""

import asyncio
import time
from typing import Any

import pytest

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, ReplyHeader
from penstock_gateway.hotpath.bounds import bounds
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.lanes import BUCKETS
from penstock_kit.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from penstock_kit.queue.memory import MemoryBroker, MemorySender
from penstock_kit.queue.messages import Reply
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import Route, Table, Target


def table(
    *, version: int = 1, ready: int = 1, depth: int = 2, may_wait: bool = False, generation: int = 1
) -> Table:
    target = Target("models/m", version, 100, f"m:{version}:abc", ready, Description())
    return Table(generation, {"m": Route("m", (target,), depth, "it starts", may_wait)})


@pytest.fixture
async def sender() -> Any:
    made = MemorySender(MemoryBroker(), "gateway-test")
    await made.start()
    yield made
    await made.stop()


class Asked:
    """One request, and what became of it."""

    def __init__(self, dispatcher: Dispatcher, name: str = "m", selector: str = "") -> None:
        self.outcomes: list[Reply | BaseException] = []
        self.ticket = dispatcher.begin(
            name,
            selector,
            b"payload",
            self.outcomes.append,
            deadline=time.time() + 30,
            format=PAYLOAD_FORMAT_OIP_GRPC,
        )

    @property
    def error(self) -> BaseException:
        (outcome,) = self.outcomes
        assert isinstance(outcome, BaseException)
        return outcome


def submit(dispatcher: Dispatcher, name: str = "m", selector: str = "") -> Asked:
    return Asked(dispatcher, name, selector)


def answer(asked: Asked, code: int = 0) -> None:
    asked.ticket.end(Reply(ReplyHeader(id=asked.ticket.header.id, code=code, message="so"), b"answer"))


async def test_no_more_than_the_queues_depth_is_accepted(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table(depth=2))
    tickets = [submit(dispatcher), submit(dispatcher)]
    with pytest.raises(ResourceExhausted) as caught:
        submit(dispatcher)
    assert caught.value.retry_after_seconds
    dispatcher.cancel(tickets.pop().ticket)
    submit(dispatcher)


async def test_what_is_cancelled_leaves_the_queue(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    asked = submit(dispatcher)
    assert (sender.unanswered("m:1:abc"), dispatcher.in_flight) == (1, 1)
    dispatcher.cancel(asked.ticket)
    assert (sender.unanswered("m:1:abc"), dispatcher.in_flight) == (0, 0)
    assert isinstance(asked.error, asyncio.CancelledError)
    dispatcher.cancel(asked.ticket)
    assert len(asked.outcomes) == 1


async def test_who_stops_waiting_takes_the_request_off_its_queue(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    future = dispatcher.submit("m", "", b"", deadline=time.time() + 30, format=PAYLOAD_FORMAT_OIP_GRPC)
    assert dispatcher.in_flight == 1
    future.cancel()
    await asyncio.sleep(0)
    assert (sender.unanswered(), dispatcher.in_flight) == (0, 0)


async def test_a_restarting_deployment_takes_requests_and_a_starting_one_does_not(
    sender: MemorySender,
) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table(ready=0, may_wait=True))
    submit(dispatcher)
    dispatcher.update(table(ready=0, may_wait=False))
    with pytest.raises(Unavailable, match="it starts") as caught:
        submit(dispatcher)
    assert caught.value.reason is Reason.NOT_READY


async def test_requests_move_with_their_name_to_another_queue(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    submit(dispatcher)
    dispatcher.update(table(version=2, generation=2))
    assert (sender.unanswered("m:1:abc"), sender.unanswered("m:2:abc")) == (0, 1)


async def test_requests_of_a_deleted_deployment_are_answered_at_once_and_no_new_ones_taken(
    sender: MemorySender,
) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    waiting = submit(dispatcher)
    dispatcher.update(Table(2))
    assert isinstance(waiting.error, NotFound)
    assert waiting.error.reason is Reason.DEPLOYMENT_NOT_FOUND
    with pytest.raises(NotFound):
        submit(dispatcher)
    dispatcher.update(Table(3))
    assert (dispatcher.lanes, dispatcher.in_flight, sender.unanswered()) == ({}, 0, 0)


async def test_requests_of_a_deployment_without_targets_are_told_why(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    waiting = submit(dispatcher)
    dispatcher.update(Table(2, {"m": Route("m", (), 2, "it is being deleted")}))
    assert isinstance(waiting.error, Unavailable)
    assert "it is being deleted" in waiting.error.message


async def test_requests_that_wait_when_a_deployment_fails_are_told_at_once(sender: MemorySender) -> None:
    def state(ready: int, *, failed: bool) -> Table:
        target = Target("models/m", 1, 100, "m:1:abc", ready, Description())
        return Table(1, {"m": Route("m", (target,), 2, "no replica answers", not failed, failed=failed)})

    dispatcher = Dispatcher(sender)
    dispatcher.update(state(1, failed=False))
    waiting = submit(dispatcher)
    dispatcher.update(state(0, failed=False))
    assert not waiting.outcomes, "its replicas may come back"
    dispatcher.update(state(0, failed=True))
    assert isinstance(waiting.error, Unavailable)
    assert waiting.error.reason is Reason.NOT_READY
    assert "no replica answers" in waiting.error.message
    assert (dispatcher.in_flight, sender.unanswered()) == (0, 0)


async def test_who_asked_for_a_version_is_never_answered_by_another(sender: MemorySender) -> None:
    def target(version: int, *aliases: str) -> Target:
        queue = f"m:{version}:abc"
        return Target("models/m", version, 100, queue, 1, Description(), frozenset(aliases))

    dispatcher = Dispatcher(sender)
    dispatcher.update(Table(1, {"m": Route("m", (target(1, "champion", "old"),), 9)}))
    anyone = submit(dispatcher)
    first, old = submit(dispatcher, "m", "1"), submit(dispatcher, "m", "old")
    champion = submit(dispatcher, "m@champion")
    dispatcher.update(Table(2, {"m": Route("m", (target(2, "champion"),), 9)}))
    assert sender.unanswered("m:2:abc") == 2
    assert not anyone.outcomes
    assert not champion.outcomes
    assert "does not serve version 1; it serves 2" in str(first.error)
    assert "'old'" in str(old.error)
    # And once more: the one who asked for the alias is still known by it.
    dispatcher.update(Table(3, {"m": Route("m", (target(3),), 9)}))
    assert "'champion'" in str(champion.error)
    assert sender.unanswered("m:3:abc") == 1


@pytest.mark.parametrize("percent", [1, 5, 25, 50])
async def test_a_small_weight_gets_its_part_of_every_short_window(sender: MemorySender, percent: int) -> None:
    weights = {1: 100 - percent, 2: percent}
    targets = tuple(Target("models/m", v, w, f"m:{v}:abc", 1, Description()) for v, w in weights.items())
    dispatcher = Dispatcher(sender)
    dispatcher.update(Table(1, {"m": Route("m", targets, 4096)}))
    chosen = [dispatcher.resolve("m", "")[1].version == 2 for _ in range(2000)]
    window = 400
    counts = [sum(chosen[start : start + window]) for start in range(len(chosen) - window)]
    expected = window * percent / 100
    assert expected - 3 <= min(counts) <= max(counts) <= expected + 3


async def test_changed_weights_move_nobody_who_waits(sender: MemorySender) -> None:
    def weighing(first: int, second: int) -> Table:
        weights = {1: first, 2: second}
        targets = tuple(Target("models/m", v, w, f"m:{v}:abc", 1, Description()) for v, w in weights.items())
        return Table(1, {"m": Route("m", targets, 4096)})

    dispatcher = Dispatcher(sender)
    dispatcher.update(weighing(50, 50))
    for _ in range(10):
        submit(dispatcher)
    before = [sender.unanswered(f"m:{v}:abc") for v in (1, 2)]
    assert min(before) >= 3
    dispatcher.update(weighing(0, 100))
    assert [sender.unanswered(f"m:{v}:abc") for v in (1, 2)] == before


async def test_a_draining_gateway_takes_nothing_new(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    dispatcher.draining = True
    with pytest.raises(Unavailable) as caught:
        submit(dispatcher)
    assert caught.value.reason is Reason.SHUTTING_DOWN
    assert dispatcher.problem


async def test_waiters_hear_of_every_table(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    changed = dispatcher.changed
    dispatcher.update(table())
    assert changed.is_set()
    assert not dispatcher.changed.is_set()


async def test_answers_are_counted_by_code_and_duration(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    answer(submit(dispatcher))
    late = submit(dispatcher)
    answer(late, 4)
    assert isinstance(late.error, DeadlineExceeded)
    lane = dispatcher.lanes["m"]
    assert lane.codes == {0: 1, 4: 1}
    assert sum(lane.buckets) == 2
    assert len(lane.buckets) == len(BUCKETS) + 1


async def test_a_deployment_that_is_gone_is_forgotten(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender)
    dispatcher.update(table())
    dispatcher.update(Table(2))
    assert dispatcher.lanes == {}


def test_the_timeout_parameter_only_shortens() -> None:
    now = time.time()
    assert bounds({"timeout": 1_000_000}, now + 60)[0] < now + 2
    assert bounds({"timeout": 90_000_000}, now + 60)[0] == now + 60
    assert bounds({"timeout": 0}, now + 60)[0] == now + 60


@pytest.mark.parametrize(("rank", "stream"), [(0, 1), (1, 0), (2, 1), (3, 2), ("1", 0), (1.0, 0)])
def test_the_priority_parameter_chooses_the_stream(rank: int | str | float, stream: int) -> None:
    assert bounds({"priority": rank}, 0.0)[1] == stream


@pytest.mark.parametrize("wrong", [-1, True, "soon", 0.5])
@pytest.mark.parametrize("name", ["priority", "timeout"])
def test_a_parameter_that_is_no_count_is_refused(name: str, wrong: int | str | float) -> None:
    with pytest.raises(InvalidArgument, match=name):
        bounds({name: wrong}, 0.0)


async def test_a_traced_inference_continues_its_callers_trace(sender: MemorySender) -> None:
    dispatcher = Dispatcher(sender, traced=True)
    dispatcher.update(table())
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    ended: list[object] = []
    ticket = dispatcher.begin(
        "m",
        "",
        b"",
        ended.append,
        deadline=time.time() + 30,
        format=PAYLOAD_FORMAT_OIP_GRPC,
        traceparent=f"00-{trace_id}-b7ad6b7169203331-01",
    )
    assert ticket.header.traceparent.split("-")[1] == trace_id
    dispatcher.cancel(ticket)
    assert ended
