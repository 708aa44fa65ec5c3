"""A channel over several addresses: dead ones, ones that refuse, ones that say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.worker.v1 import worker_service_pb2 as pb
from penstock.worker.v1 import worker_service_pb2_grpc as pb_grpc
from penstock_kit.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from penstock_kit.rpc import FailoverChannel, RpcServer, addresses_of, open_channel

SERVICE = "penstock.worker.v1.WorkerService"


class Servicer(pb_grpc.WorkerServiceServicer):
    """Answers with its number, unless it is told to refuse or to hang."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0
        self.error: Exception | None = None
        self.hang = False

    async def GetWorker(self, request: pb.GetWorkerRequest, context: Any) -> pb.Worker:
        await self._behave()
        return pb.Worker(cache_limit_bytes=self.number)

    async def TailReplicaLog(
        self, request: pb.TailReplicaLogRequest, context: Any
    ) -> AsyncIterator[pb.TailReplicaLogResponse]:
        await self._behave()
        yield pb.TailReplicaLogResponse(lines=[str(self.number)])

    async def _behave(self) -> None:
        self.calls += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def served(folder: Path, number: int) -> AsyncIterator[tuple[Servicer, RpcServer]]:
    servicer = Servicer(number)
    server = RpcServer(f"unix:{folder}/{number}.sock")
    server.add(pb_grpc.add_WorkerServiceServicer_to_server, servicer, SERVICE)
    await server.start()
    try:
        yield servicer, server
    finally:
        await server.stop(0)


async def number_of(stub: Any, **named: Any) -> int:
    return int((await stub.GetWorker(pb.GetWorkerRequest(), **named)).cache_limit_bytes)


async def test_a_dead_first_address_costs_no_call(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 2),
        open_channel(f"unix:{tmp_path}/1.sock, unix:{tmp_path}/2.sock") as channel,
    ):
        stub = pb_grpc.WorkerServiceStub(channel)
        assert await number_of(stub) == 2
        assert isinstance(channel, FailoverChannel)
        assert channel.current == 1, "the next call begins where this one was answered"


async def test_one_that_refuses_is_left_for_the_one_that_leads(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 1) as (follower, _),
        served(tmp_path, 2) as (leader, _),
        open_channel(f"unix:{tmp_path}/1.sock,unix:{tmp_path}/2.sock") as channel,
    ):
        follower.error = Unavailable("Another scheduler leads.")
        stub = pb_grpc.WorkerServiceStub(channel)
        assert [await number_of(stub) for _ in range(3)] == [2, 2, 2]
        assert (follower.calls, leader.calls) == (1, 3)


async def test_one_that_ends_is_left_within_the_call(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 1) as (_, first),
        served(tmp_path, 2),
        open_channel(f"unix:{tmp_path}/1.sock,unix:{tmp_path}/2.sock") as channel,
    ):
        stub = pb_grpc.WorkerServiceStub(channel)
        assert await number_of(stub) == 1
        await first.stop(0)
        assert await number_of(stub) == 2


async def test_a_stream_that_is_refused_ends_and_the_next_one_goes_elsewhere(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 1) as (follower, _),
        served(tmp_path, 2),
        open_channel(f"unix:{tmp_path}/1.sock,unix:{tmp_path}/2.sock") as channel,
    ):
        follower.error = Unavailable("Another scheduler leads.")
        stub: Any = pb_grpc.WorkerServiceStub(channel)
        with pytest.raises(Unavailable, match="leads"):
            [m async for m in stub.TailReplicaLog(pb.TailReplicaLogRequest())]
        messages = [m async for m in stub.TailReplicaLog(pb.TailReplicaLogRequest())]
        assert [line for m in messages for line in m.lines] == ["2"]


async def test_one_that_says_nothing_fails_one_call_and_is_left(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 1) as (paused, _),
        served(tmp_path, 2),
        open_channel(f"unix:{tmp_path}/1.sock,unix:{tmp_path}/2.sock") as channel,
    ):
        paused.hang = True
        stub = pb_grpc.WorkerServiceStub(channel)
        with pytest.raises(DeadlineExceeded):
            await number_of(stub, timeout=0.2)
        assert await number_of(stub, timeout=5) == 2


async def test_any_other_error_is_the_answer(tmp_path: Path) -> None:
    async with (
        served(tmp_path, 1) as (first, _),
        served(tmp_path, 2) as (second, _),
        open_channel(f"unix:{tmp_path}/1.sock,unix:{tmp_path}/2.sock") as channel,
    ):
        first.error = NotFound("no such worker")
        with pytest.raises(NotFound):
            await number_of(pb_grpc.WorkerServiceStub(channel))
        assert second.calls == 0


async def test_with_all_away_the_error_comes_within_the_deadline_and_names_one(tmp_path: Path) -> None:
    async with open_channel(f"unix:{tmp_path}/1.sock,unix:{tmp_path}/2.sock") as channel:
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match=r"\.sock"):
                await number_of(pb_grpc.WorkerServiceStub(channel), timeout=1.0)


async def test_bare_channels_are_left_without_a_second_try(tmp_path: Path) -> None:
    paths = [f"unix:{tmp_path}/{number}.sock" for number in (1, 2)]
    async with (
        served(tmp_path, 2),
        FailoverChannel([grpc.aio.insecure_channel(path) for path in paths]) as channel,
    ):
        stub = pb_grpc.WorkerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await number_of(stub)
        assert await number_of(stub) == 2


@pytest.mark.parametrize("text", ["", " ", ",,"])
def test_no_address_is_said_to_be_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="names no address"):
        addresses_of(text)


def test_addresses_are_told_apart_by_commas_and_named_once() -> None:
    assert addresses_of(" a:1, b:2 ,a:1,") == ("a:1", "b:2")
