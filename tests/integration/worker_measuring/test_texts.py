"""Versions that take token ids are asked texts, encoded as their bundle says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.measuring import measure_quality, open_version, questions_of
from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.adapters.training.export import write_bundle
from penstock_worker.adapters.training.rows import TokenWindows
from penstock_worker.adapters.training.texts import encode_padded, encode_stream, make_tokenizer
from penstock_worker.usecases.job_context import FetchedDataset, JobFailure
from support.job_context import dataset_of

pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("ignore")]

TEXTS = [f"row {number} is {'good' if number % 2 else 'bad'} and says so" for number in range(40)]


def text_dataset(directory: Path) -> FetchedDataset:
    directory.mkdir()
    rows = ["text,label", *(f"{text},{'good' if 'good' in text else 'bad'}" for text in TEXTS)]
    (directory / "data.csv").write_text("\n".join(rows) + "\n")
    return dataset_of(directory, format="csv", description={"label": "label"})


def blueprint(task: str, architecture: str, outputs: int, vocabulary: int, **more: object) -> Blueprint:
    return Blueprint(
        task=task,
        architecture=architecture,
        parameters={"width": 16, "length": 12, "tokenizer": "bytes", "vocabulary": vocabulary, **more},
        outputs=outputs,
        inputs=(("tokens", (-1,)),),
        classes=("bad", "good") if task == "text" else (),
        vocabulary=vocabulary,
    )


def test_a_classifier_of_texts_has_the_loss_of_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("bytes", 0, TEXTS)
    plan = blueprint("text", "bag", 2, tokenizer.get_vocab_size(), hidden=8, dropout=0.0)
    model = build_model(plan).eval()
    (tmp_path / "bundle").mkdir()
    manifest = write_bundle(tmp_path / "bundle", model, plan, tokenizer)
    dataset = open_dataset(text_dataset(tmp_path / "data"), task="text", held_out=0.0)
    with open_version(tmp_path / "bundle", manifest) as opened:
        questions = questions_of(opened.signature, dataset, dataset.train, directory=tmp_path / "bundle")
        found = measure_quality(opened, questions)
    rows = dataset.train.all()
    with torch.no_grad():
        logits = model(encode_padded(tokenizer, rows.texts, 12))
    assert found.metrics["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, rows.targets)), rel=1e-4
    )
    assert found.metrics["accuracy"] == pytest.approx(
        float((logits.argmax(1) == rows.targets).float().mean())
    )


def test_a_language_model_has_the_perplexity_of_its_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("bytes", 0, TEXTS)
    size = tokenizer.get_vocab_size()
    plan = blueprint("language_model", "gpt", size, size, layers=1, heads=2, dropout=0.0)
    model = build_model(plan).eval()
    (tmp_path / "bundle").mkdir()
    manifest = write_bundle(tmp_path / "bundle", model, plan, tokenizer)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.txt").write_text("\n".join(TEXTS))
    fetched = dataset_of(tmp_path / "data", format="text")
    dataset = open_dataset(fetched, task="language_model", held_out=0.0)
    with open_version(tmp_path / "bundle", manifest) as opened:
        questions = questions_of(opened.signature, dataset, dataset.train, directory=tmp_path / "bundle")
        found = measure_quality(opened, questions)
    windows = TokenWindows(encode_stream(tokenizer, dataset.train.all().texts), 12, torch.device("cpu"))
    inputs, targets = windows.batch(torch.arange(len(windows)))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert found.tokens == targets.numel()
    assert found.metrics["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_texts_for_a_version_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", 0, TEXTS)
    plan = blueprint("text", "bag", 2, tokenizer.get_vocab_size(), hidden=8, dropout=0.0)
    (tmp_path / "bundle").mkdir()
    manifest = write_bundle(tmp_path / "bundle", build_model(plan), plan)
    dataset = open_dataset(text_dataset(tmp_path / "data"), task="text", held_out=0.0)
    with (
        open_version(tmp_path / "bundle", manifest) as opened,
        pytest.raises(JobFailure, match=r"tokenizer\.json") as failure,
    ):
        questions_of(opened.signature, dataset, dataset.train, directory=tmp_path / "bundle")
    assert failure.value.cause == "UNSUPPORTED"
