"""What must hold of compressions, on real data: the figures of the worker's README."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.training.rebuild import rebuild
from support.compression import Source, candidates, digits_cnn, trained
from support.training import example

pytestmark = [pytest.mark.training, pytest.mark.timeout(1800)]

MAX_SIZE, MIN_SPEED_UP, MAX_LOSS = 0.30, 2.0, 0.01
SEARCH_SECONDS = 15 * 60
DIGITS_SECONDS, TEXT_SECONDS = 150, 600
LEAST_PARAMETERS = 10_000_000
# Each step alone on the digits CNN: parameters, then what must hold of size, speed and metric.
STEPS: list[tuple[str, Mapping[str, Any], float, float, float]] = [
    ("clip", {"percentile": 99.5}, 1.05, 0.7, 0.01),
    ("prune", {"amount": 0.6, "repair_epochs": 3}, 1.05, 0.7, 0.01),
    ("prune_2_4", {"repair_epochs": 3}, 1.05, 0.7, 0.01),
    ("prune_channels", {"amount": 0.5, "repair_epochs": 10}, 0.40, 1.3, 0.02),
    ("quantize", {"scheme": "dynamic_int8"}, 0.70, 1.2, 0.01),
    ("quantize", {"scheme": "static_int8"}, 0.40, 2.0, 0.01),
    ("quantize", {"scheme": "weight_only_int8"}, 0.40, 0.7, 0.01),
    ("quantize", {"scheme": "weight_only_int4"}, 0.40, 0.7, 0.02),
    ("low_rank", {"energy": 0.7, "repair_epochs": 5}, 0.90, 0.7, 0.02),
    (
        "distill",
        {
            "student": "cnn",
            "student_parameters": {"channels": [16, 32], "hidden": 64},
            "epochs": 40,
            "learning_rate": 0.005,
            "hidden": 0.1,
        },
        0.50,
        1.0,
        0.02,
    ),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return digits_cnn(tmp_path_factory.mktemp("digits"), epochs=20, channels=(64, 128))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A transformer of more than ten million parameters that says which package a Python function is of."""
    root = tmp_path_factory.mktemp("texts")
    torch.set_num_threads(2)
    return trained(
        root / "train",
        example(root / "data", "corpus:python-functions"),
        architecture="transformer",
        parameters={"width": 400, "layers": 2, "heads": 4, "vocabulary": 30000, "length": 32, "dropout": 0.1},
        epochs=2,
        batch_size=32,
        learning_rate=0.001,
    )


def show(name: str, found: Mapping[str, Any]) -> None:
    print(
        f"| {name} | {found['size_bytes'] / 1000:,.0f} kB | {found['size_ratio']:.0%} "
        f"| {found['latency_ms']:.3f} ms | {found['rows_per_second']:,.0f} | {found['speed_up']:.2f} "
        f"| {found['metric']:.4f} |"
    )


@pytest.mark.parametrize(("name", "parameters", "size", "speed", "loss"), STEPS)
def test_each_step_does_to_the_digits_cnn_what_it_is_for(
    digits: Source,
    tmp_path: Path,
    name: str,
    parameters: Mapping[str, Any],
    size: float,
    speed: float,
    loss: float,
) -> None:
    before, after = candidates(digits.compress(tmp_path / "job", [(name, parameters)]))
    show("source", before)
    show(after["name"], after)
    assert after["size_ratio"] <= size
    assert after["speed_up"] >= speed
    assert after["metric_loss"] <= loss


def test_half_of_the_layers_of_a_transformer_can_be_dropped(texts: Source, tmp_path: Path) -> None:
    steps = [("drop_layers", {"layers": 1, "repair_epochs": 1, "learning_rate": 0.0005})]
    before, after = candidates(texts.compress(tmp_path / "job", steps, threads=2))
    show("source", before)
    show(after["name"], after)
    assert after["speed_up"] > 1.3
    assert after["metric_loss"] <= 0.03


def search(source: Source, root: Path, seconds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    def change(job: job_pb2.Job) -> None:
        job.compress.search.budget.FromSeconds(int(os.environ.get("PENSTOCK_SEARCH_SECONDS", seconds)))
        job.compress.gate.max_metric_loss = MAX_LOSS
        job.compress.gate.min_speed_up = MIN_SPEED_UP
        job.compress.gate.max_size_ratio = MAX_SIZE

    context = source.compress(root, [], change, threads=2)
    found = context.found()
    for each in found["candidates"]:
        if each["front"] or each["recommended"] or each["name"] == "source":
            show(each["name"] + (" (recommended)" if each["recommended"] else ""), each)
    (best,) = (each for each in found["candidates"] if each["recommended"])
    print(f"{len(found['candidates']) - 1} candidates in {found['seconds']:.0f} s")
    assert found["seconds"] <= SEARCH_SECONDS
    assert found["gate"]["passed"], found["gate"]
    return found, best


def test_a_search_makes_the_digits_cnn_small_and_fast(digits: Source, tmp_path: Path) -> None:
    _, best = search(digits, tmp_path / "job", DIGITS_SECONDS)
    assert best["size_ratio"] <= MAX_SIZE
    assert best["speed_up"] >= MIN_SPEED_UP
    assert best["metric_loss"] <= MAX_LOSS


def test_a_search_makes_a_text_classifier_of_ten_million_parameters_small_and_fast(
    texts: Source, tmp_path: Path
) -> None:
    model = rebuild(texts.version.path)
    assert sum(parameter.numel() for parameter in model.parameters()) >= LEAST_PARAMETERS
    _, best = search(texts, tmp_path / "job", TEXT_SECONDS)
    assert best["size_ratio"] <= MAX_SIZE
    assert best["speed_up"] >= MIN_SPEED_UP
    assert best["metric_loss"] <= MAX_LOSS
