"""A way to Redis that falls silent while both ends keep their connections."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader
from penstock_kit.queue import sender as module
from penstock_kit.queue.reader import QueueReader
from penstock_kit.queue.sender import RequestSender
from support.chaos.wire import Wire
from support.waiting import eventually

QUEUE = "digits:1:0123456789ab"


def header() -> RequestHeader:
    return RequestHeader(deadline_unix_micros=int((time.time() + 60) * 1e6))


async def test_no_reply_is_handed_to_a_connection_that_only_redis_takes_for_alive(
    redis_url: str, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)
    client = redis.Redis.from_url(redis_url)
    reader = QueueReader(redis_url, QUEUE, "replica-1.1")

    def connections() -> list[str]:
        return [each["id"] for each in client.client_list() if each["name"].startswith("penstock-gateway:")]

    async def answer_all(sender: RequestSender) -> list[Any]:
        futures = [sender.submit(QUEUE, header(), b"%d" % number) for number in range(20)]
        async with asyncio.timeout(20):
            while not all(future.done() for future in futures):
                # One reply, one pop: each that a dead connection gets is one that nobody gets.
                requests = await asyncio.to_thread(reader.read, 1, 100)
                reader.finish([(request, ReplyHeader(), request.payload) for request in requests])
        return [future.result().payload for future in futures]

    with Wire(Path(redis_url.removeprefix("unix://")), short_path / "redis.sock") as wire:
        sender = RequestSender(f"unix://{wire.address}", "gateway-1")
        await sender.start()
        try:
            await answer_all(sender)
            former = connections()
            assert len(former) == 2
            wire.silence()

            async def lost() -> bool:
                return not sender.connected

            await eventually(lost)
            wire.speak()

            async def connected() -> bool:
                return sender.connected

            await eventually(connected)
            assert await answer_all(sender) == [b"%d" % number for number in range(20)]
            assert len(connections()) == 2
            assert not set(former) & set(connections())
            assert sender.sent_again == 0
        finally:
            await sender.stop()
    client.close()
    await asyncio.to_thread(reader.leave)


async def test_a_replica_leaves_all_its_connections_when_one_falls_silent(
    redis_url: str, short_path: Path
) -> None:
    with Wire(Path(redis_url.removeprefix("unix://")), short_path / "redis.sock") as wire:
        reader = QueueReader(f"unix://{wire.address}", QUEUE, "replica-1.1")
        assert reader.read(1, 0) == []
        assert reader.heartbeat()
        reading = asyncio.create_task(asyncio.to_thread(reader.read, 1, 120_000))

        def waits() -> bool:
            with redis.Redis.from_url(redis_url) as client:
                return any(each["cmd"] == "xreadgroup" for each in client.client_list())

        async def waiting() -> bool:
            return await asyncio.to_thread(waits)

        await eventually(waiting)
        wire.silence()
        assert not await asyncio.to_thread(reader.heartbeat)
        # Not after the two minutes for which Redis was asked to wait.
        async with asyncio.timeout(60):
            assert await reading == []
        wire.speak()
        await asyncio.to_thread(reader.leave)
