"""Whatever happens to requests, their copies and routes, what is counted is what waits, and what came."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, ReplyHeader
from penstock_gateway.hotpath.dispatch import Dispatcher, Ticket
from penstock_kit.errors import PenstockError, Unavailable
from penstock_kit.queue.memory import MemoryBroker, MemoryReader, MemorySender
from penstock_kit.queue.messages import Reply
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import Route, Table, Target

NAMES = ("a", "b")
Outcome = Reply | BaseException


def queue(name: str, version: int) -> str:
    return f"{name}:{version}:abc"


def table(generation: int, versions: dict[str, list[int]], ready: int, mirrored: int = 0) -> Table:
    routes = {}
    for name, numbers in versions.items():
        targets = tuple(
            Target(
                f"models/{name}",
                n,
                50,
                queue(name, n),
                ready,
                Description(),
                frozenset({f"v{n}", "latest"}),
                mirror_percent=mirrored if n == 2 else 0,
            )
            for n in numbers
        )
        routes[name] = Route(name, targets, 32, "", may_wait=True)
    return Table(generation, routes)


@dataclass
class Asked:
    """A request, and what became of it."""

    outcomes: list[Outcome] = field(default_factory=list)
    ticket: Ticket | None = None


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("ask"),
            st.sampled_from(NAMES),
            st.sampled_from(["", "", "1", "2", "latest"]),
            st.integers(0, 2),
            st.sampled_from([-1.0, 0.2, 30.0]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(
            st.just("answer"), st.sampled_from(NAMES), st.integers(1, 2), st.sampled_from([0, 3, 4, 14])
        ),
        st.tuples(st.just("fail"), st.sampled_from(NAMES), st.integers(1, 2)),
        st.tuples(
            st.just("routes"),
            st.dictionaries(
                st.sampled_from(NAMES), st.lists(st.integers(1, 2), unique=True, max_size=2), max_size=2
            ),
            st.integers(0, 3),
            st.sampled_from([0, 50, 100]),
        ),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps)
def test_each_request_is_counted_in_the_queue_where_it_waits(steps: list[tuple[object, ...]]) -> None:
    asyncio.run(play(steps))


async def play(steps: list[tuple[object, ...]]) -> None:
    broker = MemoryBroker()
    sender = MemorySender(broker, "gateway-test")
    await sender.start()
    dispatcher = Dispatcher(sender)
    dispatcher.update(table(1, {name: [1, 2] for name in NAMES}, 1))
    asked: list[Asked] = []
    generation = 1
    for step in steps:
        match step:
            case ("ask", str(name), str(selector), int(priority), float(seconds)):
                one = Asked()
                try:
                    one.ticket = dispatcher.begin(
                        name,
                        selector,
                        b"",
                        one.outcomes.append,
                        deadline=time.time() + seconds,
                        format=PAYLOAD_FORMAT_OIP_GRPC,
                        priority=priority,
                    )
                except PenstockError:
                    continue
                asked.append(one)
            case ("cancel", int(number)) if asked:
                ticket = asked[number % len(asked)].ticket
                assert ticket is not None
                dispatcher.cancel(ticket)
            case ("answer", str(name), int(version), int(code)):
                reader = MemoryReader(broker, queue(name, version), "r.1")
                done = [(request, ReplyHeader(code=code), b"") for request in reader.read(4, 0)]
                reader.finish(done)
                await asyncio.sleep(0)
            case ("fail", str(name), int(version)):
                sender.fail(queue(name, version), Unavailable("gone"))
            case ("routes", dict(versions), int(ready), int(mirrored)):
                generation += 1
                dispatcher.update(table(generation, versions, ready, mirrored))
        check(dispatcher, sender)
    for one in asked:
        if one.ticket is not None:
            dispatcher.cancel(one.ticket)
    dispatcher.update(Table(generation + 1))
    assert (dispatcher.mirror.shadows, sender.unanswered()) == ({}, 0), "no copy is left behind"
    dispatcher.mirror.stop()
    check(dispatcher, sender)
    assert all(waitlist.waiting == 0 for waitlist in dispatcher.waitlists.values())
    assert all(len(one.outcomes) == 1 for one in asked)
    await sender.stop()


def check(dispatcher: Dispatcher, sender: MemorySender) -> None:
    assert set(dispatcher.waitlists) == dispatcher.table.queues()
    copies = Counter(
        {s.target.queue: len(s.in_flight) for shadows in dispatcher.mirror.shadows.values() for s in shadows}
    )
    for name, waitlist in dispatcher.waitlists.items():
        assert waitlist.waiting + copies[name] == sender.unanswered(name)
        assert all(backlog.waiting >= 0 for backlog in waitlist.backlogs)
    assert dispatcher.in_flight + copies.total() == sender.unanswered()
    assert dispatcher.mirror.held >= 0
    for tally in (*dispatcher.tallies.here, *dispatcher.tallies.gone):
        assert sum(tally.latencies) == tally.succeeded + tally.failed
        if tally.version != 2:  # of one that is never a shadow, whoever is answered has arrived
            assert tally.succeeded + tally.failed + tally.overloaded <= tally.arrived
    assert dispatcher.in_flight == sum(lane.in_flight for lane in dispatcher.lanes.values())
