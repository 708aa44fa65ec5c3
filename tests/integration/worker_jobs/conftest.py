"""An agent with a real fork server and real ranks, a scripted scheduler, a real registry and Redis."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from penstock_kit.db import migrate
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.keys import JOB_EVENTS
from penstock_kit.rpc import open_channel
from penstock_worker import app
from penstock_worker.settings import WorkerSettings
from support.agent_world import World
from support.artifact_caller import ArtifactCaller
from support.registry_world import Registry, running_registry
from support.task_events import Events

TESTS = str(Path(__file__).parents[2])
KIND = "support.job_kinds:run"
LAUNCHER = "penstock_worker.adapters.jobs.launcher"

RunAgent = Callable[..., AbstractAsyncContextManager[None]]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    found = World(f"unix:{tmp_path}/world.sock")
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
def registry_database(databases: Any) -> Iterator[str]:
    url = databases.create_from("registry", lambda url: migrate(url, "registry"))
    yield url
    databases.drop(url)


@pytest.fixture
async def registry(registry_database: str, short_path: Path) -> AsyncIterator[Registry]:
    async with running_registry(short_path, registry_database, allow_python_runtime=True) as running:
        yield running


@pytest.fixture
async def artifacts(registry: Registry) -> AsyncIterator[ArtifactCaller]:
    channel = open_channel(registry.app.address)
    yield ArtifactCaller(channel)
    await channel.close()


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, world: World, registry: Registry) -> WorkerSettings:
    return WorkerSettings(
        data_dir=tmp_path / "data",
        redis_url=redis_url,
        registry_address=registry.app.address,
        scheduler_address=world.address,
        worker_listen=f"unix:{tmp_path}/worker.sock",
        worker_node="test-node",
        worker_orphan_drain_seconds=1,
        worker_job_grace_seconds=5,
    )


@pytest.fixture
def run_agent(settings: WorkerSettings) -> RunAgent:
    """Runs an agent for as long as a context lasts. Settings can be changed; `torch` has it preloaded."""

    @contextlib.asynccontextmanager
    async def run(*, torch: bool = False, train: str = KIND, **changes: object) -> AsyncIterator[None]:
        changed = settings.model_copy(update=changes)
        preload = ["support.toy_replica", LAUNCHER, *(["torch.distributed"] if torch else [])]
        async with app.agent(
            changed,
            entry="support.toy_replica:run_replica",
            preload=preload,
            search_path=[TESTS],
            kinds={"train": train, "evaluate": KIND},
        ):
            yield

    return run


@pytest.fixture
async def events(redis_url: str) -> AsyncIterator[Events]:
    """What arrives in Redis of what happens in jobs."""
    connection = await Connection.connect(Address.parse(redis_url), "test")
    await connection.command("DEL", JOB_EVENTS)
    yield Events(connection)
    connection.close()
