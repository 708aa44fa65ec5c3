"""A model is pushed, served, updated and rolled back through the one door, as a person would do it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import penstock
from penstock.common.v1 import resources_pb2
from penstock.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PenstockError,
    Reason,
)
from penstock.scheduler.v1 import deployment_pb2
from support.onnx_models import save_adder

OPTIONS = penstock.PackageOptions(max_batch_size=16)


@pytest.fixture
def client(mesh: Any) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        yield client


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of the test's own: the mesh is shared."""
    return request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")[:50].rstrip("-_")


def push(client: penstock.Client, folder: Path, name: str, *addends: float) -> None:
    for addend in addends:
        client.push(save_adder(folder / f"{addend}.onnx", addend), model=name, options=OPTIONS)


def added(client: penstock.Client, name: str, **more: Any) -> float:
    """Return what the model that answers adds."""
    return float(client.predict(name, {"input": np.zeros((1, 1), np.float32)}, **more)["output"][0, 0])


def serve(client: penstock.Client, name: str, model: str | None = None) -> None:
    client.deploy(name, model)
    client.wait_for_deployment(name)


def test_an_update_is_seen_and_taken_back(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0, 2.0)
    serve(client, name, f"{name}:1")
    assert added(client, name) == 1.0
    serve(client, name, f"{name}:2")
    assert added(client, name) == 2.0
    client.rollback(name)
    client.wait_for_deployment(name)
    assert added(client, name) == 1.0
    revisions = client.list_deployment_revisions(name)
    assert [revision.targets[0].version for revision in revisions] == [1, 2, 1]


def test_traffic_is_shared_by_weight_and_a_version_can_be_chosen(
    client: penstock.Client, tmp_path: Path, name: str
) -> None:
    push(client, tmp_path, name, 1.0, 2.0)
    client.deploy(name, name, traffic={1: 80, 2: 20})
    client.wait_for_deployment(name)
    seen = Counter(added(client, name) for _ in range(300))
    # 300 draws at 20 %: mean 60, standard deviation 7; six of them either way.
    assert 18 <= seen[2.0] <= 102
    assert seen[1.0] + seen[2.0] == 300
    assert added(client, name, version=2) == 2.0
    with pytest.raises(NotFound) as caught:
        added(client, name, version=3)
    assert caught.value.reason is Reason.VERSION_NOT_FOUND


def test_a_deployment_follows_its_alias(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0, 2.0)
    client.set_alias(name, "champion", 1)
    serve(client, name, f"{name}@champion")
    assert added(client, name) == 1.0
    assert added(client, f"{name}@champion") == 1.0
    client.set_alias(name, "champion", 2, comment="better")
    deadline = asyncio.new_event_loop()
    try:
        until = deadline.time() + 20
        while added(client, name) != 2.0:
            assert deadline.time() < until
    finally:
        deadline.close()
    client.rollback_alias(name, "champion")
    moves = client.list_alias_moves(name)
    assert [(move.from_version, move.to_version) for move in moves] == [(2, 1), (1, 2), (0, 1)]


def test_no_call_fails_while_versions_change(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0, 2.0)
    serve(client, name, f"{name}:1")
    stop = threading.Event()
    seen: list[float] = []
    failures: list[PenstockError] = []

    def call() -> None:
        while not stop.is_set():
            try:
                seen.append(added(client, name))
            except PenstockError as error:
                failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for version in (2, 1, 2):
            serve(client, name, f"{name}:{version}")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert set(seen) == {1.0, 2.0}


def test_what_is_deployed_cannot_be_deleted(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0)
    serve(client, name)
    for delete in (lambda: client.delete_version(f"{name}:1"), lambda: client.delete_model(name)):
        with pytest.raises(FailedPrecondition) as caught:
            delete()
        assert caught.value.reason is Reason.IN_USE
    client.undeploy(name)
    client.delete_model(name)
    with pytest.raises(NotFound):
        client.get_model(name)


def test_the_same_push_twice_is_one_version(client: penstock.Client, tmp_path: Path, name: str) -> None:
    path = save_adder(tmp_path / "a.onnx", 1.0)
    key = "6f1c4f0a-3d7e-4bb4-a9d5-0c9b9ad1a7f1"
    first = client.push(path, model=name, options=OPTIONS, request_id=key)
    again = client.push(path, model=name, options=OPTIONS, request_id=key)
    assert (first.name, first.digest) == (again.name, again.digest)
    other = save_adder(tmp_path / "b.onnx", 2.0)
    with pytest.raises(PenstockError) as caught:
        client.push(other, model=name, options=OPTIONS, request_id=key)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert isinstance(caught.value, AlreadyExists | InvalidArgument | FailedPrecondition | Aborted)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input": np.zeros((1, 1), np.float64)}, "FP64"),
        ({"input": np.zeros((1, 2), np.float32)}, "shape"),
        ({"other": np.zeros((1, 1), np.float32)}, "other"),
        ({"input": np.zeros((0, 1), np.float32)}, "empty|no rows|0 rows"),
        (
            {"input": np.zeros((1, 1), np.float32), "more": np.zeros((1, 1), np.float32)},
            "more",
        ),
    ],
    ids=["dtype", "shape", "name", "empty", "count"],
)
def test_wrong_tensors_are_named(
    client: penstock.Client, tmp_path: Path, inputs: dict[str, Any], words: str
) -> None:
    if not [d for d in client.list_deployments() if d.name == "deployments/adder"]:
        push(client, tmp_path, "adder", 1.0)
        serve(client, "adder")
    with pytest.raises(InvalidArgument, match=words) as caught:
        client.predict("adder", inputs)
    assert caught.value.reason is Reason.INVALID_TENSOR
    assert added(client, "adder") == 1.0


def test_nan_and_infinity_are_served(client: penstock.Client, mesh: Any, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0)
    serve(client, name)
    rows = np.array([[np.nan], [np.inf], [-np.inf]], np.float32)
    answer = client.predict(name, {"input": rows})["output"]
    np.testing.assert_array_equal(answer, rows)
    body = '{"model_name": "%s", "input_data": [[NaN], [Infinity]]}' % name  # noqa: UP031 - braces
    reply = httpx.post(f"{mesh.url}/predict", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    assert "NaN" in reply.text


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "reason"),
    [
        ("POST", "/predict", {"content-type": "application/json"}, b'{"model_name": ', 400, "MALFORMED_BODY"),
        ("POST", "/predict", {"content-type": "text/csv"}, b"a,b", 415, None),
        ("POST", "/predict", {"content-type": "application/json"}, b'{"input_data": [1]}', 400, None),
        ("GET", "/no/such/path", {}, None, 404, "UNKNOWN_METHOD"),
        ("POST", "/v2/models/nobody/infer", {}, b'{"inputs": []}', 404, "DEPLOYMENT_NOT_FOUND"),
        ("DELETE", "/v2/models/nobody/infer", {}, None, 405, None),
        ("POST", "/v2/models/nobody/infer", {"content-encoding": "br"}, b"x", 415, None),
    ],
)
def test_bad_http_gets_a_status_a_reason_and_words(
    mesh: Any,
    method: str,
    path: str,
    headers: dict[str, str],
    content: bytes | None,
    status: int,
    reason: str | None,
) -> None:
    reply = httpx.request(method, mesh.url + path, headers=headers, content=content, timeout=20)
    assert reply.status_code == status, reply.text
    assert len(reply.json()["error"]) > 10
    assert reason is None or reply.json()["reason"] == reason


def test_a_payload_over_the_limit_is_refused_and_nothing_else(
    client: penstock.Client, mesh: Any, tmp_path: Path, name: str
) -> None:
    push(client, tmp_path, name, 1.0)
    serve(client, name)
    reply = httpx.post(f"{mesh.url}/v2/models/{name}/infer", content=b"x" * (65 * 1024 * 1024), timeout=30)
    assert reply.status_code == 413
    assert reply.json()["reason"] == "PAYLOAD_TOO_LARGE"
    with pytest.raises(PenstockError) as caught:
        client.predict(name, {"input": np.zeros((17 * 1024 * 1024, 1), np.float32)}, timeout=30)
    assert caught.value.reason is Reason.PAYLOAD_TOO_LARGE
    assert added(client, name) == 1.0


def test_a_large_batch_is_answered_whole(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0)
    serve(client, name)
    rows = np.arange(1_000_000, dtype=np.float32).reshape(-1, 1)
    np.testing.assert_array_equal(client.predict(name, {"input": rows})["output"], rows + 1)


def test_a_project_bounds_what_is_deployed_for_it(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0)
    client.create_project(name, quota=resources_pb2.Resources(cpu_millis=150))
    small = resources_pb2.Resources(cpu_millis=100)
    client.deploy(name, replicas=2, resources=small, project=name)
    with pytest.raises(DeadlineExceeded, match=r"holds 0\.1 of 0\.15 cores \(this needs 0\.1\)"):
        client.wait_for_deployment(name, timeout=3.0)
    with pytest.raises(FailedPrecondition, match="names it") as refused:
        client.delete_project(name)
    assert refused.value.reason is Reason.IN_USE
    client.update_project(name, quota=resources_pb2.Resources(cpu_millis=200))
    client.wait_for_deployment(name)
    assert client.get_project(name).used.cpu_millis == 200
    assert {"projects/default", f"projects/{name}"} <= {each.name for each in client.list_projects()}
    client.undeploy(name)


def test_a_version_that_does_not_exist_is_not_deployed(
    client: penstock.Client, tmp_path: Path, name: str
) -> None:
    push(client, tmp_path, name, 1.0)
    with pytest.raises(NotFound) as caught:
        client.deploy(name, f"{name}:9")
    assert caught.value.reason is Reason.VERSION_NOT_FOUND
    with pytest.raises(InvalidArgument, match="100"):
        client.deploy(
            name,
            targets=[deployment_pb2.Target(model=f"models/{name}", version=1, weight=w) for w in (50, 60)],
        )


def test_serving_outlives_the_database_and_health_says_so(
    client: penstock.Client, mesh: Any, tmp_path: Path, name: str
) -> None:
    push(client, tmp_path, name, 1.0)
    serve(client, name)
    pid = mesh.pid("postgres")
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(20):
            assert added(client, name) == 1.0
    finally:
        os.kill(pid, signal.SIGCONT)
    assert client.get_deployment(name).ready_replicas == 1


def test_a_killed_replica_fails_no_call(client: penstock.Client, tmp_path: Path, name: str) -> None:
    push(client, tmp_path, name, 1.0)
    serve(client, name)
    (replica,) = client.list_replicas(deployment=name)
    os.kill(replica.pid, signal.SIGKILL)
    assert added(client, name, timeout=20) == 1.0
    (again,) = client.list_replicas(deployment=name)
    assert again.name == replica.name
