"""Equal requests in the dispatcher: routing, places in the queue, limits, counting."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, ReplyHeader
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_kit.errors import ResourceExhausted, Unavailable
from penstock_kit.queue.memory import MemoryBroker, MemoryReader, MemorySender
from penstock_kit.queue.messages import Reply
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import CachePolicy, Route, Table, Target

BOTH = CachePolicy(keep=True, coalesce=True)
FIRST = "m:1:abc"


def table(version: int = 1, *, policy: CachePolicy | None = BOTH, depth: int = 9) -> Table:
    target = Target(
        "models/m", version, 100, f"m:{version}:abc", 1, Description(), frozenset({"champion"}), "sha256:a"
    )
    return Table(version, {"m": Route("m", (target,), depth, cache=policy)})


class Bench:
    """A dispatcher whose queue the test reads."""

    def __init__(self) -> None:
        broker = MemoryBroker()
        self.sender = MemorySender(broker, "gateway-test")
        self.dispatcher = Dispatcher(self.sender)
        self.reader = MemoryReader(broker, FIRST, "replica.1")

    async def answer(self) -> int:
        """Answer what is in the queue of version 1; return how much that was."""
        requests = self.reader.read(100, 0)
        for request in requests:
            reply = oip.ModelInferResponse(id=oip.ModelInferRequest.FromString(request.payload).id)
            self.reader.finish([(request, ReplyHeader(), reply.SerializeToString())])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return len(requests)


class Asked:
    """One request, and what became of it."""

    def __init__(self, dispatcher: Dispatcher, text: str = "x", *, selector: str = "") -> None:
        self.outcomes: list[Reply | BaseException] = []
        self.ticket = dispatcher.begin(
            "m",
            selector,
            oip.ModelInferRequest(model_name="m", raw_input_contents=[text.encode()]).SerializeToString(),
            self.outcomes.append,
            deadline=time.time() + 30,
            format=PAYLOAD_FORMAT_OIP_GRPC,
        )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.sender.start()
    made.dispatcher.update(table())
    yield made
    await made.sender.stop()


async def test_those_who_share_a_computation_part_when_its_version_goes(bench: Bench) -> None:
    dispatcher, sender = bench.dispatcher, bench.sender
    anyone, other = Asked(dispatcher), Asked(dispatcher)
    pinned, aliased = Asked(dispatcher, selector="1"), Asked(dispatcher, selector="champion")
    assert sender.unanswered(FIRST) == dispatcher.waitlists[FIRST].waiting == 1
    dispatcher.update(table(2))
    (error,) = pinned.outcomes
    assert "does not serve version 1; it serves 2" in str(error)
    assert sender.unanswered("m:2:abc") == dispatcher.waitlists["m:2:abc"].waiting == 3
    for asked in (anyone, other, aliased):
        assert not asked.outcomes
        dispatcher.cancel(asked.ticket)
        assert isinstance(asked.outcomes[0], asyncio.CancelledError)
    assert (dispatcher.in_flight, dispatcher.lanes["m"].in_flight, sender.unanswered()) == (0, 0, 0)
    assert dispatcher.waitlists["m:2:abc"].waiting == 0


async def test_the_place_in_the_queue_is_counted_once_whoever_leaves(bench: Bench) -> None:
    dispatcher = bench.dispatcher
    asked = [Asked(dispatcher) for _ in range(3)]
    for left, one in enumerate(asked):
        assert (dispatcher.waitlists[FIRST].waiting, bench.sender.unanswered()) == (1, 1)
        assert dispatcher.in_flight == 3 - left
        dispatcher.cancel(one.ticket)
        dispatcher.cancel(one.ticket)
        assert len(one.outcomes) == 1
    assert (dispatcher.waitlists[FIRST].waiting, bench.sender.unanswered()) == (0, 0)


async def test_a_full_deployment_gives_what_it_has_kept_and_lets_nobody_wait(bench: Bench) -> None:
    dispatcher = bench.dispatcher
    Asked(dispatcher, "known")
    assert await bench.answer() == 1
    dispatcher.update(table(depth=1))
    Asked(dispatcher, "slow")
    with pytest.raises(ResourceExhausted):
        Asked(dispatcher, "slow")
    known = Asked(dispatcher, "known")
    await asyncio.sleep(0)
    assert isinstance(known.outcomes[0], Reply)
    dispatcher.draining = True
    with pytest.raises(Unavailable):
        Asked(dispatcher, "known")
    assert dispatcher.lanes["m"].codes == {0: 2}


async def test_a_cache_comes_and_goes_with_its_deployments_policy(bench: Bench) -> None:
    dispatcher = bench.dispatcher
    Asked(dispatcher)
    await bench.answer()
    assert dispatcher.cache.bytes > 0
    dispatcher.update(table(policy=None))
    assert dispatcher.lanes["m"].shelf is None
    assert dispatcher.cache.bytes == 0
    Asked(dispatcher)
    assert await bench.answer() == 1
    dispatcher.update(table())
    Asked(dispatcher)
    assert await bench.answer() == 1
    dispatcher.update(Table(9))
    assert (dispatcher.lanes, dispatcher.cache.shelves) == ({}, {})


async def test_a_caller_who_stops_waiting_for_a_kept_answer_is_forgotten(bench: Bench) -> None:
    dispatcher = bench.dispatcher
    Asked(dispatcher)
    await bench.answer()
    kept = Asked(dispatcher)
    dispatcher.cancel(kept.ticket)
    await asyncio.sleep(0)
    assert isinstance(kept.outcomes[0], asyncio.CancelledError)
    assert (len(kept.outcomes), dispatcher.in_flight) == (1, 0)
