"""kill -9 of anything while a dataset is answered: each row is in the result once, and little asked twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import penstock
from penstock.scheduler.v1 import job_pb2
from support.agent_world import children_of
from support.mesh_process import Mesh
from support.models import ECHO_WIDTH, build_echo_onnx

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

ROWS, CHUNK_ROWS, REQUEST_ROWS = 40_000, 4_000, 1
ENDED = {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    x = np.zeros((ROWS, ECHO_WIDTH), np.float32)
    x[:, 0] = np.arange(ROWS)
    np.savez(folder / "rows.npz", x=x)
    (folder / "echo").mkdir()
    build_echo_onnx(folder / "echo")
    with Mesh(folder / "data", durable=True) as mesh:
        with penstock.Client(mesh.address) as client:
            client.push_dataset(folder / "rows.npz")
            client.push(folder / "echo", model="echo")
            client.deploy("echo")
            client.wait_ready("echo", timeout=60)
        yield mesh


@pytest.fixture
def client(mesh: Mesh) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        yield client


def launcher(mesh: Mesh, job: job_pb2.Job) -> int:
    return int(job.tasks[0].pid)


def rank(mesh: Mesh, job: job_pb2.Job) -> int:
    """The rank: of all that a launcher has started, what the kernel would end first."""
    marked = [pid for pid in children_of(job.tasks[0].pid) if _first_to_go(pid)]

    return marked[-1]


def _first_to_go(pid: int) -> bool:
    return Path(f"/proc/{pid}/oom_score_adj").read_text() == "800\n"


def replica(mesh: Mesh, job: job_pb2.Job) -> int:
    """The one that answers."""
    with penstock.Client(mesh.address) as client:
        return int(client.list_replicas(deployment="echo")[0].pid)


def unit(name: str) -> Callable[[Mesh, job_pb2.Job], int]:
    return lambda mesh, job: mesh.pid(name)


@pytest.mark.parametrize(
    "victim",
    [rank, launcher, replica, *(unit(name) for name in ("worker-1", "scheduler", "redis", "postgres"))],
    ids=["rank", "launcher", "replica", "agent", "scheduler", "redis", "postgres"],
)
def test_every_row_is_in_the_result_once_whatever_is_killed(
    mesh: Mesh, client: penstock.Client, tmp_path: Path, victim: Callable[[Mesh, job_pb2.Job], int]
) -> None:
    wanted = job_pb2.Job()
    wanted.batch_predict.deployment, wanted.batch_predict.dataset = "deployments/echo", "rows"
    wanted.batch_predict.artifact = "artifacts/answers"
    wanted.batch_predict.chunk_rows, wanted.batch_predict.request_rows = CHUNK_ROWS, REQUEST_ROWS
    job = client.create_job(wanted)

    def half_way() -> bool:
        nonlocal job
        job = client.get_job(job.name)
        assert job.state not in ENDED, f"{job.failure_reason}: {job.message}\n{mesh.logs()}"
        return job.progress.done > ROWS * 0.35

    mesh.wait(half_way, "a third of the rows is answered", 60)
    os.kill(victim(mesh, job), signal.SIGKILL)
    began = time.monotonic()
    done = client.watch_job(job.name, timeout=120)
    took = time.monotonic() - began
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, f"{done.failure_reason}: {done.message}\n{mesh.logs()}"
    report = dict(done.report)
    print(
        f"ended {took:.1f} s after the kill, in attempt {done.attempt}; "
        f"{report['rows_per_second']:.0f} rows/s, {report['retried']:.0f} asked again"
    )
    (result,) = done.results
    client.pull_dataset(result, tmp_path)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(tmp_path.glob("*.parquet"))])
    assert table["index"].to_pylist() == list(range(ROWS))
    assert table["error"].null_count == ROWS
    assert [row[0] for row in table["y"].to_pylist()] == list(range(ROWS))
    assert report["rows"] == ROWS
    # What was finished before the kill was not asked again.
    went_back, seen = 0, 0
    for event in client.list_job_events(job.name):
        if event.HasField("progress") and event.progress.total:
            went_back = max(went_back, seen - event.progress.done)
            seen = max(seen, event.progress.done)
    assert went_back <= CHUNK_ROWS
