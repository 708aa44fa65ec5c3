"""Jobs are cancelled whatever they do, and within seconds nothing of them is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock
from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_kit.errors import FailedPrecondition
from support.agent_world import children_of
from support.mesh_process import Mesh

pytestmark = pytest.mark.training

SECONDS = 12.0
"""The grace of a task that does not listen is 10 s; one that does ends within a second."""


@pytest.fixture(scope="module")
def client(mesh: Mesh) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        client.push_dataset("sklearn:digits", name="digits")
        yield client


def training(name: str, **fields: int) -> job_pb2.Job:
    """Two ranks that would train for a long time."""
    recipe = job_work_pb2.Recipe(epochs=100_000)
    work = job_work_pb2.TrainWork(dataset="digits", model="models/never", recipe=recipe)
    return job_pb2.Job(name=f"jobs/{name}", ranks_per_node=2, train=work, **fields)


@pytest.mark.parametrize("state", ["QUEUED", "STARTING", "RUNNING"])
def test_a_job_is_cancelled_and_nothing_of_it_is_left(
    mesh: Mesh, client: penstock.Client, state: str
) -> None:
    name = f"jobs/{state.lower()}"
    if state == "QUEUED":
        client.update_node("worker-1", cordoned=True)
    client.create_job(training(state.lower()))
    wanted = job_pb2.JobState.Value(f"JOB_STATE_{state}")

    def reached() -> bool:
        job = client.get_job(name)
        return job.state == wanted and (state != "RUNNING" or job.progress.done > 0)

    mesh.wait(reached, f"it is {state}", 60)
    launchers = [task.pid for task in client.get_job(name).tasks if task.pid]
    began = time.monotonic()
    client.cancel_job(name)
    ended = client.watch_job(name, timeout=60)
    assert ended.state == job_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - began < SECONDS
    assert client.get_node("worker-1").cpu_millis_allocated == 0
    assert not [pid for pid in launchers if Path(f"/proc/{pid}").exists() or children_of(pid)]
    assert client.cancel_job(name).state == job_pb2.JOB_STATE_CANCELLED, "again is no error"
    client.delete_job(name)
    if state == "QUEUED":
        client.update_node("worker-1", cordoned=False)


def test_a_job_that_has_failed_cannot_be_cancelled(mesh: Mesh, client: penstock.Client) -> None:
    job = training("short")
    job.timeout.FromSeconds(1)
    client.create_job(job)
    failed = client.watch_job("jobs/short", timeout=60)
    assert (failed.state, failed.failure_reason) == (job_pb2.JOB_STATE_FAILED, "TIMEOUT")
    with pytest.raises(FailedPrecondition, match="FAILED"):
        client.cancel_job("jobs/short")
