"""Recipes through a whole mesh: a job, its metrics as it goes, a version, answers over the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import penstock
from penstock.datasets import write_example
from penstock.errors import InvalidArgument
from penstock.scheduler.v1 import job_pb2
from support.mesh_process import Mesh

pytestmark = [pytest.mark.training, pytest.mark.timeout(400)]


def _job(name: str, dataset: str, model: str) -> job_pb2.Job:
    job = job_pb2.Job(name=f"jobs/{name}")
    job.train.dataset, job.train.model = dataset, f"models/{model}"
    job.train.recipe.SetInParent()
    return job


@pytest.fixture(scope="module")
def client(mesh: Mesh) -> Iterator[penstock.Client]:
    with penstock.Client(mesh.address) as found:
        for name in ("sklearn:digits", "corpus:python-functions", "sklearn:diabetes"):
            found.push_dataset(name, name=name.partition(":")[2])
        yield found


def test_digits_are_trained_and_served(client: penstock.Client, tmp_path: Path) -> None:
    job = _job("digits", "digits", "digits")
    job.train.recipe.epochs = 5
    client.create_job(job)
    done = client.wait_for_job("digits", timeout=180)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.message
    assert list(done.results) == ["models/digits/versions/1"]
    assert done.metrics["held_out/accuracy"] >= 0.95
    assert done.report["metrics"]["held_out/accuracy"] == done.metrics["held_out/accuracy"]  # type: ignore[index]
    steps = [
        event.metrics.step
        for event in client.list_job_events("digits")
        if "held_out/accuracy" in event.metrics.values
    ]
    assert steps == sorted(steps)
    assert steps[-1] == 225

    made = client.deploy("digits", "digits:1")
    client.wait_for_deployment("digits", revision=made.revision, timeout=120)
    write_example("sklearn:digits", tmp_path)
    with np.load(tmp_path / "digits.npz") as found:
        images, labels = found["x"][:40, None], found["y"][:40]
    answers = client.predict("digits", {"x": images})
    assert answers["probabilities"].sum(1) == pytest.approx(1, abs=1e-5)
    assert (answers["probabilities"].argmax(1) == labels).mean() >= 0.95


def test_a_version_is_gone_on_with(client: penstock.Client) -> None:
    job = _job("more-digits", "digits", "digits")
    job.train.recipe.fine_tune = "digits:1"
    job.train.recipe.epochs = 1
    job.train.recipe.optimizer.learning_rate = 1e-5
    client.create_job(job)
    done = client.wait_for_job("more-digits", timeout=180)
    first, second = (client.get_version(f"digits:{number}").manifest for number in (1, 2))
    assert list(second.lineage.parents) == ["models/digits/versions/1"]
    assert second.lineage.job == done.name
    before, after = (found.metrics["held_out/loss"] for found in (first, second))
    assert 0.5 * before < after < 1.05 * before


def test_texts_are_asked_by_the_tokenizer_of_the_version(client: penstock.Client, tmp_path: Path) -> None:
    job = _job("functions", "python-functions", "functions")
    job.train.recipe.architecture = "bag"
    job.train.recipe.epochs = 6
    job.train.recipe.optimizer.learning_rate = 0.01
    client.create_job(job)
    done = client.wait_for_job("functions", timeout=180)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.message
    made = client.deploy("functions", "functions:1")
    client.wait_for_deployment("functions", revision=made.revision, timeout=120)
    client.download("functions:1", tmp_path)
    (path,) = tmp_path.rglob("tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    classes = list(client.get_version("functions:1").manifest.signature.outputs[1].labels)
    for text, expected in {
        "async def drain(self):\n    if self._transport.is_closing():\n        await sleep(0)": "asyncio",
        "def assertEqual(self, first, second, msg=None):\n    raise self.failureException(msg)": "unittest",
    }.items():
        tokens = np.array([tokenizer.encode(text).ids])
        answer = client.predict("functions", {"tokens": tokens})
        assert classes[int(answer["probabilities"][0].argmax())] == expected


def test_a_training_that_diverges_fails_with_its_reason_and_leaves_no_version(
    client: penstock.Client,
) -> None:
    job = _job("wild", "diabetes", "wild")
    recipe = job.train.recipe
    recipe.architecture, recipe.epochs = "linear", 500
    recipe.optimizer.name, recipe.optimizer.learning_rate = "sgd", 5.0
    client.create_job(job)
    done = client.watch_job("wild", timeout=180)
    assert (done.state, done.failure_reason) == (job_pb2.JOB_STATE_FAILED, "DIVERGED")
    assert "smaller learning rate than 5" in done.message
    assert (done.restarts, list(done.results)) == (0, [])


def test_a_recipe_that_no_worker_knows_is_not_queued(client: penstock.Client) -> None:
    job = _job("typing-error", "digits", "digits")
    job.train.recipe.optimizer.name = "adma"
    with pytest.raises(InvalidArgument, match="did you mean 'adam'"):
        client.create_job(job)
