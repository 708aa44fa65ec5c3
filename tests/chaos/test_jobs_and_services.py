"""A training goes on while the services around it are killed, and is done once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from penstock import Client
from penstock.scheduler.v1 import job_pb2, job_service_pb2, job_work_pb2
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

EPOCHS = 150
STEPS = EPOCHS * 45
"""1,438 rows to learn from, 32 a step."""


def test_killed_schedulers_redis_and_postgres_cost_a_training_nothing(tmp_path: Path) -> None:
    rows, labels = load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", x=rows.astype(np.float32), label=labels)
    with Mesh(tmp_path / "mesh", schedulers=2, durable=True) as mesh:
        client = Client(mesh.address)
        client.push_dataset(tmp_path / "digits.npz", name="digits")
        recipe = job_work_pb2.Recipe(label="label", epochs=EPOCHS)
        work = job_work_pb2.TrainWork(dataset="digits", model="models/digits", recipe=recipe)
        work.checkpoint_interval.FromSeconds(1)
        client.create_job(job_pb2.Job(name="jobs/fit", train=work))

        def done() -> int:
            return int(client.get_job("jobs/fit").progress.done)

        mesh.wait(lambda: done() > 0, "it trains", 60)
        for name in ("scheduler-1", "scheduler-2", "redis", "postgres"):
            before = done()
            pid = mesh.kill(name)
            mesh.wait_restarted(name, pid)
            # What happened meanwhile arrives, nothing of it lost.
            mesh.wait(lambda known=before: _more_than(client, known), f"it goes on without {name}", 60)
        job = client.wait_for_job("jobs/fit", timeout=120)
        assert (job.attempt, job.restarts) == (1, 0), job
        assert job.metrics["held_out/accuracy"] > 0.95
        (result,) = job.results
        assert client.get_version("digits:1").name == result
        events = client.list_job_events("jobs/fit")
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        steps = [event.metrics.step for event in events if event.HasField("metrics")]
        assert steps == sorted(set(steps))
        assert steps[-1] == STEPS
        kinds = [job_service_pb2.JOB_EVENT_KIND_CHECKPOINT]
        assert client.list_job_events("jobs/fit", kinds=kinds)
        mesh.wait(lambda: not client.get_node("worker-1").cpu_millis_allocated, "nothing is held")


def _more_than(client: Client, before: int) -> bool:
    job = client.get_job("jobs/fit")
    return job.progress.done > before or job.state not in (
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.JOB_STATE_STARTING,
    )
