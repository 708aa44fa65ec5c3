"""What happens to requests when Redis, or the way to it, fails."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader
from penstock_kit.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from penstock_kit.queue import keys
from penstock_kit.queue import reader as queue_reader
from penstock_kit.queue.messages import Request
from penstock_kit.queue.ports import Reclaimed
from penstock_kit.queue.reader import QueueReader
from penstock_kit.queue.reclaim import Mode, reclaim
from penstock_kit.queue.sender import RequestSender
from penstock_local.embedded import EmbeddedRedis

QUEUE = "digits:1:0123456789ab"


def header(seconds: float = 60.0, **fields: Any) -> RequestHeader:
    return RequestHeader(deadline_unix_micros=int((time.time() + seconds) * 1e6), **fields)


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- what it waits for is in other threads and processes
            await asyncio.sleep(0.01)


class Echo:
    """A replica: a thread that reads, repeats and beats its heart."""

    def __init__(self, url: str, consumer: str = "replica-1.1") -> None:
        self.reader = QueueReader(url, QUEUE, consumer)
        self.computed: list[bytes] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._serve), threading.Thread(target=self._beat)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self.reader.leave()

    def _serve(self) -> None:
        requests: list[Request] = []
        while not self._stop.is_set() or requests:
            done = [(request, None, request.payload) for request in requests]
            requests = []
            # Nobody waits any more: the loop goes on.
            with contextlib.suppress(Unavailable):
                if len(self.computed) % 2:
                    self.reader.finish(done)
                    requests = self.reader.read(16, 50)
                else:
                    requests = self.reader.exchange(done, 16, 50)
            self.computed += [request.payload for request in requests]

    def _beat(self) -> None:
        while not self._stop.wait(0.5):
            self.reader.heartbeat()


@contextlib.contextmanager
def echo(url: str, consumer: str = "replica-1.1") -> Iterator[Echo]:
    made = Echo(url, consumer)
    try:
        yield made
    finally:
        made.stop()


@contextlib.asynccontextmanager
async def sending(url: str, gateway: str = "gateway-1", **limits: int) -> AsyncIterator[RequestSender]:
    sender = RequestSender(url, gateway, **limits)
    await sender.start()
    try:
        yield sender
    finally:
        await sender.stop()


class Load:
    """Callers that send one request after the other, and note every outcome."""

    def __init__(self, sender: RequestSender, callers: int = 16) -> None:
        self.answered = 0
        self.failures: list[Exception] = []
        self._sender = sender
        self._stop = False
        self._tasks = [asyncio.create_task(self._call(b"%d" % number)) for number in range(callers)]

    async def progress(self, count: int) -> None:
        """Wait until that many more were answered."""
        goal = self.answered + count
        await until(lambda: self.answered >= goal)

    async def stop(self) -> None:
        self._stop = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), 60)

    async def _call(self, name: bytes) -> None:
        number = 0
        while not self._stop:
            number += 1
            payload = b"%b/%d" % (name, number)
            try:
                reply = await self._sender.submit(QUEUE, header(), payload)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the test shows it
                self.failures.append(error)
                return
            assert reply.payload == payload
            assert reply.header.code == 0
            self.answered += 1


# Redis itself


@pytest.mark.parametrize("persist", [True, False], ids=["with its data", "without its data"])
@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_no_request_is_lost_when_redis_restarts(tmp_path_factory, persist, end):
    server = EmbeddedRedis(tmp_path_factory.mktemp("r"), persist=persist)
    await asyncio.to_thread(server.start)
    try:
        with echo(server.url):
            async with sending(server.url) as sender:
                load = Load(sender)
                for _ in range(2):
                    await load.progress(200)
                    await asyncio.to_thread(getattr(server, end))
                    await until(lambda: not sender.connected)
                    await asyncio.to_thread(server.start)
                await load.progress(200)
                await load.stop()
                assert load.failures == []
    finally:
        await asyncio.to_thread(server.stop)


async def test_no_request_is_lost_when_all_keys_are_deleted_under_load(redis_url):
    client = redis.Redis.from_url(redis_url)
    with echo(redis_url), echo(redis_url, "replica-2.1"):
        async with sending(redis_url) as sender:
            load = Load(sender)
            for _ in range(3):
                await load.progress(200)
                client.flushall()
            await load.progress(200)
            await load.stop()
            assert load.failures == []
    client.close()


async def test_no_request_is_lost_when_all_connections_are_killed_again_and_again(redis_url):
    client = redis.Redis.from_url(redis_url)
    with echo(redis_url), echo(redis_url, "replica-2.1"):
        async with sending(redis_url) as sender:
            load = Load(sender, callers=64)
            for _ in range(10):
                await load.progress(100)
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await load.progress(100)
            await load.stop()
            assert load.failures == []
            assert sender.unanswered() == 0
    depth = sum(client.xlen(stream) for stream in keys.streams(QUEUE))
    client.close()
    assert depth == 0


async def test_no_request_is_lost_when_the_wire_is_cut_in_the_middle_of_a_reply(wire, redis_url, seed):
    with echo(wire.url):
        async with sending(wire.url) as sender:
            load = Load(sender, callers=32)
            for number in range(15):
                await load.progress(20)
                wire.cut_after(1 + (seed * (number + 1)) % 3000)
            await load.progress(20)
            await load.stop()
            assert load.failures == []


async def test_a_wire_that_falls_silent_is_noticed(wire, redis_url, monkeypatch):
    monkeypatch.setattr("penstock_kit.queue.sender.ANSWER_SECONDS", 0.5)
    with echo(redis_url):
        async with sending(wire.url) as sender:
            wire.hold()
            future = sender.submit(QUEUE, header(), b"held up")
            await until(lambda: not sender.connected)
            wire.cut()
            wire.up()
            assert (await asyncio.wait_for(future, 20)).payload == b"held up"


# Beginning and ending without Redis


async def test_requests_wait_for_a_redis_that_starts_later(wire, redis_url):
    wire.down()
    with echo(wire.url):
        async with sending(wire.url) as sender:
            assert not sender.connected
            future = sender.submit(QUEUE, header(), b"patient")
            wire.up()
            assert (await asyncio.wait_for(future, 20)).payload == b"patient"
            assert sender.connected


async def test_requests_still_meet_their_deadline_while_redis_is_away(wire):
    wire.down()
    async with sending(wire.url, max_unanswered=1) as sender:
        future = sender.submit(QUEUE, header(0.2), b"")
        with pytest.raises(ResourceExhausted):
            sender.submit(QUEUE, header(), b"")
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(future, 10)


async def test_a_request_cancelled_while_redis_is_away_is_never_sent(wire, redis_url):
    wire.down()
    async with sending(wire.url) as sender:
        head = header()
        sender.submit(QUEUE, head, b"cancelled")
        kept = sender.submit(QUEUE, header(), b"kept")
        sender.cancel(head.id)
        wire.up()
        with echo(redis_url) as replica:
            assert (await asyncio.wait_for(kept, 20)).payload == b"kept"
            assert replica.computed == [b"kept"]


async def test_a_replica_without_redis_waits_and_says_so(wire):
    wire.down()
    reader = QueueReader(wire.url, QUEUE, "replica-1.1")
    assert await asyncio.to_thread(reader.read, 8, 100) == []
    assert not reader.heartbeat()
    assert not reader.publish_statistics(b"")
    assert reader.reclaim_lost().requeued == 0
    with pytest.raises(Unavailable):
        reader.depth()
    with pytest.raises(Unavailable):
        reader.mark_running(None)
    await asyncio.to_thread(reader.leave)


async def test_an_answer_waits_for_redis_and_arrives(wire, redis_url):
    reader = QueueReader(wire.url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"")
        request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
        wire.down()
        finishing = asyncio.create_task(
            asyncio.to_thread(reader.finish, [(request, ReplyHeader(), b"at last")])
        )
        await asyncio.wait([finishing], timeout=0.3)
        assert not finishing.done()
        wire.up()
        assert (await asyncio.wait_for(future, 20)).payload == b"at last"
        await finishing
    await asyncio.to_thread(reader.leave)


async def test_an_answer_nobody_waits_for_any_more_is_given_up_and_acknowledged_later(wire, redis_url):
    reader = QueueReader(wire.url, QUEUE, "replica-1.1")
    client = redis.Redis.from_url(redis_url)
    # Its gateway is dead: nobody else takes it off the queue.
    lonely = header(0.6, id=b"lonely", gateway="gone").SerializeToString()
    client.xadd(keys.stream(QUEUE, 1), {"h": lonely, "a": "0", "b": b""})
    doomed = (await asyncio.to_thread(reader.read, 1, 5000))[0]
    wire.down()
    with pytest.raises(Unavailable):
        await asyncio.to_thread(reader.finish, [(doomed, ReplyHeader(), b"")])
    wire.up()
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"next")
        requests: list[Any] = []
        async with asyncio.timeout(20):
            while not requests:
                requests = await asyncio.to_thread(reader.read, 1, 200)
        assert [request.payload for request in requests if not request.expired()] == [b"next"]
        reader.finish([(requests[0], ReplyHeader(), b"fine")])
        assert (await asyncio.wait_for(future, 20)).payload == b"fine"
    assert client.xpending(keys.stream(QUEUE, 1), keys.GROUP)["pending"] == 0
    assert client.xlen(keys.stream(QUEUE, 1)) == 0
    client.close()
    await asyncio.to_thread(reader.leave)


async def test_an_answer_of_a_replica_that_is_to_end_waits_not_long_and_is_given_by_another(
    wire, redis_url, monkeypatch
):
    monkeypatch.setattr(queue_reader, "AWAY_SECONDS", 0.2)
    reader = QueueReader(wire.url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(600), b"waits still")
        request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
        wire.down()
        finishing = asyncio.create_task(asyncio.to_thread(reader.finish, [(request, ReplyHeader(), b"")]))
        await asyncio.wait([finishing], timeout=0.3)
        assert not finishing.done()
        reader.hurry()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(finishing, 10)
        wire.up()
        await asyncio.to_thread(reader.leave)
        with echo(redis_url, "replica-2.1"):
            assert (await asyncio.wait_for(future, 20)).payload == b"waits still"


async def test_a_replica_that_cannot_sign_off_still_leaves(wire):
    reader = QueueReader(wire.url, QUEUE, "replica-1.1")
    reader.heartbeat()
    wire.down()
    began = time.monotonic()
    await asyncio.to_thread(reader.leave)
    assert time.monotonic() - began < 5


async def test_leaving_ends_a_read_that_waits(redis_url):
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    reading = asyncio.create_task(asyncio.to_thread(reader.read, 1, 60_000))
    await until(reader.heartbeat)
    await asyncio.wait([reading], timeout=0.2)
    await asyncio.to_thread(reader.leave)
    assert await asyncio.wait_for(reading, 10) == []


# What is lost on the wire


async def test_a_request_handed_out_to_a_replica_that_never_got_it_is_read_again(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    assert reader.read(8, 0) == []
    async with sending(redis_url) as sender:
        sender.submit(QUEUE, header(), b"lost on the wire")
        await until(lambda: reader.depth() == 1)
        # Redis hands it out, and then the connection of the replica is cut.
        assert client.xreadgroup(keys.GROUP, "replica-1.1", {keys.stream(QUEUE, 1): ">"})
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        found: list[Any] = []
        async with asyncio.timeout(20):
            while not found:
                found = await asyncio.to_thread(reader.read, 8, 100)
        assert [request.payload for request in found] == [b"lost on the wire"]
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for _ in range(5):  # what it holds is not read twice
            assert await asyncio.to_thread(reader.read, 8, 20) == []
    client.close()
    await asyncio.to_thread(reader.leave)


async def test_a_reply_that_was_popped_and_never_arrived_is_computed_again(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"x")
        request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
        # The answer vanishes on its way: the entry is gone, and so is the reply.
        client.xack(request.stream, keys.GROUP, request.entry_id)
        client.xdel(request.stream, request.entry_id)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with echo(redis_url, "replica-2.1"):
            assert (await asyncio.wait_for(future, 20)).payload == b"x"
        assert sender.sent_again == 1
    client.close()
    await asyncio.to_thread(reader.leave)


async def test_a_cut_connection_makes_nobody_compute_again_what_still_waits(redis_url):
    client = redis.Redis.from_url(redis_url)
    async with sending(redis_url) as sender:
        futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(600)]
        # Once Redis has confirmed all: a write that it has not confirmed is sent again, and that is right.
        await until(lambda: all(waiting.entry_id for waiting in sender._waiting.values()))
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await until(lambda: not sender.connected)
        await until(lambda: sender.connected)
        with echo(redis_url) as replica:
            await asyncio.wait_for(asyncio.gather(*futures), 20)
            assert len(replica.computed) == 600
        assert sender.sent_again == 0
    client.close()


# Redis in distress, and strangers


async def test_a_redis_out_of_memory_refuses_requests_with_words(redis_url):
    client = redis.Redis.from_url(redis_url)
    async with sending(redis_url) as sender:
        client.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(ResourceExhausted, match="memory"):
                await asyncio.wait_for(sender.submit(QUEUE, header(), b"x" * 2_000_000), 10)
                await asyncio.wait_for(sender.submit(QUEUE, header(), b"x" * 2_000_000), 10)
        finally:
            client.config_set("maxmemory", "0")
        assert sender.connected
        with echo(redis_url):
            assert (await asyncio.wait_for(sender.submit(QUEUE, header(), b"ok"), 10)).payload == b"ok"
    client.close()


async def test_an_answer_waits_for_a_redis_out_of_memory(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"x")
        request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
        client.config_set("maxmemory", "1")
        try:
            finishing = asyncio.create_task(
                asyncio.to_thread(reader.finish, [(request, ReplyHeader(), b"answer")])
            )
            await asyncio.wait([finishing], timeout=0.3)
            assert not finishing.done()
        finally:
            client.config_set("maxmemory", "0")
        await asyncio.wait_for(finishing, 10)
        assert (await asyncio.wait_for(future, 10)).payload == b"answer"
    client.close()
    await asyncio.to_thread(reader.leave)


async def test_a_replica_keeps_its_lease_on_a_redis_out_of_memory(redis_url):
    client = redis.Redis.from_url(redis_url)
    old, new = (QueueReader(redis_url, QUEUE, f"replica-{number}.1") for number in (1, 2))
    assert old.heartbeat()
    client.config_set("maxmemory", "1")
    try:
        client.pexpire(keys.lease(QUEUE, "replica-1.1"), 1000)
        assert old.heartbeat()
        assert client.pttl(keys.lease(QUEUE, "replica-1.1")) > 1000
        assert not new.heartbeat()
        assert not new.publish_statistics(b"x")
        assert new.read(1, 0) == []
        assert new.reclaim_lost() == Reclaimed()
        suspect = Request(header(), b"", 1, b"1-0", keys.stream(QUEUE, 1))
        with pytest.raises(Unavailable):
            old.mark_running(suspect)
    finally:
        client.config_set("maxmemory", "0")
    assert new.heartbeat()
    for reader in (old, new):
        reader.leave()
    client.close()


async def test_a_queue_whose_key_somebody_else_uses_is_away_until_it_is_free(redis_url):
    client = redis.Redis.from_url(redis_url)
    client.set(keys.stream(QUEUE, 1), "not a stream")
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    assert reader.read(1, 10) == []
    client.delete(keys.stream(QUEUE, 1))
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"")
        request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
        reader.finish([(request, ReplyHeader(), b"free")])
        assert (await asyncio.wait_for(future, 10)).payload == b"free"
    reader.leave()
    client.close()


async def test_foreign_entries_and_replies_are_dropped_and_the_rest_is_served(redis_url):
    client = redis.Redis.from_url(redis_url)
    stream = keys.stream(QUEUE, 1)
    for fields in ({"x": "y"}, {"h": b"\xff\xff", "a": "0", "b": "p"}, {"h": "", "a": "many", "b": ""}):
        client.xadd(stream, fields)
    client.rpush(keys.replies("gateway-1"), b"", b"no reply", b"\x05\x00\x00\x00\x00\x00\x00\x00\xff")
    with echo(redis_url) as replica:
        async with sending(redis_url) as sender:
            assert (await asyncio.wait_for(sender.submit(QUEUE, header(), b"ok"), 10)).payload == b"ok"
        assert replica.computed == [b"ok"]
    assert client.xlen(stream) == 0
    client.close()


async def test_replies_for_a_gateway_that_is_gone_expire(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    sender = RequestSender(redis_url, "gone")
    await sender.start()
    sender.submit(QUEUE, header(), b"")
    request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
    await sender.stop()
    reader.finish([(request, ReplyHeader(), b"orphan")])
    assert 0 < client.ttl(keys.replies("gone")) <= 60
    client.close()
    reader.leave()


async def test_streams_nobody_serves_any_more_expire(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    reader.read(1, 0)
    reader.heartbeat()
    assert all(client.ttl(stream) > 3600 for stream in keys.streams(QUEUE))
    assert 0 < client.pttl(keys.lease(QUEUE, "replica-1.1")) <= 3000
    reader.leave()
    assert not client.exists(keys.lease(QUEUE, "replica-1.1"))
    assert client.xinfo_consumers(keys.stream(QUEUE, 1), keys.GROUP) == []
    client.close()


async def test_a_newcomer_has_its_lease_before_it_reads(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    reader.read(1, 0)
    assert client.exists(keys.lease(QUEUE, "replica-1.1"))
    client.close()
    reader.leave()


async def test_reclaiming_many_large_requests_loses_none(redis_url):
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        futures = [sender.submit(QUEUE, header(), b"%d" % n + b"x" * 10_000, n % 3) for n in range(500)]
        await until(lambda: reader.depth() == 500)
        held = 0
        while held < 500:
            held += len(reader.read(500, 0))
        assert (await reclaim(redis_url, QUEUE, "replica-1.1")).requeued == 500
        with echo(redis_url, "replica-2.1"):
            replies = await asyncio.wait_for(asyncio.gather(*futures), 20)
        assert [len(reply.payload) for reply in replies] == [len(b"%d" % n) + 10_000 for n in range(500)]
    reader.leave()


async def test_a_consumer_whose_lease_was_renewed_in_the_last_moment_keeps_its_requests(redis_url):
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"")
        request = (await asyncio.to_thread(reader.read, 1, 5000))[0]
        reader.heartbeat()
        assert await reclaim(redis_url, QUEUE, "replica-1.1", Mode.LOST) == Reclaimed(0, 0)
        reader.finish([(request, ReplyHeader(), b"mine")])
        assert (await asyncio.wait_for(future, 10)).payload == b"mine"
        assert reader.depth() == 0
    reader.leave()


async def test_requests_of_the_dead_are_given_back_even_by_a_redis_out_of_memory(redis_url):
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")
    async with sending(redis_url) as sender:
        sender.submit(QUEUE, header(), b"x")
        assert await asyncio.to_thread(reader.read, 1, 5000)
        client.config_set("maxmemory", "1")
        try:
            assert (await reclaim(redis_url, QUEUE, "replica-1.1")).requeued == 1
        finally:
            client.config_set("maxmemory", "0")
        assert reader.depth() == 1
    reader.leave()
    client.close()


async def test_two_who_reclaim_at_once_bury_a_poisonous_request_once(redis_url):
    client = redis.Redis.from_url(redis_url)
    first = QueueReader(redis_url, QUEUE, "replica-1.1")
    second = QueueReader(redis_url, QUEUE, "replica-2.1")
    async with sending(redis_url) as sender:
        future = sender.submit(QUEUE, header(), b"poison")
        assert await asyncio.to_thread(first.read, 1, 5000)
        await reclaim(redis_url, QUEUE, "replica-1.1")
        second.mark_running((await asyncio.to_thread(second.read, 1, 5000))[0])
        results = await asyncio.gather(*[reclaim(redis_url, QUEUE, "replica-2.1") for _ in range(5)])
        assert sum(result.poisoned for result in results) == 1
        assert (await asyncio.wait_for(future, 10)).header.code != 0
        assert client.xlen(keys.dead(QUEUE)) == 1
    for reader in (first, second):
        reader.leave()
    client.close()


@pytest.mark.parametrize("url", ["http://host", "unix://", "redis://host:port", "redis://host?unknown=1", ""])
def test_a_url_that_cannot_be_used_is_refused_with_words(url):
    with pytest.raises(InvalidArgument, match="Redis URL"):
        RequestSender(url, "gateway-1")
    with pytest.raises(InvalidArgument, match="Redis URL"):
        QueueReader(url, QUEUE, "replica-1.1")


async def test_a_wrong_password_is_said_and_tried_again(tmp_path: Path, redis_url, redis_server, caplog):
    client = redis.Redis.from_url(redis_url)
    client.config_set("requirepass", "secret")
    try:
        async with sending(redis_url.replace("unix://", "unix://:wrong@")) as sender:
            assert not sender.connected
            assert "The queue is away" in caplog.text
            assert "wrong" not in caplog.text.replace("WRONGPASS", "")
        with echo(redis_url.replace("unix://", "unix://:secret@")):
            async with sending(redis_url.replace("unix://", "unix://:secret@")) as sender:
                reply = await asyncio.wait_for(sender.submit(QUEUE, header(), b"in"), 10)
                assert reply.payload == b"in"
    finally:
        redis.Redis(unix_socket_path=str(redis_server.socket_path), password="secret").config_set(
            "requirepass", ""
        )
        client.close()


async def test_after_a_large_request_a_read_brings_no_more_than_a_few(redis_url):
    """Small requests behind must not wait until all large ones have arrived."""
    large = bytes(3 << 20)
    async with sending(redis_url) as sender:
        reader = QueueReader(redis_url, QUEUE, "replica-1.1")
        sizes: list[int] = []
        for _ in range(2):
            futures = [sender.submit(QUEUE, header(), large) for _ in range(8)]
            await until(lambda: reader.depth() == 8)
            while not sizes or reader.depth():
                requests = await asyncio.to_thread(reader.read, 64, 1000)
                sizes.append(len(requests))
                reader.finish([(request, None, b"") for request in requests])
            await asyncio.gather(*futures)
        assert sizes[:2] == [8, 2]
        futures = [sender.submit(QUEUE, header(), b"small") for _ in range(200)]
        await until(lambda: reader.depth() == 200)
        while reader.depth():
            requests = await asyncio.to_thread(reader.read, 64, 1000)
            sizes.append(len(requests))
            reader.finish([(request, None, b"") for request in requests])
        assert max(sizes[-3:]) > 20
        reader.leave()
