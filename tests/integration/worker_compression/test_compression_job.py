"""COMPRESS jobs on a small digits CNN that a recipe trained, without a mesh."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import json_format
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.compression import job as job_module
from penstock_worker.adapters.compression import pipeline, search, trial
from penstock_worker.adapters.compression.job import run
from penstock_worker.adapters.measuring import open_version
from penstock_worker.usecases.job_context import JobFailure, Stopped
from support.compression import Source, candidates, digits_cnn, trained
from support.job_context import FileJobContext, version_of
from support.measured import build_skops
from support.training import example


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return digits_cnn(tmp_path_factory.mktemp("digits"), epochs=3)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is what happens, not how fast: a short look at speed is enough."""
    short = trial.Effort(0.02, 200)
    monkeypatch.setattr(job_module, "_SECONDS", 0.02)
    monkeypatch.setattr(search, "_BRIEF", short)
    monkeypatch.setattr(search, "_THOROUGH", short)


def answers(context: FileJobContext, rows: int = 4) -> dict[str, np.ndarray]:
    """What the published version says to a few rows."""
    (version,) = context.published()
    images = np.random.default_rng(0).uniform(0, 16, (rows, 1, 8, 8)).astype(np.float32)
    with open_version(version.path, version.version.manifest) as opened:
        return opened.predict({"x": images})


def test_steps_make_a_version_with_its_report_lineage_and_verdict(source: Source, tmp_path: Path) -> None:
    def change(job: job_pb2.Job) -> None:
        job.compress.model = "models/small"
        job.compress.gate.max_metric_loss = 0.1
        job.compress.gate.max_size_ratio = 0.5

    steps = [("prune_channels", {"repair_epochs": 4}), ("quantize", {"scheme": "static_int8"})]
    context = source.compress(tmp_path / "job", steps, change)
    before, after = candidates(context)
    assert after["size_ratio"] < 0.3
    assert after["metric"] >= before["metric"] - 0.1
    assert after["passed"]
    (version,) = context.published()
    manifest = version.version.manifest
    assert version.version.name == "models/small/versions/1"
    assert (manifest.runtime, manifest.format) == ("onnx", "onnx")
    assert manifest.signature == source.version.version.manifest.signature
    assert manifest.gate.passed
    assert set(manifest.gate.measured) == {"metric_loss", "speed_up", "size_ratio"}
    assert manifest.metrics["accuracy"] == after["metric"]
    assert list(manifest.lineage.parents) == [source.version.version.name]
    assert manifest.lineage.operation == "compress"
    assert "prune_channels" in manifest.lineage.parameters["steps"]
    found = answers(context)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-4)
    assert context.last_metrics()["prune_channels/parameters"] < 0.5


def test_what_fails_its_gate_is_published_and_says_what_it_failed(source: Source, tmp_path: Path) -> None:
    def change(job: job_pb2.Job) -> None:
        job.compress.gate.max_size_ratio = 0.01

    context = source.compress(tmp_path / "job", [("clip", {})], change)
    (version,) = context.published()
    gate = version.version.manifest.gate
    assert not gate.passed
    assert len(gate.failures) == 1
    assert "size" in gate.failures[0]
    assert not candidates(context)[1]["recommended"]
    assert context.found()["gate"]["failures"] == list(gate.failures)


def test_a_job_that_was_stopped_goes_on_after_its_last_step(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [("prune_channels", {"repair_epochs": 0}), ("low_rank", {"rank": 8}), ("clip", {})]
    context = source.context(tmp_path / "job", steps)
    done: list[str] = []
    original = pipeline.run_step

    def counted(subject, step, tools):  # type: ignore[no-untyped-def]
        facts = original(subject, step, tools)
        done.append(step.name)
        if len(done) == 2:
            context.stop()
        return facts

    monkeypatch.setattr(pipeline, "run_step", counted)
    with pytest.raises(Stopped):
        run(context)
    (tmp_path / "job" / "stop").unlink()
    run(context)
    assert done == ["prune_channels", "low_rank", "clip"]
    assert [step["step"].partition("(")[0] for step in context.found()["steps"]] == done


@pytest.mark.training
def test_what_was_compressed_can_be_compressed_further(source: Source, tmp_path: Path) -> None:
    steps = [("prune_channels", {"repair_epochs": 1}), ("low_rank", {"rank": 8})]
    (version,) = source.compress(tmp_path / "job", steps).published()
    again = Source(version, source.dataset)
    further = again.compress(tmp_path / "further", [("quantize", {"scheme": "weight_only_int8"})])
    assert candidates(further)[1]["size_ratio"] < 0.6


@pytest.mark.training
def test_a_search_finds_something_smaller_and_faster_and_goes_on_where_it_was(
    source: Source, tmp_path: Path
) -> None:
    def change(job: job_pb2.Job) -> None:
        job.compress.search.budget.FromSeconds(60)
        job.compress.search.max_trials = 5
        job.compress.gate.max_metric_loss = 0.2
        job.compress.gate.max_size_ratio = 0.6

    context = source.context(tmp_path / "job", [], change)
    kept = search.Search._keep

    def stop_at_the_third(self: search.Search) -> None:
        kept(self)
        if self._step == 3:
            context.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.Search, "_keep", stop_at_the_third)
        with pytest.raises(Stopped):
            run(context)
    first = [line["text"] for line in context.lines("log")]
    (tmp_path / "job" / "stop").unlink()
    run(context)
    later = [line["text"] for line in context.lines("log")][len(first) :]
    assert "Going on after trial 3" in later[0]
    assert not set(first) & set(later), "a trial was repeated"
    found = context.found()
    names = [each["name"] for each in found["candidates"]]
    assert names[0] == "source"
    assert len(set(names)) == len(names) == 6
    best = next(each for each in found["candidates"] if each["recommended"])
    assert best["passed"]
    assert best["size_ratio"] < 0.6
    (version,) = context.published()
    assert version.version.manifest.gate.passed
    assert version.path.joinpath(version.version.manifest.entrypoint).stat().st_size == best["size_bytes"]
    assert (
        json_format.MessageToDict(version.version.manifest)["lineage"]["parameters"]["steps"] == best["name"]
    )


@pytest.mark.training
def test_a_search_that_is_stopped_while_it_publishes_publishes_when_it_goes_on(
    source: Source, tmp_path: Path
) -> None:
    def change(job: job_pb2.Job) -> None:
        job.compress.search.budget.FromSeconds(60)
        job.compress.search.max_trials = 1

    def stopped(*_: object, **__: object) -> str:
        raise Stopped

    context = source.context(tmp_path / "job", [], change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "publish_version", stopped)
        with pytest.raises(Stopped):
            run(context)
    measured = len(context.lines("metrics"))
    run(context)
    assert len(context.lines("metrics")) == measured
    (version,) = context.published()
    best = candidates(context)[1]
    assert best["recommended"]
    assert version.path.joinpath(version.version.manifest.entrypoint).stat().st_size == best["size_bytes"]


@pytest.mark.training
def test_a_pushed_graph_is_quantized_with_calibration(source: Source, tmp_path: Path) -> None:
    bundle = tmp_path / "pushed"
    bundle.mkdir()
    (bundle / "model.pt2").write_bytes((source.version.path / "model.pt2").read_bytes())
    pushed = Source(version_of(bundle, source.version.version.manifest, name="pushed"), source.dataset)
    context = pushed.compress(
        tmp_path / "job", [("prune", {"amount": 0.2}), ("quantize", {"scheme": "static_int8", "rows": 64})]
    )
    before, after = candidates(context)
    assert after["size_ratio"] < 0.5
    assert after["metric"] > before["metric"] - 0.1


def test_a_step_that_the_model_cannot_bear_is_refused_with_its_reason(source: Source, tmp_path: Path) -> None:
    with pytest.raises(JobFailure, match="no repeated blocks") as refused:
        source.compress(tmp_path / "job", [("drop_layers", {})])
    assert refused.value.cause == "INVALID_RECIPE"
    with pytest.raises(JobFailure, match="The architecture bag is for text; for image there are cnn") as text:
        source.compress(tmp_path / "student", [("distill", {"student": "bag"})])
    assert text.value.cause == "INVALID_RECIPE"
    with pytest.raises(JobFailure, match="did you mean 'quantize'"):
        source.compress(tmp_path / "typo", [("quantise", {})])


def test_a_teacher_of_other_classes_is_refused(source: Source, tmp_path: Path) -> None:
    wine = trained(
        tmp_path / "wine",
        example(tmp_path / "wine" / "data", "sklearn:wine"),
        epochs=1,
        architecture="linear",
    )
    teacher = "models/wine/versions/1"
    with pytest.raises(JobFailure, match="knows the classes") as refused:
        source.compress(
            tmp_path / "job", [("distill", {"teacher": teacher})], versions={teacher: wine.version}
        )
    assert refused.value.cause == "INVALID_RECIPE"


def test_what_does_not_fit_the_source_is_refused_before_anything_is_done(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_step(*_: object) -> None:
        raise AssertionError("a step was done")

    monkeypatch.setattr(pipeline, "run_step", no_step)
    wine = Source(source.version, example(tmp_path / "data", "sklearn:wine"))
    with pytest.raises(JobFailure, match=r"shape \[13\]; the model's input x takes \[1, 8, 8\]"):
        wine.compress(tmp_path / "rows", [("quantize", {})])

    def by_r2(job: job_pb2.Job) -> None:
        job.compress.gate.metric = "r2"

    with pytest.raises(JobFailure, match="'r2' is none of this task; it has accuracy, f1, loss"):
        source.compress(tmp_path / "metric", [("quantize", {})], by_r2)


def test_a_forest_teaches_by_its_probabilities(source: Source, tmp_path: Path) -> None:
    images, digits = load_digits(return_X_y=True)
    forest = RandomForestClassifier(20, random_state=0).fit(images.astype(np.float32), digits)
    teacher = "models/forest/versions/1"
    manifest = build_skops(tmp_path / "forest", forest, 64, 10)
    context = source.compress(
        tmp_path / "job",
        [("distill", {"teacher": teacher, "student": "linear", "learning_rate": 0.02, "alpha": 1.0})],
        versions={teacher: version_of(tmp_path / "forest", manifest, name=teacher)},
    )
    # Of the labels it has seen nothing (alpha 1).
    assert candidates(context)[1]["metric"] > 0.8


@pytest.mark.training
def test_a_student_by_recipe_learns_from_a_version_that_only_answers(source: Source, tmp_path: Path) -> None:
    teacher = "models/teacher/versions/1"
    quantized = source.compress(tmp_path / "teacher", [("quantize", {"scheme": "static_int8"})])
    (answering,) = quantized.published()
    context = source.compress(
        tmp_path / "job",
        [
            (
                "distill",
                {
                    "teacher": teacher,
                    "student": "mlp",
                    "student_parameters": {"hidden": [64]},
                    "epochs": 15,
                    "learning_rate": 0.003,
                },
            )
        ],
        versions={teacher: answering},
    )
    after = candidates(context)[1]
    assert after["size_ratio"] < 0.5
    assert after["metric"] > 0.85
    (version,) = context.published()
    changes = json.loads((version.path / "changes.json").read_text())
    assert changes[0]["architecture"] == "mlp"
    assert torch.get_num_threads() == 1
