"""kill -9 of anything while a model is trained: the job ends as if nothing had been, and repeats little."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import penstock
from penstock.scheduler.v1 import job_pb2
from support.agent_world import children_of
from support.chaos.jobs import repeated
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

INTERVAL_SECONDS = 1
EPOCHS = 40
ACCURACY = 0.97
ENDED = {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh") / "data", durable=True) as mesh:
        with penstock.Client(mesh.address) as client:
            client.push_dataset("sklearn:digits", name="digits")
        yield mesh


@pytest.fixture
def client(mesh: Mesh) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as client:
        yield client


def training(ranks: int) -> job_pb2.Job:
    job = job_pb2.Job(ranks_per_node=ranks)
    job.train.dataset, job.train.model = "digits", "models/digits"
    job.train.seed = 1
    job.train.recipe.epochs = EPOCHS
    job.train.checkpoint_interval.seconds = INTERVAL_SECONDS
    job.resources.cpu_millis, job.resources.memory_bytes = 500, 512 << 20
    return job


def launcher(mesh: Mesh, job: job_pb2.Job) -> int:
    return int(job.tasks[0].pid)


def rank(mesh: Mesh, job: job_pb2.Job) -> int:
    """A rank: of all that a launcher has started, what the kernel would end first."""
    ranks = [
        pid
        for pid in children_of(job.tasks[0].pid)
        if Path(f"/proc/{pid}/oom_score_adj").read_text() == "800\n"
    ]
    return ranks[-1]


def unit(name: str) -> Callable[[Mesh, job_pb2.Job], int]:
    return lambda mesh, job: mesh.pid(name)


def half_way(mesh: Mesh, client: penstock.Client, name: str) -> job_pb2.Job:
    """Wait until a job has done a third of its work, and has a checkpoint."""
    found = [client.get_job(name)]

    def reached() -> bool:
        found[0] = client.get_job(name)
        assert found[0].state not in ENDED, found[0].message
        done = found[0].progress.done > found[0].progress.total / 3 > 0
        return done and any(e.HasField("checkpoint") for e in client.list_job_events(name))

    mesh.wait(reached, "a third of the job is done", 60)
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "victim",
    [rank, launcher, *(unit(name) for name in ("worker-1", "scheduler", "registry", "redis", "postgres"))],
    ids=["rank", "launcher", "agent", "scheduler", "registry", "redis", "postgres"],
)
def test_a_training_survives_the_end_of_anything_and_repeats_no_more_than_an_interval(
    mesh: Mesh, client: penstock.Client, victim: Callable[[Mesh, job_pb2.Job], int], ranks: int
) -> None:
    job = client.create_job(training(ranks))
    os.kill(victim(mesh, half_way(mesh, client, job.name)), signal.SIGKILL)
    began = time.monotonic()
    done = client.watch_job(job.name, timeout=120)
    print(f"ended {time.monotonic() - began:.1f} s after the kill, in attempt {done.attempt}: {done.message}")
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, f"{done.failure_reason}: {done.message}\n{mesh.logs()}"
    assert done.metrics["held_out/accuracy"] >= ACCURACY
    assert [client.get_version(name).state for name in done.results] == [2]
    events = client.list_job_events(job.name)
    for last, gone_on in repeated(events):
        assert gone_on >= last


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("nodes") / "data", durable=True, workers=2) as mesh:
        with penstock.Client(mesh.address) as client:
            client.push_dataset("sklearn:digits", name="digits")
        yield mesh


@pytest.mark.parametrize("victim", ["the first task", "the second task"])
def test_a_training_on_two_nodes_goes_on_from_the_last_checkpoint_of_both(
    two_nodes: Mesh, victim: str
) -> None:
    with penstock.Client(two_nodes.address) as client:
        job = training(1)
        job.nodes = 2
        # More than half of what a node has: one task on each.
        job.resources.cpu_millis = max(node.cpu_millis for node in client.list_nodes()) * 3 // 4
        job = half_way(two_nodes, client, client.create_job(job).name)
        task = next(task for task in job.tasks if (task.index == 0) == (victim == "the first task"))
        two_nodes.kill(task.node.removeprefix("nodes/"))
        done = client.watch_job(job.name, timeout=120)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED, f"{done.message}\n{two_nodes.logs()}"
        assert done.metrics["held_out/accuracy"] >= ACCURACY
        for last, gone_on in repeated(client.list_job_events(job.name)):
            assert gone_on >= last
