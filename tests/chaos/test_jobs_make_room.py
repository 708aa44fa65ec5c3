"""Serving comes before jobs: a training gives its place to a replica, and goes on where it was later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import penstock
from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import deployment_pb2, job_pb2
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

CORES = 2
EPOCHS = 60
ACCURACY = 0.97


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    env = {"PENSTOCK_WORKER_CPU_MILLIS": str(CORES * 1000)}
    with Mesh(tmp_path_factory.mktemp("mesh") / "data", env=env) as mesh:
        with penstock.Client(mesh.address) as client:
            client.push_dataset("sklearn:digits", name="digits")
            client.wait_for_job(client.create_job(training("first", epochs=4)).name, timeout=60)
        yield mesh


@pytest.fixture
def client(mesh: Mesh) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        yield client


def training(name: str, *, epochs: int = EPOCHS, cores: float = 1.5, priority: int = 0) -> job_pb2.Job:
    job = job_pb2.Job(name=name, priority=priority)
    job.train.dataset, job.train.model = "digits", "models/digits"
    job.train.recipe.epochs = epochs
    job.train.checkpoint_interval.seconds = 1
    job.resources.cpu_millis, job.resources.memory_bytes = round(cores * 1000), 512 << 20
    return job


def until(mesh: Mesh, client: penstock.Client, name: str, state: str) -> job_pb2.Job:
    wanted = job_pb2.JobState.Value(f"JOB_STATE_{state}")
    found = [client.get_job(name)]

    def reached() -> bool:
        found[0] = client.get_job(name)
        return found[0].state == wanted

    mesh.wait(reached, f"{name} is {state}", 60)
    return found[0]


def test_a_training_makes_room_for_a_replica_and_goes_on_from_its_checkpoint(
    mesh: Mesh, client: penstock.Client
) -> None:
    client.create_job(training("long"))

    def is_well_under_way() -> bool:
        job = client.get_job("long")
        return job.progress.done > job.progress.total / 4 > 0

    mesh.wait(is_well_under_way, "a quarter of it is done", 60)
    resources = resources_pb2.Resources(cpu_millis=1000)
    client.deploy("digits", "digits:1", resources=resources)
    served = client.wait_for_deployment("digits", timeout=30)
    assert served.state == deployment_pb2.DEPLOYMENT_STATE_READY
    waiting = until(mesh, client, "long", "QUEUED")
    assert "It made room" in waiting.message
    assert "digits" in waiting.message
    before = waiting.progress.done
    client.undeploy("digits")
    done = client.watch_job("long", timeout=120)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.message
    assert (done.attempt, done.restarts) == (2, 0)
    assert done.metrics["held_out/accuracy"] >= ACCURACY
    events = client.list_job_events("long")
    attempts = [e for e in events if e.HasField("progress") and e.progress.total and e.task.endswith("/1")]
    # It was asked to stop, so it wrote a checkpoint of the step that it was at: nothing is repeated.
    assert attempts[0].progress.done >= before


def test_of_two_jobs_that_wait_the_one_of_higher_priority_comes_first(
    mesh: Mesh, client: penstock.Client
) -> None:
    client.create_job(training("holds", epochs=30))
    until(mesh, client, "holds", "RUNNING")
    client.create_job(training("low", epochs=1))
    client.create_job(training("high", epochs=1, priority=10))
    assert client.get_job("low").state == job_pb2.JOB_STATE_QUEUED
    low, high = (client.wait_for_job(name, timeout=120) for name in ("low", "high"))
    assert high.start_time.ToNanoseconds() < low.start_time.ToNanoseconds()


def test_a_project_takes_no_more_than_its_quota_and_says_so(mesh: Mesh, client: penstock.Client) -> None:
    client.create_project("small", quota=resources_pb2.Resources(cpu_millis=600))
    first, second = (training(f"small-{number}", epochs=20, cores=0.5) for number in (1, 2))
    first.project = second.project = "projects/small"
    client.create_job(first)
    until(mesh, client, "small-1", "RUNNING")
    client.create_job(second)
    waiting = client.get_job("small-2")
    mesh.wait(lambda: "small" in client.get_job("small-2").message, "it says why it waits")
    assert waiting.state == job_pb2.JOB_STATE_QUEUED
    for name in ("small-1", "small-2"):
        client.wait_for_job(name, timeout=120)
