"""From data to a champion, through one command and a whole mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import penstock
from penstock.scheduler.v1 import rollout_pb2
from support.mesh_process import Mesh

pytestmark = [pytest.mark.training, pytest.mark.timeout(400)]
ACCURACY = 0.95


def run(mesh: Mesh, *words: str, code: int = 0) -> str:
    """Run a command as a person would; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock_cli", *words],
        env={**os.environ, "PENSTOCK_ENDPOINT": mesh.address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def outcome(mesh: Mesh) -> dict[str, str]:
    words = "pipeline sklearn:digits --model digits -a cnn --epochs 8 --ranks 2 --strategy ddp --json"
    steps = "--step quantize:scheme=static_int8 --max-loss 0.01 --max-size 0.5 --min-speed-up 1.2"
    found: dict[str, str] = json.loads(run(mesh, *words.split(), *steps.split()))
    return found


def test_what_was_trained_on_two_ranks_is_compressed_tried_and_made_the_champion(
    mesh: Mesh, outcome: dict[str, str]
) -> None:
    assert outcome["trained"] == "models/digits/versions/1"
    assert outcome["champion"] == "models/digits/versions/2"
    with penstock.Client(mesh.address) as client:
        trained, champion = client.get_version("digits:1"), client.get_version("digits@champion")
        assert champion.name == outcome["champion"]
        assert champion.manifest.gate.passed
        assert champion.manifest.metrics["accuracy"] >= ACCURACY
        assert champion.size_bytes < 0.5 * trained.size_bytes
        assert champion.profiles[0].points[0].rows_per_second > 0
        assert list(champion.manifest.lineage.parents) == [trained.name]
        assert trained.manifest.lineage.parameters["ranks"] == "2"
        (rollout,) = client.list_rollouts("digits")
        assert rollout.state == rollout_pb2.ROLLOUT_STATE_SUCCEEDED
        deployment = client.get_deployment("digits")
        assert [target.resolved_version for target in deployment.serving] == [2]


def test_its_lineage_is_a_tree_of_data_jobs_and_versions(mesh: Mesh, outcome: dict[str, str]) -> None:
    tree = run(mesh, "lineage", "digits@champion")
    for part in ("digits:2", "compress", "gate passed", "digits:1", "train", "dataset digits:1", "ranks=2"):
        assert part in tree
    assert tree.index("digits:2") < tree.index("digits:1  train")


def test_a_compression_that_loses_too_much_stops_at_the_gate(mesh: Mesh, outcome: dict[str, str]) -> None:
    words = "pipeline digits --model digits -a cnn --epochs 2 --step prune:amount=0.95 --max-loss 0.001"
    said = run(mesh, *words.split(), code=1)
    assert "did not pass its gate" in said
    with penstock.Client(mesh.address) as client:
        assert client.get_version("digits@champion").name == outcome["champion"]
