"""Recipes reach a stated quality on real data with each optimizer, and a killed training the same as another.

The data ship with scikit-learn and Python (`penstock.datasets.EXAMPLES` names licences); a fifth is held out.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock_kit.jobs.training import OPTIMIZERS
from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.training.texts import encode_stream, load_tokenizer
from penstock_worker.usecases.job_context import FetchedDataset
from support.job_context import FileJobContext, run_ranks, save_setup, started_ranks
from support.training import example, job_for, train

pytestmark = [pytest.mark.training, pytest.mark.timeout(300)]

# What differs from the recipe's defaults, so that each optimizer has had the steps that it needs.
SETTINGS: dict[str, dict[str, Any]] = {
    "gd": {"epochs": 300},
    "sgd": {"epochs": 40, "learning_rate": 0.02, "optimizer_parameters": {"momentum": 0.5}},
    "adam": {"epochs": 30, "learning_rate": 0.005},
    "adamw": {"epochs": 30, "learning_rate": 0.005},
    "adadelta": {"epochs": 60},
    "adafactor": {"epochs": 40},
    "adagrad": {"epochs": 40, "learning_rate": 0.03},
    "adamax": {"epochs": 60, "learning_rate": 0.005},
    "asgd": {"epochs": 80, "learning_rate": 0.05},
    "lbfgs": {"epochs": 12, "optimizer_parameters": {"max_iter": 2}, "patience": 8},
    "nadam": {"epochs": 40},
    "radam": {"epochs": 60, "learning_rate": 0.005},
    "rmsprop": {"epochs": 20, "learning_rate": 0.002, "patience": 10},
    "rprop": {"epochs": 20},
}

NESTEROV: dict[str, Any] = {"optimizer": "sgd", "optimizer_parameters": {"momentum": 0.9, "nesterov": True}}
ONE_CYCLE: dict[str, Any] = {"schedule": "one_cycle", "clip_gradient_norm": 1.0}

TABLES = {
    "sklearn:breast_cancer": ("held_out/accuracy", 0.95),
    "sklearn:wine": ("held_out/accuracy", 0.95),  # 36 rows: one may be wrong
    "sklearn:diabetes": ("held_out/r2", 0.40),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FetchedDataset]:
    names = [*TABLES, "sklearn:digits", "corpus:python-functions", "corpus:python-topics"]
    return {name: example(tmp_path_factory.mktemp("data"), name) for name in names}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("architecture", ["linear", "mlp"])
@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_are_learnt_by_every_optimizer(
    name: str, architecture: str, optimizer: str, data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    metric, least = TABLES[name]
    recipe: dict[str, Any] = {"architecture": architecture, "optimizer": optimizer, **SETTINGS[optimizer]}
    if architecture == "mlp":
        recipe["parameters"] = {"hidden": [16]}
    if name == "sklearn:diabetes":
        recipe.setdefault("patience", 30)
    metrics = train(tmp_path, data[name], **recipe).found()["metrics"]
    print(f"\n{name} {architecture} {optimizer}: {metrics[metric]:.3f}")
    assert metrics[metric] >= least


@pytest.mark.parametrize(
    ("architecture", "recipe", "least"),
    [
        ("cnn", {"epochs": 12}, 0.97),
        ("cnn", {"epochs": 8, "learning_rate": 0.05, **NESTEROV}, 0.97),
        ("cnn", {"epochs": 8, "precision": "bf16", "schedule": "one_cycle", "learning_rate": 0.005}, 0.97),
        ("resnet", {"epochs": 8, "schedule": "cosine"}, 0.98),
        ("vit", {"epochs": 16, "learning_rate": 0.003, **ONE_CYCLE, "parameters": {"layers": 2}}, 0.94),
        ("mlp", {"epochs": 12}, 0.96),
        ("linear", {"epochs": 12, "learning_rate": 0.01}, 0.94),
    ],
)  # fmt: skip
def test_digits_are_told_apart(
    architecture: str, recipe: dict[str, Any], least: float, data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    found = train(tmp_path, data["sklearn:digits"], architecture=architecture, **recipe).found()
    print(f"\ndigits {architecture}: {found['metrics']['held_out/accuracy']:.3f} in {found['seconds']} s")
    assert found["metrics"]["held_out/accuracy"] >= least


@pytest.mark.parametrize(
    ("architecture", "recipe", "least"),
    [
        ("bag", {"epochs": 8, "learning_rate": 0.01}, 0.92),
        ("bag", {"epochs": 6, "learning_rate": 0.02, "parameters": {"tokenizer": "bytes"}}, 0.35),
        ("transformer", {"epochs": 4, "parameters": {"length": 96, "width": 64}}, 0.84),
    ],
)  # fmt: skip
def test_functions_of_python_are_told_apart_by_package(
    architecture: str, recipe: dict[str, Any], least: float, data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    found = train(tmp_path, data["corpus:python-functions"], architecture=architecture, **recipe).found()
    print(f"\nfunctions {architecture}: {found['metrics']['held_out/accuracy']:.3f} in {found['seconds']} s")
    assert found["metrics"]["held_out/accuracy"] >= least


def test_a_language_model_beats_counting_words_and_pairs_of_words(
    data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    dataset = data["corpus:python-topics"]
    context = train(
        tmp_path,
        dataset,
        architecture="gpt",
        parameters={"length": 64, "width": 96, "layers": 2, "vocabulary": 1024},
        epochs=5,
        learning_rate=0.003,
        schedule="one_cycle",
        clip_gradient_norm=1.0,
    )
    (version,) = context.published()
    unigram, bigram = _perplexities(dataset, version.path)
    metrics = context.found()["metrics"]
    print(
        f"\ntopics gpt: perplexity {metrics['held_out/perplexity']:.1f} by token, of counted tokens "
        f"{unigram:.1f}, of counted pairs {bigram:.1f}; {metrics['held_out/bits_per_byte']:.2f} bits by byte "
        f"in {context.found()['seconds']} s"
    )
    assert metrics["held_out/perplexity"] <= 0.15 * unigram
    assert metrics["held_out/perplexity"] <= 0.95 * bigram


def _perplexities(dataset: FetchedDataset, bundle: Path) -> tuple[float, float]:
    """Perplexity by token of counts of tokens, and of pairs mixed with them (the best of some mixtures)."""
    opened = open_dataset(dataset)
    tokenizer = load_tokenizer(bundle)
    size = tokenizer.get_vocab_size()
    learnt, asked = (
        encode_stream(tokenizer, part.all().texts).numpy() for part in (opened.train, opened.held_out)
    )
    single = np.bincount(learnt, minlength=size) + 1.0
    single /= single.sum()
    pairs = np.zeros((size, size))
    np.add.at(pairs, (learnt[:-1], learnt[1:]), 1.0)
    before, after = asked[:-1], asked[1:]
    seen = pairs.sum(1)[before]
    conditional = np.divide(pairs[before, after], seen, out=np.zeros(len(after)), where=seen > 0)
    mixed = [
        float(np.exp(-np.log(part * conditional + (1 - part) * single[after]).mean()))
        for part in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    return float(np.exp(-np.log(single[after]).mean())), min(mixed)


def test_a_training_that_is_killed_ends_as_one_that_is_not(
    data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    dataset = data["sklearn:digits"]
    job = job_for(
        dataset,
        architecture="cnn",
        parameters={"dropout": 0.2},
        epochs=8,
        schedule="cosine",
        learning_rate=0.002,
    )
    datasets = {job.train.dataset: dataset}
    for name, seconds in (("whole", 1000.0), ("killed", 0.2)):
        save_setup(tmp_path / name, job, datasets=datasets, checkpoint_seconds=seconds)
    assert run_ranks(tmp_path / "whole", 1) == [0]
    killed = tmp_path / "killed"
    for attempt in range(2):
        before = len(list((killed / "checkpoints").glob("*.committed/*")))
        with started_ranks(killed, 1, attempt=attempt) as (process,):
            deadline = time.monotonic() + 60
            while len(list((killed / "checkpoints").glob("*.committed/*"))) < before + 2:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
    assert run_ranks(killed, 1, attempt=2) == [0]
    found, expected = (FileJobContext(tmp_path / name, job) for name in ("killed", "whole"))
    assert any("Going on from" in line["text"] for line in found.lines("log"))
    assert found.found()["metrics"] == expected.found()["metrics"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "gd", "lbfgs"])
def test_two_ranks_train_the_same_model_as_one(
    optimizer: str, data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    dataset = data["sklearn:wine"]
    job = job_for(dataset, architecture="mlp", optimizer=optimizer, epochs=3, balance_classes=True)
    for ranks in (1, 2):
        save_setup(tmp_path / str(ranks), job, datasets={job.train.dataset: dataset})
        assert run_ranks(tmp_path / str(ranks), ranks) == [0] * ranks
    one, two = (FileJobContext(tmp_path / name, job).found()["metrics"] for name in "12")
    assert two == pytest.approx(one, rel=1e-3)


def test_a_threaded_training_is_repeated_to_the_last_digit(
    data: dict[str, FetchedDataset], tmp_path: Path
) -> None:
    found = []
    for name in "ab":
        torch.set_num_threads(2)
        found.append(train(tmp_path / name, data["sklearn:digits"], architecture="resnet", epochs=2).found())
    assert found[0]["metrics"] == found[1]["metrics"]
