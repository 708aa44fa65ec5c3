"""A trained version compressed by jobs of a mesh: searched, served beside its source, refused by its gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import penstock
from penstock_cli.plots import plot_front
from support.mesh_process import Mesh

pytestmark = [pytest.mark.training, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trained(start_mesh: Callable[..., Mesh]) -> Mesh:
    """A mesh with a trained version digits:1."""
    mesh = start_mesh()
    run(mesh, "datasets", "push", "sklearn:digits")
    run(mesh, "train", "digits", "--model", "digits", "-a", "cnn", "--epochs", "8")
    return mesh


def run(mesh: Mesh, *words: str) -> Any:
    """Run a command as a person would; return the JSON that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock_cli", *words, "--json"],
        env={**os.environ, "PENSTOCK_ENDPOINT": mesh.address},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout)


def accuracy(client: penstock.Client, deployment: str) -> float:
    digits = load_digits()
    version = client.get_version("digits:1")
    (spec,) = version.manifest.signature.inputs
    images = digits.images[:400].reshape(400, *spec.shape[1:]).astype(np.float32)
    answers = [client.predict(deployment, {spec.name: part}) for part in np.split(images, 20)]
    found = np.concatenate([each["logits"] for each in answers]).argmax(1)
    return float((found == digits.target[:400]).mean())


def test_what_steps_made_answers_as_well_as_its_source(trained: Mesh) -> None:
    job = run(
        trained,
        *("compress", "digits:1", "--dataset", "digits", "--max-loss", "0.05", "--max-size", "0.5"),
        *("--step", "prune_channels:amount=0.3,repair_epochs=3", "--step", "quantize:scheme=static_int8"),
    )
    (result,) = job["results"]
    assert job["report"]["recommended"] == result
    with penstock.Client(trained.address) as client:
        version = client.get_version(result)
        assert version.manifest.gate.passed
        assert version.manifest.lineage.operation == "compress"
        assert list(version.manifest.lineage.parents) == ["models/digits/versions/1"]
        for name, number in (("source", 1), ("small", version.number)):
            made = client.deploy(name, f"digits:{number}")
            client.wait_for_deployment(name, revision=made.revision, timeout=120)
        assert accuracy(client, "small") > accuracy(client, "source") - 0.03


def test_a_search_reports_a_front_that_can_be_drawn(trained: Mesh, tmp_path: Path) -> None:
    job = run(
        trained,
        *("compress", "digits:1", "--dataset", "digits", "--search", "--budget", "60s", "--max-trials", "6"),
        *("--max-loss", "0.05", "--max-size", "0.6", "--model", "searched"),
    )
    (result,) = job["results"]
    assert result == "models/searched/versions/1"
    assert len(job["report"]["candidates"]) == 7
    assert plot_front(job["report"], tmp_path / "pareto.svg").stat().st_size > 1000


def test_what_failed_its_gate_is_there_and_says_why(trained: Mesh) -> None:
    job = run(
        trained,
        *("compress", "digits:1", "--dataset", "digits", "--max-size", "0.01", "--step", "clip"),
        *("--model", "failed"),
    )
    (result,) = job["results"]
    shown = run(trained, "show", result.removeprefix("models/").replace("/versions/", ":"))
    assert "passed" not in shown["manifest"]["gate"]
    assert "size" in shown["manifest"]["gate"]["failures"][0]
    assert not job["report"]["gate"]["passed"]
