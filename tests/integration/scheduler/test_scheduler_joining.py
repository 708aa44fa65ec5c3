"""Agents that may not join are told why, and what to set."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psutil
import pytest

from penstock.scheduler.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from penstock_kit.errors import Unauthenticated
from penstock_kit.joining import JOIN_TOKEN_KEY
from penstock_kit.rpc import open_channel

OLD, NEW = "an-old-token-0123456789", "a-new-token-0123456789"
SECONDS = 20.0


def own_address() -> str:
    """An address of this machine other than loopback; empty if it has none."""
    found = (
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    )
    return next(found, "")


async def attach(address: str, token: str = "") -> None:
    """Attach until a desired state comes; raises as the scheduler says."""
    node = node_pb2.Node(
        name="nodes/far",
        cpu_millis=1000,
        memory_bytes=1 << 30,
        devices=[node_pb2.Device(id="cpu", kind=node_pb2.DEVICE_KIND_CPU, memory_bytes=1 << 30)],
    )

    async def statuses() -> AsyncIterator[node_service_pb2.AttachRequest]:
        yield node_service_pb2.AttachRequest(node=node)
        await asyncio.Event().wait()

    metadata = [(JOIN_TOKEN_KEY, token)] if token else []
    async with asyncio.timeout(SECONDS), open_channel(address) as channel:
        stub: Any = node_service_pb2_grpc.NodeServiceStub(channel)
        async for _ in stub.Attach(statuses(), metadata=grpc.aio.Metadata(*metadata)):
            return


async def until_it_leads(bench: Any) -> str:
    """The port of a scheduler that takes agents over the network; returns when it leads."""
    await bench.eventually(lambda: bench.scheduler._reconciler.leading)
    return str(bench.scheduler.address.rpartition(":")[2])


async def test_without_a_token_a_far_agent_is_refused_and_a_near_one_taken(idle_bench: Any) -> None:
    far = own_address()
    if not far:
        pytest.skip("this machine has no address but loopback")
    await idle_bench.start(scheduler_listen="0.0.0.0:0")
    port = await until_it_leads(idle_bench)
    with pytest.raises(Unauthenticated, match="PENSTOCK_JOIN_TOKEN"):
        await attach(f"{far}:{port}", OLD)
    await attach(f"127.0.0.1:{port}")


async def test_with_tokens_whoever_knows_one_joins_from_anywhere(idle_bench: Any) -> None:
    await idle_bench.start(scheduler_listen="0.0.0.0:0", join_token=f"{OLD},{NEW}")
    port = await until_it_leads(idle_bench)
    address = f"{own_address() or '127.0.0.1'}:{port}"
    for token in (OLD, NEW):
        await attach(address, token)
    with pytest.raises(Unauthenticated, match="none of the scheduler's"):
        await attach(address, OLD + "x")
    with pytest.raises(Unauthenticated, match="with a join token only"):
        await attach(f"127.0.0.1:{port}")
