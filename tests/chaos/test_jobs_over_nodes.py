"""kill -9 at random moments of a training over nodes: no attempt stands still, and it ends well."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import penstock
from penstock.scheduler.v1 import job_pb2, job_service_pb2, node_pb2
from penstock_local.orphans import MARK
from penstock_local.spawn import spawn
from support.agent_world import children_of
from support.chaos.jobs import repeated
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

NODES = int(os.environ.get("PENSTOCK_CHAOS_NODES", "2"))
KILLS = int(os.environ.get("PENSTOCK_CHAOS_KILLS", "6"))
EPOCHS = 80
INTERVAL_SECONDS = 1
ACCURACY = 0.97
STILL_SECONDS = 60.0
"""No longer than this may nothing be heard of a training, whatever was killed."""
PROGRESS = [job_service_pb2.JOB_EVENT_KIND_PROGRESS]
ENDED = {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}
VICTIMS = ("rank", "group", "launcher", "agent", "all agents", "scheduler")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    # Who is killed again and again is started again after up to 10 s.
    patient = {"PENSTOCK_NODE_RETURN_SECONDS": "25"}
    with Mesh(tmp_path_factory.mktemp("nodes") / "data", durable=True, workers=NODES, env=patient) as mesh:
        with penstock.Client(mesh.address) as client:
            client.push_dataset("sklearn:digits", name="digits")
        yield mesh


def training(client: penstock.Client, *, nodes: int = NODES, least: int = 0) -> job_pb2.Job:
    job = job_pb2.Job(nodes=nodes, min_nodes=least, ranks_per_node=1, max_restarts=50)
    job.train.dataset, job.train.model = "digits", "models/digits"
    job.train.seed = 1
    job.train.recipe.epochs = EPOCHS
    job.train.checkpoint_interval.seconds = INTERVAL_SECONDS
    # More than half of what a node has: one task on each.
    job.resources.cpu_millis = max(node.cpu_millis for node in client.list_nodes()) * 3 // 4
    job.resources.memory_bytes = 512 << 20
    return client.create_job(job)


def below(launcher: int, *, rank: bool) -> list[int]:
    """What a launcher has started: ranks are what the kernel would end first."""
    children = []
    for pid in children_of(launcher):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            is_rank = Path(f"/proc/{pid}/oom_score_adj").read_text() == "800\n"
            children += [pid] if is_rank == rank else []
    return children


def pids(mesh: Mesh, job: job_pb2.Job, victim: str, draw: random.Random) -> list[int]:
    """Whom to kill; nobody, if there is none at this moment."""
    launchers = [task.pid for task in job.tasks if task.pid]
    workers = [unit.pid for unit in mesh.record.units if unit.name.startswith("worker-") and unit.pid]
    match victim:
        case "scheduler":
            return [unit.pid for unit in mesh.record.units if unit.name == "scheduler" and unit.pid]
        case "agent":
            return [draw.choice(workers)] if workers else []
        case "all agents":
            return workers
        case "launcher":
            return [draw.choice(launchers)] if launchers else []
    below_them = [pid for launcher in launchers for pid in below(launcher, rank=victim == "rank")]
    return [draw.choice(below_them)] if below_them else []


def found(client: penstock.Client, name: str) -> job_pb2.Job:
    """A job, once there is a scheduler again."""
    while True:
        try:
            return client.get_job(name)
        except penstock.PenstockError:
            time.sleep(0.2)


def until_it_goes_on(mesh: Mesh, client: penstock.Client, name: str) -> tuple[job_pb2.Job, float]:
    """Wait until steps are taken again; return how long that took."""
    began, began_at = time.monotonic(), time.time()
    sequence, steps = 0, [0]
    job = found(client, name)
    while job.state not in ENDED:
        with contextlib.suppress(penstock.PenstockError):
            for event in client.list_job_events(name, kinds=PROGRESS, after=sequence):
                sequence = event.sequence
                # What was said before somebody was killed may come later.
                if event.progress.total and event.time.ToNanoseconds() > began_at * 1e9:
                    steps.append(event.progress.done)
        if any(later > earlier > 0 for earlier, later in pairwise(steps)):
            break
        job = found(client, name)
        waited = time.monotonic() - began
        assert waited < STILL_SECONDS, f"it stands still: {job}\n{mesh.logs()}"
        time.sleep(0.05)
    return found(client, name), time.monotonic() - began


@pytest.mark.parametrize("round_", range(int(os.environ.get("PENSTOCK_CHAOS_ROUNDS", "1"))))
def test_a_training_over_nodes_stands_still_for_nobody_who_is_killed(
    mesh: Mesh, chaos_seed: int, round_: int
) -> None:
    draw = random.Random(f"{chaos_seed} {round_}")
    with penstock.Client(mesh.address) as client:
        job = training(client)
        job, _ = until_it_goes_on(mesh, client, job.name)
        kills = 0
        slowest = 0.0
        while kills < KILLS and job.state not in ENDED:
            time.sleep(draw.uniform(0.0, 4.0))
            job = found(client, job.name)
            victim = draw.choice(VICTIMS)
            killed = pids(mesh, job, victim, draw)
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            kills += bool(killed)
            waited = 0.0
            if draw.random() < 0.7:  # else the next one comes while it recovers
                job, waited = until_it_goes_on(mesh, client, job.name)
            slowest = max(slowest, waited)
            print(
                f"killed {victim} {killed}; went on after {waited:.1f} s: attempt {job.attempt}, "
                f"{job.progress.done} of {job.progress.total}, {job.message}",
                flush=True,
            )
        while job.state not in ENDED:
            job, waited = until_it_goes_on(mesh, client, job.name)
            slowest = max(slowest, waited)
        print(f"{kills} kills, attempt {job.attempt}; it stood still for {slowest:.1f} s at most")
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, f"{job.failure_reason}: {job.message}\n{mesh.logs()}"
        assert job.metrics["held_out/accuracy"] >= ACCURACY
        for last, gone_on in repeated(client.list_job_events(job.name)):
            assert gone_on >= last


def lose_for_a_while(mesh: Mesh, client: penstock.Client, node: str, job: str) -> None:
    """Kill an agent as often as it is started again, until its job could start elsewhere."""

    def lost() -> bool:
        with contextlib.suppress(AssertionError, ProcessLookupError):  # it does not run at this moment
            mesh.kill(node.removeprefix("nodes/"))
        return "its newest checkpoint" in found(client, job).message

    mesh.wait(lost, f"{node} is waited for")


@pytest.mark.parametrize(("nodes", "least"), [(NODES, 1), (1, 0)], ids=["may go smaller", "fits elsewhere"])
def test_a_training_that_could_go_on_without_a_node_waits_for_its_agent(
    mesh: Mesh, chaos_seed: int, nodes: int, least: int
) -> None:
    """The newest checkpoint may be on that node's disk alone."""
    draw = random.Random(chaos_seed)
    with penstock.Client(mesh.address) as client:
        job = training(client, nodes=nodes, least=least)
        job, _ = until_it_goes_on(mesh, client, job.name)
        homes = sorted(task.node for task in job.tasks)
        for _ in range(3):
            known = len(checkpoints(client, job.name))
            mesh.wait(lambda: len(checkpoints(client, job.name)) > known, "another checkpoint")  # noqa: B023
            time.sleep(draw.uniform(0.0, INTERVAL_SECONDS))
            lose_for_a_while(mesh, client, draw.choice(homes), job.name)
            job, waited = until_it_goes_on(mesh, client, job.name)
            print(f"went on after {waited:.1f} s: attempt {job.attempt}, {job.progress.done} steps")
            assert sorted(task.node for task in job.tasks) == homes, job
        job = client.watch_job(job.name, timeout=240)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, f"{job.failure_reason}: {job.message}\n{mesh.logs()}"
        went_back = repeated(client.list_job_events(job.name))
        assert went_back, "no kill cost it a step"
        for last, gone_on in went_back:
            assert gone_on >= last


@contextlib.contextmanager
def another_agent(mesh: Mesh, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """An agent that nobody starts again when it was killed."""
    words = Path(f"/proc/{mesh.pid('worker-1')}/environ").read_bytes().split(b"\0")
    like = dict(word.decode().split("=", 1) for word in words if b"=" in word)
    env = {key: value.replace("worker-1", name) for key, value in like.items() if key != MARK}
    with (mesh.data_dir / "logs" / f"{name}.log").open("ab") as output:
        process = spawn([sys.executable, "-m", "penstock_worker"], output=output, env=env)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def test_a_training_goes_on_smaller_when_a_node_is_lost_for_good(mesh: Mesh) -> None:
    name = f"worker-{NODES + 1}"
    with penstock.Client(mesh.address) as client, another_agent(mesh, name) as last:
        ready = node_pb2.NODE_STATE_READY
        mesh.wait(lambda: [node.state for node in client.list_nodes()] == [ready] * (NODES + 1), "all nodes")
        job, _ = until_it_goes_on(mesh, client, training(client, nodes=NODES + 1, least=NODES).name)
        before = {task.node for task in job.tasks}
        assert len(before) == NODES + 1
        mesh.wait(lambda: len(checkpoints(client, job.name)) > 1, "two checkpoints")
        last.kill()
        began = time.monotonic()
        mesh.wait(lambda: found(client, job.name).attempt > 1, "another attempt", STILL_SECONDS)
        job, _ = until_it_goes_on(mesh, client, job.name)
        print(f"on {NODES} nodes {time.monotonic() - began:.1f} s after the end of another one")
        assert {task.node for task in job.tasks} == before - {f"nodes/{name}"}
        job = client.watch_job(job.name, timeout=240)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, f"{job.failure_reason}: {job.message}\n{mesh.logs()}"
        assert job.metrics["held_out/accuracy"] >= ACCURACY


def checkpoints(client: penstock.Client, name: str) -> list[job_pb2.JobEvent]:
    return [event for event in client.list_job_events(name) if event.HasField("checkpoint")]
