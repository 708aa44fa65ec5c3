"""Bytes that were changed behind the mesh's back are never served; models that cannot load say why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    PenstockError,
    Reason,
)
from penstock.scheduler.v1 import deployment_pb2
from support.mesh_process import Mesh
from support.onnx_models import save_adder

OPTIONS = penstock.PackageOptions(max_batch_size=8)
DOUBLE = """
INPUTS = ["x:FP32:-1,4"]
OUTPUTS = ["y:FP32:-1,4"]


class Model:
    def __init__(self, *_):
        {first}

    def predict(self, inputs):
        return {{"y": inputs["x"] * 2}}
"""


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh]) -> Mesh:
    """A mesh whose operator lets models bring code."""
    return shared_mesh(env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"})


@pytest.fixture
def client(mesh: Mesh) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        yield client


def added(client: penstock.Client, name: str) -> float:
    return float(client.predict(name, {"input": np.zeros((1, 1), np.float32)}, timeout=20).only[0, 0])


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, whatever its permissions, at the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def write_code(folder: Path, first: str) -> Path:
    folder.mkdir()
    (folder / "model.py").write_text(DOUBLE.format(first=first))
    return folder


def test_code_is_served_where_the_operator_allows_it(client: penstock.Client, tmp_path: Path) -> None:
    client.push(write_code(tmp_path / "double", "pass"), options=OPTIONS)
    client.deploy("double")
    client.wait_for_deployment("double")
    client.wait_ready("double")
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(client.predict("double", {"x": x}).only, x * 2)


def test_a_version_that_cannot_load_says_why_and_the_one_before_goes_on(
    client: penstock.Client, tmp_path: Path
) -> None:
    client.push(write_code(tmp_path / "shaky", "pass"), options=OPTIONS)
    client.deploy("shaky", "shaky:1")
    client.wait_for_deployment("shaky")
    client.wait_ready("shaky")
    bad = write_code(tmp_path / "bad", 'raise RuntimeError("the weights are missing")')
    client.push(bad, model="shaky", options=OPTIONS)
    client.deploy("shaky", "shaky:2")
    seen: list[str] = []
    with pytest.raises(DeadlineExceeded, match=r"UPDATING.*the weights are missing"):
        client.wait_for_deployment("shaky", timeout=6, on_change=lambda now: seen.append(now.message))
    assert any("the weights are missing" in message for message in seen)
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(client.predict("shaky", {"x": x}).only, x * 2)
    client.rollback("shaky")
    client.wait_for_deployment("shaky")
    assert client.get_deployment("shaky").state == deployment_pb2.DEPLOYMENT_STATE_READY


def test_a_first_version_that_cannot_load_is_told_at_once(client: penstock.Client, tmp_path: Path) -> None:
    bad = write_code(tmp_path / "hopeless", 'raise RuntimeError("the weights are missing")')
    client.push(bad, options=OPTIONS)
    client.deploy("hopeless")
    with pytest.raises(FailedPrecondition, match="the weights are missing") as caught:
        client.wait_for_deployment("hopeless", timeout=30)
    assert caught.value.reason is Reason.LOAD_FAILED
    with pytest.raises(DeadlineExceeded, match=r"FAILED.*the weights are missing"):
        client.wait_ready("hopeless", timeout=0.5)


def test_a_file_altered_in_the_artifact_store_is_never_served_and_a_new_push_mends_it(
    client: penstock.Client, mesh: Mesh, tmp_path: Path
) -> None:
    path = save_adder(tmp_path / "stored.onnx", 3.0)
    version = client.push(path, options=OPTIONS)
    sha256 = version.files[0].sha256.removeprefix("sha256:")
    (blob,) = mesh.data_dir.glob(f"registry/artifacts/blobs/sha256/*/{sha256}")
    flip(blob)
    client.deploy("stored")
    with pytest.raises(PenstockError, match="was changed after its upload"):
        client.wait_for_deployment("stored")
    with pytest.raises(PenstockError) as caught:
        client.download("stored:1", tmp_path / "copy")
    assert caught.value.reason is Reason.BUNDLE_CORRUPT
    client.push(path, model="again", options=OPTIONS)
    mesh.wait(lambda: client.is_ready("stored"), "it is served as soon as it is mended", 60)
    assert added(client, "stored") == 3.0


def test_a_file_altered_in_a_workers_cache_is_fetched_again(
    client: penstock.Client, mesh: Mesh, tmp_path: Path
) -> None:
    version = client.push(save_adder(tmp_path / "cached.onnx", 4.0), options=OPTIONS)
    client.deploy("cached")
    client.wait_for_deployment("cached")
    folder = mesh.data_dir / "worker-1" / "bundles" / version.digest.removeprefix("sha256:")
    flip(folder / "cached.onnx")
    client.deploy("cached", replicas=2)
    client.wait_for_deployment("cached")
    assert {added(client, "cached") for _ in range(8)} == {4.0}
    assert "a cached bundle was altered; it is fetched again" in mesh.log("worker-1")


def test_of_two_writers_who_move_one_alias_one_wins_and_the_other_is_told(
    client: penstock.Client, mesh: Mesh, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        path = save_adder(tmp_path / f"{number}.onnx", float(number))
        client.push(path, model="raced", options=OPTIONS)
    client.set_alias("raced", "champion", 1)
    begin = threading.Barrier(2)
    failures: list[PenstockError] = []

    def move(to: int) -> None:
        with penstock.Client(mesh.address) as own:
            begin.wait(20)
            try:
                own.set_alias("raced", "champion", to, expected=1)
            except PenstockError as error:
                failures.append(error)

    writers = [threading.Thread(target=move, args=(to,)) for to in (2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    (told,) = failures
    assert isinstance(told, Aborted)
    moves = client.list_alias_moves("raced")
    assert [move.from_version for move in moves] == [1, 0], "newest first; nothing was overwritten unseen"


def test_a_push_that_does_not_match_its_manifest_stays_failed_and_says_why_again(
    client: penstock.Client, tmp_path: Path
) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive
    options = penstock.PackageOptions(inputs=["x:FP32:-1,4"], outputs=["y:FP32:-1,4"], max_batch_size=8)
    key = "0d6f9cf0-8a3f-4c39-9c5e-3a4a3a1d5b0e"
    said = []
    for _ in range(2):
        with pytest.raises(InvalidArgument) as caught:
            client.push(path, options=options, request_id=key)
        said.append((caught.value.message, caught.value.reason))
    assert said[0] == said[1]
    assert "broken:1" in said[0][0] or "models/broken/versions/1" in said[0][0]
    assert [version.number for version in client.list_versions("broken")] == [1]
    with pytest.raises(FailedPrecondition):
        client.deploy("broken", "broken:1")
