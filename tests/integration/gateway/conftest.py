from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from penstock_kit.queue.keys import queue_name
from penstock_local.embedded import EmbeddedRedis
from support import gateway_world
from support.gateway_world import GatewayProcess, Replica, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("w")).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def replica(redis_server: EmbeddedRedis) -> Iterator[Replica]:
    """Serves version 1 of the deployment "echo"."""
    redis_server.flush()
    made = Replica(redis_server.url, queue_name("echo", 1, gateway_world.DIGEST))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def gateway(
    world: World,
    replica: Replica,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GatewayProcess]:
    world.offer("echo", aliases={1: ["champion"]})
    made = GatewayProcess(
        world,
        redis_server.url,
        tmp_path_factory.mktemp("g"),
        PENSTOCK_MAX_MESSAGE_BYTES=str(4 << 20),
    ).start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _as_before(world: World, replica: Replica) -> Iterator[None]:
    yield
    replica.behave = gateway_world.echo
    world.starting_fails = ""
    for name in set(world.routes) - {"echo"}:
        world.withdraw(name)
    world.offer("echo", aliases={1: ["champion"]})


@pytest.fixture
async def channel(gateway: GatewayProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(
        gateway.target, options=[("grpc.max_receive_message_length", 64 << 20), ("grpc.enable_http_proxy", 0)]
    ) as made:
        yield made


@pytest.fixture
async def http(gateway: GatewayProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def log_folder(tmp_path: Path) -> Path:
    return tmp_path
