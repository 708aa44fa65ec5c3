"""A mesh on servers that somebody else runs: not there at first, gone later, back again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

import penstock
from penstock.errors import Unavailable
from penstock.gateway.v1 import gateway_service_pb2, gateway_service_pb2_grpc
from penstock_local.embedded import EmbeddedPostgres, EmbeddedRedis
from penstock_local.state import MeshRecord
from support.mesh_process import Mesh
from support.onnx_models import save_adder


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"), persist=False)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mesh(
    postgres: EmbeddedPostgres,
    redis: EmbeddedRedis,
    start_mesh: Callable[..., Mesh],  # after its servers, so that it is stopped before them
    tmp_path_factory: pytest.TempPathFactory,
) -> Mesh:
    """A mesh that was started before its servers were, and serves the model `adder`."""
    directory = tmp_path_factory.getbasetemp()
    started: list[Mesh] = []
    env = {"PENSTOCK_DATABASE_URL": postgres.url, "PENSTOCK_REDIS_URL": redis.url}
    thread = threading.Thread(target=lambda: started.append(start_mesh(env=env)))
    thread.start()
    found = waiting(directory)
    assert httpx.get(f"{found.url}/v2/health/live", timeout=10).status_code == 200
    refused = httpx.get(f"{found.url}/v2/health/ready", timeout=10)
    assert refused.status_code == 503, refused.text
    assert thread.is_alive(), "it is not ready without its servers"
    postgres.start()
    redis.start()
    thread.join(90)
    (mesh,) = started
    path = save_adder(tmp_path_factory.mktemp("model") / "adder.onnx", 1.0)
    with penstock.Client(mesh.address) as client:
        client.push(path, options=penstock.PackageOptions(max_batch_size=8))
        client.deploy("adder")
        client.wait_for_deployment("adder")
        client.wait_ready("adder")
    return mesh


def waiting(directory: Path) -> MeshRecord:
    """The record of a mesh whose gateway lives, though it may not be ready."""
    found: list[MeshRecord] = []

    def lives() -> bool:
        for path in directory.glob("mesh*/data"):
            record = MeshRecord.read(path)
            if record is not None:
                try:
                    httpx.get(f"{record.url}/v2/health/live", timeout=5)
                except httpx.TransportError:
                    continue
                found.append(record)
        return bool(found)

    wait(lives, "the gateway lives")
    return found[0]


def wait(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait for a condition, with a pause that a mesh under test does not feel."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        pause.wait(0.1)
    pytest.fail(f"not within {seconds:g} s: {what}")


def added(client: penstock.Client, **more: float) -> float:
    return float(client.predict("adder", {"input": np.ones((1, 1), np.float32)}, **more).only[0, 0])


def ready(mesh: Mesh) -> int:
    return httpx.get(f"{mesh.url}/v2/health/ready", timeout=10).status_code


def missed(mesh: Mesh) -> set[str]:
    """What the gateway says that it cannot reach."""
    with grpc.insecure_channel(mesh.address) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        gateway = stub.GetGateway(gateway_service_pb2.GetGatewayRequest(), timeout=10)
    return {dependency.name for dependency in gateway.dependencies if not dependency.ready}


def test_a_mesh_started_before_its_servers_waits_says_so_and_serves(mesh: Mesh) -> None:
    assert ready(mesh) == 200
    with penstock.Client(mesh.address) as client:
        assert added(client) == 2.0


def test_without_its_database_models_are_served_and_changes_fail_in_words_until_it_is_back(
    mesh: Mesh, postgres: EmbeddedPostgres
) -> None:
    with penstock.Client(mesh.address, retry_seconds=0.0) as client:
        assert added(client) == 2.0
        postgres.stop()
        try:
            wait(lambda: "registry" in missed(mesh), "the gateway misses the registry")
            assert added(client) == 2.0
            with pytest.raises(Unavailable, match="database"):
                client.list_models()
        finally:
            postgres.start()
        wait(lambda: not missed(mesh), "all is well again")
        assert [model.name for model in client.list_models()] == ["models/adder"]
        assert added(client) == 2.0


def test_without_redis_health_says_so_and_what_was_accepted_is_answered_when_it_is_back(
    mesh: Mesh, redis: EmbeddedRedis
) -> None:
    answers: list[float] = []

    def call() -> None:
        with penstock.Client(mesh.address) as own:
            answers.append(added(own, timeout=60))

    with penstock.Client(mesh.address) as client:
        assert added(client) == 2.0
        redis.stop()
        threads = [threading.Thread(target=call) for _ in range(4)]
        try:
            wait(lambda: ready(mesh) == 503, "the gateway says that it is not ready")
            assert "redis" in missed(mesh)
            for thread in threads:
                thread.start()
        finally:
            redis.start()
        for thread in threads:
            thread.join(60)
        assert answers == [2.0] * 4
        wait(lambda: ready(mesh) == 200, "the gateway is ready again")
        assert added(client) == 2.0


def test_without_redis_and_database_it_stops_within_seconds(
    mesh: Mesh, postgres: EmbeddedPostgres, redis: EmbeddedRedis
) -> None:
    with penstock.Client(mesh.address) as client:
        assert added(client) == 2.0  # its replica may not know yet that the answer has arrived
    redis.stop()
    postgres.stop()
    began = time.monotonic()
    mesh.stop()
    assert time.monotonic() - began < 20, "no part of it waited until its time was over"
