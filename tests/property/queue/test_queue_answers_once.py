"""Whatever happens in whatever order, each accepted request is answered exactly once, with its own answer.

A state machine drives one gateway and up to three replicas of one queue, on Redis and in memory. Replicas
read, finish, die (with and without having announced what they compute), are paused beyond their lease, or
leave; Redis forgets everything, or cuts its connections; callers cancel. In the end one healthy replica
serves what is left, and every caller must have had one answer: its own, or POISON_REQUEST if replicas
really died twice over its request.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader
from penstock_kit.errors import Reason
from penstock_kit.queue import keys
from penstock_kit.queue.memory import MemoryBroker, MemoryReader, MemorySender
from penstock_kit.queue.messages import Reply, Request
from penstock_kit.queue.ports import Reader, Sender
from penstock_kit.queue.reader import QueueReader
from penstock_kit.queue.reclaim import Mode, reclaim
from penstock_kit.queue.sender import RequestSender

T = TypeVar("T")
QUEUE = "digits:1:0123456789ab"
REPLICAS = st.integers(0, 2)


class _Loop:
    """An event loop in a thread, so that rules can be plain functions."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Replica:
    """One life of one replica: what it holds, and what it announced."""

    def __init__(self, reader: Reader, consumer: str) -> None:
        self.reader = reader
        self.consumer = consumer
        self.held: list[Request] = []
        self.running: Request | None = None


class Machine(RuleBasedStateMachine):
    """The rules; the two worlds say how to make the ends."""

    patience_ms = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = _Loop()
        self.lives = 0
        self.sent = 0
        # Payload → its future, and all outcomes that its callers saw.
        self.futures: dict[bytes, asyncio.Future[Reply]] = {}
        self.ids: dict[bytes, bytes] = {}
        self.cancelled: set[bytes] = set()
        # Payload → how many replicas died while they computed it alone.
        self.deaths: dict[bytes, int] = {}
        self.sender: Sender
        self.replicas: list[Replica] = []

    # What differs between the worlds

    def make_sender(self) -> Sender:
        raise NotImplementedError

    def make_reader(self, consumer: str) -> Reader:
        raise NotImplementedError

    def reclaim(self, consumer: str, mode: Mode) -> None:
        raise NotImplementedError

    def lose_data(self) -> None:
        raise NotImplementedError

    def cut(self) -> None:
        """Only Redis has connections."""

    def abandon(self, replica: Replica) -> None:
        """Close what a killed process would have had closed for it."""

    # Rules

    @initialize()
    def begin(self) -> None:
        self.sender = self.make_sender()
        self.loop.run(self.sender.start())
        self.replicas = [self._born() for _ in range(3)]

    @rule(count=st.integers(1, 5), priority=st.sampled_from(keys.PRIORITIES))
    def submit(self, count: int, priority: int) -> None:
        async def send() -> None:
            for _ in range(count):
                payload = b"%d" % self.sent
                self.sent += 1
                header = RequestHeader(deadline_unix_micros=int((time.time() + 600) * 1e6))
                self.futures[payload] = self.sender.submit(QUEUE, header, payload, priority)
                self.ids[payload] = header.id

        self.loop.run(send())

    @rule(which=REPLICAS, count=st.integers(1, 4))
    def read(self, which: int, count: int) -> None:
        replica = self.replicas[which]
        found = replica.reader.read(count, self.patience_ms)
        assert len(found) <= count
        replica.held += found

    @rule(which=REPLICAS, count=st.integers(1, 4))
    def finish(self, which: int, count: int) -> None:
        """Answer the oldest that it holds; suspects one by one, announced."""
        replica = self.replicas[which]
        done, replica.held = replica.held[:count], replica.held[count:]
        self._answer(replica, done)

    @rule(which=REPLICAS, count=st.integers(1, 4))
    def exchange(self, which: int, count: int) -> None:
        """Answer all that is no suspect, and read in the same step."""
        replica = self.replicas[which]
        done = [(r, None, b"answer to " + r.payload) for r in replica.held if not r.suspect]
        replica.held = [request for request in replica.held if request.suspect]
        found = replica.reader.exchange(done, count, self.patience_ms)
        assert len(found) <= count
        replica.held += found

    @rule(which=REPLICAS, count=st.integers(1, 8), deadly=st.booleans())
    def serve(self, which: int, count: int, deadly: bool) -> None:
        """One round of a replica as it should be: suspects alone, announced. One of them may kill it."""
        replica = self.replicas[which]
        replica.held += replica.reader.read(count, self.patience_ms)
        suspects = [request for request in replica.held if request.suspect]
        self._answer(replica, [request for request in replica.held if not request.suspect])
        replica.held = suspects
        while replica.held:
            replica.running = replica.held[0]
            replica.reader.mark_running(replica.running)
            if deadly:
                self.die(which)
                return
            self._answer(replica, [replica.held.pop(0)])

    @rule(which=REPLICAS)
    def die_over_a_batch(self, which: int) -> None:
        """It had read what there was."""
        self.replicas[which].reader.read(16, self.patience_ms)
        self.die(which)

    @rule(which=REPLICAS)
    def die_twice(self, which: int) -> None:
        """The second time over the first of what it had read."""
        self.die_over_a_batch(which)
        self.serve(which, count=8, deadly=True)

    @rule(which=REPLICAS)
    def die(self, which: int) -> None:
        """kill -9; the agent sees it at once."""
        replica = self.replicas[which]
        if replica.running is not None:
            payload = replica.running.payload
            self.deaths[payload] = self.deaths.get(payload, 0) + 1
        self.abandon(replica)
        self.reclaim(replica.consumer, Mode.DEAD)
        self.replicas[which] = self._born()

    @rule(which=REPLICAS)
    def be_taken_for_dead(self, which: int) -> None:
        """Paused for long; it goes on afterwards with what it held."""
        replica = self.replicas[which]
        if replica.running is None:
            self.reclaim(replica.consumer, Mode.DEAD)

    @rule(which=REPLICAS)
    def leave(self, which: int) -> None:
        self.replicas[which].reader.leave()
        self.replicas[which] = self._born()

    @rule(number=st.integers(0, 100))
    def cancel(self, number: int) -> None:
        waiting = sorted(payload for payload, future in self.futures.items() if not future.done())
        if waiting:
            payload = waiting[number % len(waiting)]

            async def give_up() -> bool:
                return self.sender.cancel(self.ids[payload])

            if self.loop.run(give_up()):
                self.cancelled.add(payload)

    @rule()
    def redis_forgets(self) -> None:
        self.lose_data()

    @rule()
    def connections_break(self) -> None:
        self.cut()

    def teardown(self) -> None:
        try:
            if self.replicas:
                self._serve_the_rest()
                self._check()
        finally:
            for replica in self.replicas:
                replica.reader.leave()
            if self.replicas:
                self.loop.run(self.sender.stop())
            self.loop.close()

    # The end

    def _serve_the_rest(self) -> None:
        for replica in self.replicas:
            replica.reader.leave()
        healthy = self._born()
        self.replicas = [healthy]
        until = time.monotonic() + 20
        while not all(future.done() for future in list(self.futures.values())):
            assert time.monotonic() < until, "requests were lost"
            healthy.reader.heartbeat()
            self._answer(healthy, healthy.reader.read(16, 20))
        while rest := healthy.reader.read(16, 0):
            self._answer(healthy, rest)
        assert healthy.reader.depth() == 0, "entries were left behind"

    def _check(self) -> None:
        for payload, future in self.futures.items():
            if payload in self.cancelled:
                assert future.cancelled()
                continue
            reply = future.result()
            if reply.header.reason == Reason.POISON_REQUEST:
                assert self.deaths.get(payload), "an innocent request was called poison"
            else:
                assert (reply.header.code, reply.payload) == (0, b"answer to " + payload)

    def _born(self) -> Replica:
        self.lives += 1
        consumer = f"replica.{self.lives}"
        replica = Replica(self.make_reader(consumer), consumer)
        replica.reader.heartbeat()
        return replica

    def _answer(self, replica: Replica, requests: list[Request]) -> None:
        replica.reader.finish([(r, ReplyHeader(), b"answer to " + r.payload) for r in requests])
        if replica.running in requests:
            replica.reader.mark_running(None)
            replica.running = None


class MemoryMachine(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()

    def make_sender(self) -> Sender:
        return MemorySender(self.broker, "gateway-1")

    def make_reader(self, consumer: str) -> Reader:
        return MemoryReader(self.broker, QUEUE, consumer)

    def reclaim(self, consumer: str, mode: Mode) -> None:
        self.broker.reclaim(QUEUE, consumer, mode)

    def lose_data(self) -> None:
        self.broker.lose_data()


def redis_machine(url: str) -> type[Machine]:
    class RedisMachine(Machine):
        # A request that was just submitted needs a moment to reach Redis.
        patience_ms = 5

        def __init__(self) -> None:
            super().__init__()
            self.redis = redis.Redis.from_url(url)
            self.redis.flushall()

        def make_sender(self) -> Sender:
            return RequestSender(url, f"gateway-{time.time_ns()}")

        def make_reader(self, consumer: str) -> Reader:
            return QueueReader(url, QUEUE, consumer)

        def reclaim(self, consumer: str, mode: Mode) -> None:
            self.loop.run(reclaim(url, QUEUE, consumer, mode))

        def lose_data(self) -> None:
            self.redis.flushall()

        def cut(self) -> None:
            self.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        def abandon(self, replica: Replica) -> None:
            reader = replica.reader
            assert isinstance(reader, QueueReader)
            for connection in (reader._reading, reader._writing, reader._control):
                connection.close()

        def teardown(self) -> None:
            super().teardown()
            self.redis.close()

    return RedisMachine


_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def test_each_request_is_answered_once_in_memory():
    run_state_machine_as_test(
        MemoryMachine, settings=settings(max_examples=100, stateful_step_count=40, **_COMMON)
    )


@pytest.mark.timeout(180)
def test_each_request_is_answered_once_on_redis(redis_url, monkeypatch):
    monkeypatch.setattr("penstock_kit.queue.sender.CHECK_SECONDS", 0.05)
    run_state_machine_as_test(
        redis_machine(redis_url), settings=settings(max_examples=25, stateful_step_count=40, **_COMMON)
    )
