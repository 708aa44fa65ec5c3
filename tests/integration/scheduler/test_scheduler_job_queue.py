"""Jobs that callers make or change come to the scheduler that leads through a queue in Redis."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from penstock_kit.errors import DeadlineExceeded
from penstock_kit.queue.keys import JOB_QUEUE
from penstock_local.embedded import EmbeddedRedis
from penstock_scheduler.adapters import job_queue
from penstock_scheduler.adapters.job_queue import RedisJobQueue
from penstock_scheduler.adapters.redis import Redis
from penstock_scheduler.app import Scheduler
from penstock_scheduler.usecases import reconcile
from support.waiting import eventually


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """Looks at the server."""
    connection = Redis(redis_url, "test")
    await connection.ask(b"DEL", JOB_QUEUE)
    yield connection
    connection.close()


async def test_what_a_follower_was_asked_comes_to_the_leader_without_its_next_look(
    idle_bench: Any, redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_bench.registry.push()
    idle_bench.overrides["redis_url"] = redis_url
    await idle_bench.start()
    await idle_bench.agent()
    client = idle_bench.client()
    # From here on the leader looks at the database only if something wakes it.
    monkeypatch.setattr(reconcile, "TICK_SECONDS", 3600.0)
    await client.create_job("first")
    await client.until_job("RUNNING", "first")
    second = f"unix:{idle_bench.folder}/s2"
    follower = Scheduler(idle_bench.settings(scheduler_listen=second), idle_bench.failures.append)
    await follower.start()
    try:
        other = idle_bench.client(second)
        await other.create_job("more")
        await client.until_job("RUNNING", "more")
        await other.cancel_job("more")
        await client.until_job("CANCELLED", "more")
        assert await redis.ask(b"LLEN", JOB_QUEUE) == 0, "all were taken"
    finally:
        await follower.stop()


async def test_jobs_are_taken_in_the_order_in_which_they_were_put(redis: Redis) -> None:
    queue = RedisJobQueue(redis, redis)
    for name in ("one", "two", "three"):
        await queue.put(name)
    assert await queue.take() == ["one", "two", "three"]


async def test_the_queue_is_bounded_while_nobody_takes(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "JOB_QUEUE_LENGTH", 3)
    queue = RedisJobQueue(redis, redis)
    for number in range(5):
        await queue.put(f"job-{number}")
    assert await queue.take() == ["job-2", "job-3", "job-4"]


async def test_callers_do_not_wait_for_a_redis_that_says_nothing(
    redis_server: EmbeddedRedis, redis: Redis
) -> None:
    moment = 0.0
    queue = RedisJobQueue(redis, redis, clock=lambda: moment)
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(30):
            for number in range(1000):  # of half a second each, if each asked again
                await queue.put(f"job-{number}")
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)
    moment += job_queue.AWAY_SECONDS
    await queue.put("later")
    assert (await queue.take())[-1] == "later"


async def test_callers_that_come_at_once_leave_one_connection_open(redis: Redis, redis_url: str) -> None:
    shared = Redis(redis_url, "test-shared")
    try:
        await asyncio.gather(*(shared.ask(b"PING") for _ in range(20)))
        assert await shared.ask(b"PING") == b"PONG"

        async def one_is_left() -> bool:
            clients: bytes = await redis.ask(b"CLIENT", b"LIST")
            return clients.count(b"name=test-shared ") == 1

        await eventually(one_is_left)
    finally:
        shared.close()


async def test_whoever_asks_after_an_answer_that_did_not_come_asks_on_a_new_connection(redis: Redis) -> None:
    with pytest.raises(DeadlineExceeded):
        await redis.ask(b"BLPOP", b"pk1:{jobs}:nothing", 0, timeout=0.05)
    assert await redis.ask(b"PING") == b"PONG"


async def test_without_redis_jobs_are_found_in_the_database(bench: Any, client: Any) -> None:
    await bench.agent()  # this bench has no Redis
    await client.create_job()
    await client.until_job("RUNNING")
    await client.cancel_job()
    await client.until_job("CANCELLED")
