"""The gateway as a process: how it starts, refuses to start, drains, ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from penstock_kit.queue.keys import queue_name
from penstock_local.embedded import EmbeddedRedis
from penstock_local.ports import free_port
from support.gateway_world import DIGEST, GatewayProcess, Replica, World, wait_until

BODY = {"inputs": []}


@pytest.fixture
def own(world: World, redis_server: EmbeddedRedis, tmp_path: Path) -> Iterator[list[GatewayProcess]]:
    """Gateways of one test: append what you start."""
    started: list[GatewayProcess] = []
    yield started
    for one in started:
        one.stop(signal.SIGKILL)


def run_until_end(**settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "penstock_gateway"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        ended = run_until_end(PENSTOCK_GATEWAY_LISTEN=taken)
    assert ended.returncode == 1
    assert f"error: Cannot listen on {taken}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "192.0.2.1:80", "[::]:8080", "example.org:80", "8080"])
def test_another_address_than_loopback_is_refused_with_the_reason(address: str) -> None:
    ended = run_until_end(PENSTOCK_GATEWAY_LISTEN=address)
    assert ended.returncode == 1
    assert "PENSTOCK" in ended.stderr or "gateway_listen" in ended.stderr
    if address.startswith(("0.", "192", "[")):
        assert "no API keys yet" in ended.stderr


async def test_calls_under_way_are_answered_before_the_end(
    world: World, redis_url: str, tmp_path: Path, own: list[GatewayProcess]
) -> None:
    world.offer("slow")
    gateway = GatewayProcess(world, redis_url, tmp_path).start()
    own.append(gateway)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False) as http:
        await until_routed(http, "slow")
        waiting = asyncio.ensure_future(http.post("/v2/models/slow/infer", json=BODY))
        await until_waiting(http, "slow")
        ending = asyncio.ensure_future(asyncio.to_thread(gateway.stop))
        replica = Replica(redis_url, queue_name("slow", 1, DIGEST))
        try:
            assert (await waiting).json() == BODY
            assert await ending == 0
        finally:
            await asyncio.to_thread(replica.stop)


async def until_routed(http: httpx.AsyncClient, name: str) -> None:
    async with asyncio.timeout(20):
        while (await http.get(f"/v2/models/{name}/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_waiting(http: httpx.AsyncClient, name: str) -> None:
    line = f'penstock_gateway_inferences_in_flight{{deployment="{name}"}} 1.0'
    async with asyncio.timeout(20):
        while line not in (await http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_two_gateways_share_a_port_only_if_both_are_meant_to(
    world: World, redis_url: str, tmp_path: Path, own: list[GatewayProcess]
) -> None:
    port = str(free_port("127.0.0.1"))
    listen = {"PENSTOCK_GATEWAY_LISTEN": f"127.0.0.1:{port}"}
    share = {"PENSTOCK_GATEWAY_SHARE_PORT": "true"}
    for _ in range(2):
        gateway = GatewayProcess(world, redis_url, tmp_path, **listen, **share)
        gateway.port = int(port)
        own.append(gateway.start())
    ended = run_until_end(**listen)
    assert "Cannot listen on" in ended.stderr
    # Each call is a connection of its own, and the kernel spreads connections.
    names = {httpx.get(f"{own[0].url}/healthz", trust_env=False).json()["gateway"] for _ in range(60)}
    assert len(names) == 2


async def test_callers_of_a_gateway_that_ends_go_on_at_the_other_one(
    world: World, redis_url: str, tmp_path: Path, own: list[GatewayProcess]
) -> None:
    """No call is refused, also while a slow one keeps the old gateway from ending."""
    world.offer("slow")
    world.offer("quick")
    port = free_port("127.0.0.1")
    settings = {
        "PENSTOCK_GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "PENSTOCK_GATEWAY_SHARE_PORT": "true",
        "PENSTOCK_GATEWAY_DRAIN_SECONDS": "4",
    }
    for _ in range(2):
        gateway = GatewayProcess(world, redis_url, tmp_path, **settings)
        gateway.port = port
        own.append(gateway.start())
    replica = Replica(redis_url, queue_name("quick", 1, DIGEST), 2)
    ending: list[asyncio.Future[int]] = []
    counts = [0] * 8

    async def call_until_it_has_ended(number: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            slow = infer(b"\x0a\x04slow", timeout=60, wait_for_ready=True)
            while not ending or not ending[0].done():
                await infer(b"\x0a\x05quick", timeout=20, wait_for_ready=True)
                counts[number] += 1
                await asyncio.sleep(0.01)
            slow.cancel()

    try:
        calling = [asyncio.ensure_future(call_until_it_has_ended(number)) for number in range(8)]
        async with asyncio.timeout(20):
            while not all(counts):  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.02)
        before = list(counts)
        ending.append(asyncio.ensure_future(asyncio.to_thread(own[0].stop)))
        assert await ending[0] == 0
        await asyncio.gather(*calling)
        assert all(now > then for now, then in zip(counts, before, strict=True))
    finally:
        await asyncio.to_thread(replica.stop)


def test_without_its_services_it_lives_says_so_and_recovers(
    redis_url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, own: list[GatewayProcess]
) -> None:
    late = World(tmp_path_factory.mktemp("w"))
    gateway = GatewayProcess(late, redis_url, tmp_path).start(ready=False)
    own.append(gateway)
    answer = httpx.get(f"{gateway.url}/v2/health/ready", trust_env=False)
    assert answer.status_code == 503
    assert "routing table" in answer.json()["error"]
    assert httpx.get(f"{gateway.url}/v2/health/live", trust_env=False).status_code == 200
    refused = httpx.post(f"{gateway.url}/v2/models/echo/infer", json=BODY, trust_env=False)
    assert refused.status_code == 503
    late.start()
    try:
        wait_until(lambda: httpx.get(f"{gateway.url}/readyz", trust_env=False).status_code == 200)
    finally:
        late.stop()
    assert httpx.get(f"{gateway.url}/readyz", trust_env=False).status_code == 200


def test_help_names_every_setting() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "penstock_gateway", "--help"], capture_output=True, text=True, check=True
    )
    assert "PENSTOCK_GATEWAY_LISTEN" in shown.stdout
