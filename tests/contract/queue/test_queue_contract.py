"""What both ends of the queue promise, on Redis and in memory alike."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from penstock.queue.v1.envelope_pb2 import ReplicaStatistics, ReplyHeader, RequestHeader
from penstock_kit.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from penstock_kit.queue.keys import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL
from penstock_kit.queue.messages import Reply, Request
from penstock_kit.queue.ports import Reader, Sender

QUEUE = "digits:1:0123456789ab"
OTHER = "digits:2:ba9876543210"


def header(seconds: float = 30.0, **fields: Any) -> RequestHeader:
    return RequestHeader(deadline_unix_micros=int((time.time() + seconds) * 1e6), **fields)


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- what it waits for is in other threads and processes
            await asyncio.sleep(0.005)


async def read(reader: Reader, count: int, at_most: int = 32) -> list[Request]:
    """Read until ``count`` requests have come."""
    found: list[Request] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += await asyncio.to_thread(reader.read, min(at_most, count - len(found)), 200)
    return found


async def serve(reader: Reader, count: int) -> None:
    """Echo ``count`` requests."""
    for request in await read(reader, count):
        reader.finish([(request, ReplyHeader(), request.payload)])


async def answered(future: "asyncio.Future[Reply]") -> Reply:
    return await asyncio.wait_for(future, 10)


async def collect(stream: AsyncIterator[Reply]) -> list[bytes]:
    async with asyncio.timeout(10):
        return [part.payload async for part in stream]


async def submitted(sender: Sender, reader: Reader, payload: bytes = b"x") -> tuple[Any, Request]:
    """A request that the replica holds, and its future."""
    future = sender.submit(QUEUE, header(), payload)
    return future, (await read(reader, 1))[0]


# One request, one reply


async def test_a_request_is_answered_with_its_reply(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future = sender.submit(QUEUE, header(model_name="digits", traceparent="00-ab-cd-01"), b"\x00\xffinput")
    request = (await read(reader, 1))[0]
    assert request.payload == b"\x00\xffinput"
    assert (request.header.model_name, request.header.traceparent) == ("digits", "00-ab-cd-01")
    assert request.header.gateway == "gateway-1"
    assert request.attempt == 0
    assert not request.suspect
    assert abs(request.header.enqueue_unix_micros / 1e6 - time.time()) < 10
    reader.finish([(request, ReplyHeader(json_length=7), b"output")])
    reply = await answered(future)
    assert reply.payload == b"output"
    assert reply.header.json_length == 7
    assert not reply.header.more
    assert sender.unanswered() == 0
    assert reader.depth() == 0


async def test_each_of_many_requests_gets_its_own_reply(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(300)]
    await serve(reader, 300)
    replies = [await answered(future) for future in futures]
    assert [reply.payload for reply in replies] == [b"%d" % number for number in range(300)]


async def test_an_empty_payload_and_a_large_one_pass(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    large = bytes(range(256)) * 40_000
    futures = [sender.submit(QUEUE, header(), payload) for payload in (b"", large)]
    await serve(reader, 2)
    assert [(await answered(future)).payload for future in futures] == [b"", large]


async def test_an_error_of_the_model_is_a_reply_like_any_other(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future, request = await submitted(sender, reader)
    error = ReplyHeader(
        code=Code.INVALID_ARGUMENT, reason=Reason.INVALID_TENSOR, message="bad", metadata={"input": "x"}
    )
    reader.finish([(request, error, b"")])
    reply = await answered(future)
    assert reply.header.code == Code.INVALID_ARGUMENT
    assert reply.header.reason == Reason.INVALID_TENSOR
    assert dict(reply.header.metadata) == {"input": "x"}


async def test_a_payload_of_any_buffer_type_is_answered(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    futures = [sender.submit(QUEUE, header(), b"") for _ in range(3)]
    requests = await read(reader, 3)
    bodies = [b"bytes", bytearray(b"bytearray"), memoryview(b"a memoryview")[2:]]
    reader.finish([(r, ReplyHeader(), body) for r, body in zip(requests, bodies, strict=True)])
    assert [(await answered(f)).payload for f in futures] == [b"bytes", b"bytearray", b"memoryview"]


async def test_a_second_reply_is_dropped(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future, request = await submitted(sender, reader)
    reader.finish([(request, ReplyHeader(), b"first")])
    reader.finish([(request, ReplyHeader(), b"second")])
    assert (await answered(future)).payload == b"first"
    await until(lambda: sender.unmatched_replies == 1)


async def test_a_reply_for_a_gateway_that_is_gone_harms_nobody(world):
    gone, sender, reader = await world.sender("gone"), await world.sender(), world.reader(QUEUE)
    lost = gone.submit(QUEUE, header(), b"lost")
    await read(reader, 0)
    future = sender.submit(QUEUE, header(), b"kept")
    requests = await read(reader, 2)
    await gone.stop()
    reader.finish([(request, ReplyHeader(), request.payload) for request in requests])
    assert (await answered(future)).payload == b"kept"
    with pytest.raises(Unavailable) as caught:
        await lost
    assert caught.value.reason == Reason.SHUTTING_DOWN


async def test_the_caller_may_choose_the_id_but_not_twice(world):
    sender = await world.sender()
    sender.submit(QUEUE, header(id=b"mine"), b"")
    with pytest.raises(ValueError, match="id"):
        sender.submit(QUEUE, header(id=b"mine"), b"")
    assert sender.unanswered(QUEUE) == 1


# Reading


async def test_higher_priorities_are_read_first(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    await read(reader, 0)
    for priority in (PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH):
        for number in range(3):
            sender.submit(QUEUE, header(), b"%d%d" % (priority, number), priority)
    await until(lambda: reader.depth() == 9)
    payloads = [request.payload for request in await read(reader, 9, at_most=2)]
    assert payloads == [b"00", b"01", b"02", b"10", b"11", b"12", b"20", b"21", b"22"]


@pytest.mark.parametrize("at_once", [1, 10])
async def test_lower_priorities_get_their_part_while_higher_ones_never_end(world, at_once):
    sender, reader = await world.sender(), world.reader(QUEUE)
    await read(reader, 0)
    for priority, count in ((PRIORITY_HIGH, 150), (PRIORITY_NORMAL, 60), (PRIORITY_LOW, 60)):
        for _ in range(count):
            sender.submit(QUEUE, header(), b"%d" % priority, priority)
    await until(lambda: reader.depth() == 270)
    payloads = [request.payload for request in await read(reader, 100, at_most=at_once)]
    assert (payloads.count(b"0"), payloads.count(b"1"), payloads.count(b"2")) == pytest.approx(
        (70, 20, 10), abs=3
    )


async def test_a_read_gives_no_more_than_asked(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    for number in range(30):
        sender.submit(QUEUE, header(), b"", number % 3)
    await until(lambda: reader.depth() == 30)
    sizes = []
    while sum(sizes) < 30:
        sizes.append(len(await asyncio.to_thread(reader.read, 4, 200)))
    assert max(sizes) == 4


async def test_a_read_of_an_empty_queue_ends_in_time(world):
    reader = world.reader(QUEUE)
    assert reader.read(8, 0) == []
    began = time.monotonic()
    assert await asyncio.to_thread(reader.read, 8, 100) == []
    assert 0.05 < time.monotonic() - began < 5


async def test_a_waiting_read_ends_with_the_first_request(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    reading = asyncio.create_task(asyncio.to_thread(reader.read, 8, 30_000))
    sender.submit(QUEUE, header(), b"here")
    assert [request.payload for request in await asyncio.wait_for(reading, 10)] == [b"here"]


async def test_an_exchange_answers_and_brings_the_next(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    first = sender.submit(QUEUE, header(), b"first")
    done: list[Request] = await read(reader, 1)
    second = sender.submit(QUEUE, header(), b"second", PRIORITY_LOW)
    await until(lambda: reader.depth() == 2)
    done = await asyncio.to_thread(reader.exchange, [(done[0], None, b"one")], 8, 10_000)
    assert [request.payload for request in done] == [b"second"]
    reply = await answered(first)
    assert (reply.payload, reply.header.code, reply.header.json_length) == (b"one", 0, 0)
    assert await asyncio.to_thread(reader.exchange, [(done[0], ReplyHeader(code=13), b"")], 8, 50) == []
    assert (await answered(second)).header.code == 13
    assert reader.depth() == 0


async def test_an_exchange_gives_no_more_than_asked_whatever_waits(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    futures = [sender.submit(QUEUE, header(), b"%d" % number, number % 3) for number in range(30)]
    await until(lambda: reader.depth() == 30)
    held: list[Request] = []
    seen: list[int] = []
    while sum(seen) < 30:
        done = [(request, None, request.payload) for request in held]
        held = await asyncio.to_thread(reader.exchange, done, 4, 200)
        seen.append(len(held))
    assert await asyncio.to_thread(reader.exchange, [(r, None, r.payload) for r in held], 4, 0) == []
    assert max(seen) == 4
    assert [(await answered(future)).payload for future in futures] == [b"%d" % n for n in range(30)]


async def test_a_priority_that_does_not_exist_is_refused(world):
    sender = await world.sender()
    with pytest.raises(ValueError, match="Priority 3"):
        sender.submit(QUEUE, header(), b"", 3)
    assert sender.unanswered() == 0


async def test_two_replicas_share_a_queue_and_read_nothing_twice(world):
    sender = await world.sender()
    readers = [world.reader(QUEUE, f"replica-{number}.1") for number in (1, 2)]
    futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(100)]
    seen: list[bytes] = []

    async def work(reader: Reader) -> None:
        while len(seen) < 100:
            for request in await asyncio.to_thread(reader.read, 8, 50):
                seen.append(request.payload)
                reader.finish([(request, ReplyHeader(), request.payload)])

    await asyncio.wait_for(asyncio.gather(*map(work, readers)), 20)
    assert sorted(seen) == sorted(b"%d" % number for number in range(100))
    assert [(await answered(f)).payload for f in futures] == [b"%d" % number for number in range(100)]


async def test_a_request_says_when_it_has_expired():
    request = Request(header(10), b"", 0, b"1-0", b"s")
    assert not request.expired()
    assert request.expired(request.header.deadline_unix_micros)


# Ending without a reply


async def test_a_deadline_ends_the_wait_and_takes_the_request_off_the_queue(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future = sender.submit(QUEUE, header(0.2), b"")
    await until(lambda: reader.depth() == 1)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await answered(future)
    assert time.monotonic() - began < 2
    assert caught.value.reason == Reason.DEADLINE_EXCEEDED
    await until(lambda: reader.depth() == 0)
    assert reader.read(8, 0) == []
    assert sender.unanswered() == 0


async def test_a_deadline_never_ends_the_wait_too_early(world):
    sender = await world.sender()
    heads = [header(0.05 + 0.01 * number) for number in range(10)]
    for head, future in [(head, sender.submit(QUEUE, head, b"")) for head in heads]:
        with pytest.raises(DeadlineExceeded):
            await answered(future)
        assert time.time() * 1e6 >= head.deadline_unix_micros


async def test_a_request_past_its_deadline_is_refused_at_once(world):
    sender = await world.sender()
    with pytest.raises(DeadlineExceeded):
        sender.submit(QUEUE, header(-1), b"")
    with pytest.raises(DeadlineExceeded):
        sender.submit(QUEUE, RequestHeader(), b"")
    assert sender.unanswered() == 0


async def test_a_cancelled_request_is_taken_off_the_queue(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    head = header()
    future = sender.submit(QUEUE, head, b"")
    await until(lambda: reader.depth() == 1)
    assert sender.cancel(head.id)
    assert future.cancelled()
    await until(lambda: reader.depth() == 0)
    assert not sender.cancel(head.id)


async def test_a_request_cancelled_in_the_tick_of_its_submission_is_taken_off_too(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    doomed, kept = header(), header()
    sender.submit(QUEUE, doomed, b"doomed")
    sender.cancel(doomed.id)
    future = sender.submit(QUEUE, kept, b"kept")
    await until(lambda: reader.depth() == 1)
    await serve(reader, 1)
    assert (await answered(future)).payload == b"kept"


async def test_a_request_cancelled_while_a_replica_has_it_leaves_nothing_behind(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    head = header()
    sender.submit(QUEUE, head, b"")
    request = (await read(reader, 1))[0]
    sender.cancel(head.id)
    await until(lambda: reader.depth() == 0)
    reader.finish([(request, ReplyHeader(), b"")])
    await until(lambda: sender.unmatched_replies == 1)


async def test_a_future_that_its_caller_gave_up_hurts_nobody(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    left, kept = sender.submit(QUEUE, header(), b"1"), sender.submit(QUEUE, header(), b"2")
    left.cancel()
    await serve(reader, 2)
    assert (await answered(kept)).payload == b"2"
    assert sender.unanswered() == 0


async def test_a_replica_learns_which_of_its_requests_nobody_waits_for(world):
    sender, reader, other = await world.sender(), world.reader(QUEUE), world.reader(QUEUE, "replica-2.1")
    wanted = header()
    futures = [sender.submit(QUEUE, one, b"") for one in (wanted, header(), header())]
    requests = await read(reader, 3)
    assert reader.abandoned([]) == reader.abandoned(requests) == []
    sender.cancel(requests[1].header.id)
    sender.cancel(requests[2].header.id)
    found: list[Request] = []

    def gone() -> bool:
        found.extend(reader.abandoned([one for one in requests if one not in found]))
        return len(found) == 2

    await until(gone)
    assert found == requests[1:]
    await world.reclaim(QUEUE, "replica-1.1")
    assert reader.abandoned(requests[:1]) == requests[:1]
    await serve(other, 1)
    assert (await answered(futures[0])).header.id == wanted.id


async def test_a_queue_is_failed_with_the_given_error(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    futures = [sender.submit(QUEUE, header(), b"") for _ in range(3)]
    other = sender.submit(OTHER, header(), b"")
    await until(lambda: reader.depth() == 3)
    assert sender.fail(QUEUE, FailedPrecondition("gone", reason=Reason.NOT_READY)) == 3
    for future in futures:
        with pytest.raises(FailedPrecondition):
            await answered(future)
    await until(lambda: reader.depth() == 0)
    assert not other.done()
    assert (sender.unanswered(QUEUE), sender.unanswered(OTHER)) == (0, 1)


async def test_a_stopped_sender_answers_all_and_accepts_no_more(world):
    sender = await world.sender()
    future = sender.submit(QUEUE, header(), b"")
    stream = sender.submit_stream(QUEUE, header(), b"")
    await sender.stop()
    for waiting in (answered(future), collect(stream)):
        with pytest.raises(Unavailable) as caught:
            await waiting
        assert caught.value.reason == Reason.SHUTTING_DOWN
    with pytest.raises(Unavailable):
        sender.submit(QUEUE, header(), b"")
    assert sender.unanswered() == 0


# Bounds


async def test_too_many_unanswered_requests_are_refused_until_one_is_answered(world):
    sender, reader = await world.sender(max_unanswered=2), world.reader(QUEUE)
    future = sender.submit(QUEUE, header(), b"")
    sender.submit(QUEUE, header(), b"")
    with pytest.raises(ResourceExhausted) as caught:
        sender.submit(QUEUE, header(), b"")
    assert caught.value.reason == Reason.OVERLOADED
    assert caught.value.retry_after_seconds
    await serve(reader, 1)
    await answered(future)
    sender.submit(QUEUE, header(), b"")


async def test_too_many_unanswered_bytes_are_refused(world):
    sender = await world.sender(max_unanswered_bytes=1000)
    head = header()
    sender.submit(QUEUE, head, b"x" * 800)
    with pytest.raises(ResourceExhausted):
        sender.submit(QUEUE, header(), b"x" * 300)
    sender.cancel(head.id)
    sender.submit(QUEUE, header(), b"x" * 300)


# Moving


async def test_requests_of_a_queue_are_sent_to_another_one(world):
    sender, old, new = await world.sender(), world.reader(QUEUE), world.reader(OTHER)
    futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(5)]
    await until(lambda: old.depth() == 5)
    assert sender.reroute(QUEUE, OTHER) == 5
    assert (sender.unanswered(QUEUE), sender.unanswered(OTHER)) == (0, 5)
    await until(lambda: old.depth() == 0)
    await serve(new, 5)
    assert [(await answered(f)).payload for f in futures] == [b"%d" % number for number in range(5)]


async def test_requests_moved_in_the_tick_of_their_submission_are_answered_once(world):
    sender, old, new = await world.sender(), world.reader(QUEUE), world.reader(OTHER)
    future = sender.submit(QUEUE, header(), b"moved")
    sender.reroute(QUEUE, OTHER)
    await serve(new, 1)
    assert (await answered(future)).payload == b"moved"
    await until(lambda: old.depth() == 0)


async def test_moved_requests_keep_their_deadline(world):
    sender = await world.sender()
    future = sender.submit(QUEUE, header(0.2), b"")
    sender.reroute(QUEUE, OTHER)
    with pytest.raises(DeadlineExceeded):
        await answered(future)


async def test_requests_outlive_the_loss_of_all_data(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(20)]
    held = await read(reader, 3)
    world.lose_data()
    reader.finish([(request, ReplyHeader(), request.payload) for request in held])
    done = asyncio.gather(*futures)
    async with asyncio.timeout(20):
        while not done.done():
            for request in await asyncio.to_thread(reader.read, 32, 50):
                reader.finish([(request, ReplyHeader(), request.payload)])
    assert [reply.payload for reply in await done] == [b"%d" % number for number in range(20)]


# Streams


async def test_parts_of_a_streamed_answer_come_in_order(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(), b"count")
    request = (await read(reader, 1))[0]
    for number in range(50):
        assert reader.push_partial(request, ReplyHeader(), b"%d" % number)
    reader.finish([(request, ReplyHeader(), b"end")])
    assert await collect(stream) == [*(b"%d" % number for number in range(50)), b"end"]
    assert sender.unanswered() == 0


async def test_a_stream_may_have_one_part_only(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(), b"")
    await serve(reader, 1)
    assert await collect(stream) == [b""]


async def test_a_caller_who_wants_one_reply_gets_the_last_part(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future, request = await submitted(sender, reader)
    reader.push_partial(request, ReplyHeader(), b"part")
    reader.finish([(request, ReplyHeader(), b"whole")])
    assert (await answered(future)).payload == b"whole"


async def test_a_replica_is_told_when_the_caller_leaves_the_stream(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(), b"")
    request = (await read(reader, 1))[0]
    assert reader.push_partial(request, ReplyHeader(), b"1")
    assert (await anext(stream)).payload == b"1"
    await stream.aclose()
    await until(lambda: not reader.push_partial(request, ReplyHeader(), b"more"))
    reader.finish([(request, ReplyHeader(), b"")])
    assert sender.unanswered() == 0


async def test_a_stream_ends_at_its_deadline_and_keeps_what_came(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(0.5), b"")
    request = (await read(reader, 1))[0]
    reader.push_partial(request, ReplyHeader(), b"1")
    assert (await anext(stream)).payload == b"1"
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(anext(stream), 10)
    await until(lambda: not reader.push_partial(request, ReplyHeader(), b"2"))


async def test_a_stream_whose_replica_dies_before_the_first_part_is_served_by_another(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(), b"")
    await read(reader, 1)
    await world.reclaim(QUEUE, "replica-1.1")
    other = world.reader(QUEUE, "replica-2.1")
    request = (await read(other, 1))[0]
    other.push_partial(request, ReplyHeader(), b"1")
    other.finish([(request, ReplyHeader(), b"2")])
    assert await collect(stream) == [b"1", b"2"]


async def test_parts_of_two_runs_are_never_mixed(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(), b"")
    request = (await read(reader, 1))[0]
    reader.push_partial(request, ReplyHeader(), b"first run")
    assert (await anext(stream)).payload == b"first run"
    await world.reclaim(QUEUE, "replica-1.1")
    other = world.reader(QUEUE, "replica-2.1")
    again = (await read(other, 1))[0]
    other.push_partial(again, ReplyHeader(), b"second run")
    with pytest.raises(Unavailable):
        await asyncio.wait_for(anext(stream), 10)
    await until(lambda: not other.push_partial(again, ReplyHeader(), b"nobody waits"))
    assert sender.unanswered() == 0


# Death


async def test_what_a_dead_replica_held_goes_to_another_as_suspect(world):
    sender, dead = await world.sender(), world.reader(QUEUE)
    futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(4)]
    await read(dead, 4)
    assert (await world.reclaim(QUEUE, "replica-1.1")).requeued == 4
    other = world.reader(QUEUE, "replica-2.1")
    requests = await read(other, 4)
    assert [request.attempt for request in requests] == [1, 1, 1, 1]
    assert all(request.suspect for request in requests)
    other.finish([(request, ReplyHeader(), request.payload) for request in requests])
    assert [(await answered(f)).payload for f in futures] == [b"0", b"1", b"2", b"3"]
    assert other.depth() == 0


async def test_reclaiming_twice_changes_nothing(world):
    sender, dead = await world.sender(), world.reader(QUEUE)
    sender.submit(QUEUE, header(), b"")
    await read(dead, 1)
    first, second = await world.reclaim(QUEUE, "replica-1.1"), await world.reclaim(QUEUE, "replica-1.1")
    assert (first.requeued, second.requeued) == (1, 0)
    assert dead.depth() == 1


async def test_reclaiming_from_a_queue_nobody_knows_changes_nothing(world):
    assert (await world.reclaim("unknown:1:00", "replica-1.1")).requeued == 0


async def test_a_request_that_kills_two_replicas_is_poison_and_its_neighbours_are_not(world):
    sender, first = await world.sender(), world.reader(QUEUE)
    names = [b"innocent", b"poison", b"neighbour"]
    futures = dict(zip(names, [sender.submit(QUEUE, header(), name) for name in names], strict=True))
    await read(first, 3)
    await world.reclaim(QUEUE, "replica-1.1")

    second = world.reader(QUEUE, "replica-2.1")
    for request in await read(second, 3):
        second.mark_running(request)
        if request.payload == b"poison":
            break  # it dies here
        second.finish([(request, ReplyHeader(), request.payload)])
        second.mark_running(None)
    result = await world.reclaim(QUEUE, "replica-2.1")
    assert (result.requeued, result.poisoned) == (1, 1)

    reply = await answered(futures[b"poison"])
    assert (reply.header.code, reply.header.reason) == (Code.INTERNAL, Reason.POISON_REQUEST)
    letters = await world.dead_letters(QUEUE)
    assert [(letter.payload, letter.attempt, letter.consumer) for letter in letters] == [
        (b"poison", 1, "replica-2.1")
    ]
    third = world.reader(QUEUE, "replica-3.1")
    waited = (await read(third, 1))[0]
    assert (waited.payload, waited.attempt) == (b"neighbour", 1)
    third.finish([(waited, ReplyHeader(), waited.payload)])
    assert (await answered(futures[b"innocent"])).payload == b"innocent"
    assert (await answered(futures[b"neighbour"])).payload == b"neighbour"
    assert third.depth() == 0


async def test_a_first_death_is_never_poison_even_if_announced(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    _, request = await submitted(sender, reader)
    reader.mark_running(request)
    result = await world.reclaim(QUEUE, "replica-1.1")
    assert (result.requeued, result.poisoned) == (1, 0)


async def test_poison_ends_a_stream_that_had_begun(world):
    sender, first = await world.sender(), world.reader(QUEUE)
    stream = sender.submit_stream(QUEUE, header(), b"")
    await read(first, 1)
    await world.reclaim(QUEUE, "replica-1.1")
    second = world.reader(QUEUE, "replica-2.1")
    request = (await read(second, 1))[0]
    second.mark_running(request)
    second.push_partial(request, ReplyHeader(), b"part")
    assert (await anext(stream)).payload == b"part"
    await world.reclaim(QUEUE, "replica-2.1")
    assert (await asyncio.wait_for(anext(stream), 10)).header.reason == Reason.POISON_REQUEST


async def test_a_replica_declared_dead_by_mistake_does_no_harm(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future, request = await submitted(sender, reader)
    await world.reclaim(QUEUE, "replica-1.1")
    reader.finish([(request, ReplyHeader(), b"late but right")])
    assert (await answered(future)).payload == b"late but right"
    again = (await read(reader, 1))[0]
    reader.finish([(again, ReplyHeader(), b"again")])
    await until(lambda: sender.unmatched_replies == 1)
    assert reader.depth() == 0


async def test_a_replica_that_leaves_gives_back_what_it_read_without_suspicion(world):
    sender, reader = await world.sender(), world.reader(QUEUE)
    future, _ = await submitted(sender, reader)
    reader.leave()
    other = world.reader(QUEUE, "replica-2.1")
    request = (await read(other, 1))[0]
    assert request.attempt == 0
    other.finish([(request, ReplyHeader(), b"answer")])
    assert (await answered(future)).payload == b"answer"
    assert reader.read(1, 0) == []
    assert not reader.heartbeat()
    reader.leave()


async def test_statistics_are_those_of_the_replicas_that_are_there(world):
    reader = world.reader(QUEUE)
    assert reader.publish_statistics(ReplicaStatistics(success_count=3).SerializeToString())
    assert {name: s.success_count for name, s in (await world.statistics(QUEUE)).items()} == {
        "replica-1.1": 3
    }
    reader.leave()
    assert await world.statistics(QUEUE) == {}


async def test_a_replica_takes_back_what_one_without_a_lease_held_and_leaves_the_living_alone(world):
    sender, lost, alive = await world.sender(), world.reader(QUEUE), world.reader(QUEUE, "replica-2.1")
    sender.submit(QUEUE, header(), b"lost")
    sender.submit(QUEUE, header(), b"held")
    await read(lost, 1)
    await read(alive, 1)
    rescuer = world.reader(QUEUE, "replica-3.1")
    rescuer.heartbeat()

    def rescued() -> bool:
        alive.heartbeat()
        world.end_lease(QUEUE, "replica-1.1")
        return bool(rescuer.reclaim_lost().requeued == 1)

    await until(rescued)
    requests = await read(rescuer, 1)
    assert [(request.payload, request.attempt) for request in requests] == [(b"lost", 1)]
    assert rescuer.read(1, 0) == []
