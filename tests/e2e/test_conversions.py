"""A trained version in every format, served by a mesh beside its source; measured, and its figures kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import penstock
from support.mesh_process import Mesh

pytestmark = [pytest.mark.training, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def compiling(start_mesh: Callable[..., Mesh]) -> Mesh:
    """A mesh whose operator allows compiled code, with a trained version digits:1."""
    mesh = start_mesh(env={"PENSTOCK_ALLOW_COMPILED_MODELS": "true"})
    run(mesh, "datasets", "push", "sklearn:digits")
    run(mesh, "train", "digits", "--model", "digits", "-a", "cnn", "--epochs", "3")
    return mesh


def run(mesh: Mesh, *words: str) -> Any:
    """Run a command as a person would; return the JSON that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock_cli", *words, "--json"],
        env={**os.environ, "PENSTOCK_ENDPOINT": mesh.address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("to", ["onnx", "safetensors", "aoti"])
def test_a_conversion_is_served_and_answers_as_its_source(compiling: Mesh, to: str) -> None:
    # What it learnt from is asked, too, where nobody names a dataset.
    named = ["--dataset", "digits"] if to == "aoti" else []
    job = run(compiling, "convert", "digits:1", "--to", to, *named)
    (result,) = job["results"]
    assert job["report"]["dataset"].startswith("artifacts/digits")
    assert job["report"]["rows"] == 256
    assert job["report"]["difference"] < 1e-4
    with penstock.Client(compiling.address) as client:
        version = client.get_version(result)
        assert version.manifest.format == to
        assert version.manifest.lineage.job == job["name"]
        assert list(version.manifest.lineage.parents) == ["models/digits/versions/1"]
        for name, number in (("source", 1), (to, version.number)):
            made = client.deploy(name, f"digits:{number}")
            client.wait_for_deployment(name, revision=made.revision, timeout=120)
        (spec,) = version.manifest.signature.inputs
        images = load_digits().images[:20].reshape(20, *spec.shape[1:]).astype(np.float32)
        wanted = client.predict("source", {spec.name: images})
        found = client.predict(to, {spec.name: images})
        np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-3)
        client.undeploy(to)


def test_figures_of_a_version_are_kept_on_it(compiling: Mesh) -> None:
    run(compiling, "evaluate", "digits:1", "digits", "--record")
    run(compiling, "profile", "digits:1", "--batch-size", "1", "--batch-size", "16", "--duration", "1s")
    shown = run(compiling, "show", "digits:1")
    assert shown["manifest"]["metrics"]["accuracy"] > 0.9
    (profile,) = shown["profiles"]
    assert [point["batchSize"] for point in profile["points"]] == [1, 16]
    assert profile["job"].startswith("jobs/")
    assert profile["time"]
