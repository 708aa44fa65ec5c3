"""Versions in other formats answer as their sources, or are not published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from penstock_worker.adapters.conversion import comparison, job
from penstock_worker.adapters.measuring import open_version
from penstock_worker.usecases.job_context import FetchedVersion, JobFailure, Stopped
from support.conversions import DATASET, VERSION, context_of, convert
from support.measured import build_skops, digits_dataset, iris_dataset
from support.models import (
    build_digits_cnn,
    build_echo_onnx,
    build_tree_skops,
    digits_test_set,
    write_manifest,
)

# In one process: what torch's exporter learns about ONNX takes a second each time.
pytestmark = pytest.mark.filterwarnings("ignore")


def answers(version: FetchedVersion, **inputs: Any) -> dict[str, Any]:
    with open_version(version.path, version.version.manifest) as opened:
        return opened.predict(inputs)


def test_a_network_becomes_onnx_with_the_signature_and_the_batches_of_its_source(tmp_path: Path) -> None:
    manifest = build_digits_cnn(tmp_path / "cnn", steps=10)
    found, report = convert(
        tmp_path, tmp_path / "cnn", manifest, "onnx", dataset=digits_dataset(tmp_path / "data"), opset=18
    )
    made = found.version.manifest
    assert (made.runtime, made.format, made.entrypoint) == ("onnx", "onnx", "model.onnx")
    assert made.signature == manifest.signature
    assert made.batching == manifest.batching
    assert list(made.lineage.parents) == [VERSION]
    assert made.lineage.operation == "convert"
    assert dict(made.lineage.parameters) == {"format": "onnx", "opset": "18", "rows": "256"}
    assert list(made.lineage.datasets) == ["artifacts/data/versions/1"]
    assert report["rows"] == 256
    assert 0 < report["difference"] < 1e-4
    images, _ = digits_test_set()
    source = answers(FetchedVersion(tmp_path / "cnn", found.version.__class__(manifest=manifest)), x=images)
    np.testing.assert_allclose(answers(found, x=images)["y"], source["y"], atol=1e-4)


@pytest.mark.parametrize(
    ("known", "most_bytes", "asked"),
    [("digits", 1 << 30, True), ("digits", 1, False), ("iris", 1 << 30, False), ("", 1 << 30, False)],
    ids=["at hand", "too large", "of another kind", "deleted"],
)
def test_without_a_dataset_both_are_asked_what_the_version_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str, most_bytes: int, asked: bool
) -> None:
    monkeypatch.setattr(job, "LEARNT_BYTES", most_bytes)
    manifest = build_digits_cnn(tmp_path / "cnn", steps=1)
    manifest.lineage.datasets.append(DATASET)
    given = {"digits": digits_dataset, "iris": iris_dataset}
    dataset = given[known](tmp_path / "data") if known else None
    context = context_of(tmp_path, tmp_path / "cnn", manifest, "safetensors", dataset=dataset)
    context.job.convert.dataset = ""
    job.run(context)
    (found,) = context.published()
    assert list(found.version.manifest.lineage.datasets) == ([DATASET] if asked else [])
    assert context.found()["dataset"] == (DATASET if asked else "")
    log = context.root / "log.jsonl"
    assert (log.exists() and f"{DATASET} cannot be asked" in log.read_text()) is not asked


def test_a_pipeline_with_a_forest_becomes_onnx(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    forest = RandomForestClassifier(10, random_state=0)
    model = make_pipeline(StandardScaler(), forest).fit(x.astype(np.float32), y)
    manifest = build_skops(tmp_path / "forest", model, 4, 3)
    found, report = convert(
        tmp_path, tmp_path / "forest", manifest, "onnx", dataset=iris_dataset(tmp_path / "data")
    )
    assert report["rows"] == 150
    given = answers(found, x=x.astype(np.float32))
    assert given["label"].dtype == np.int64
    assert given["probabilities"].dtype == np.float64
    assert (given["label"] == model.predict(x.astype(np.float32))).all()


def test_an_estimator_or_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    manifest = build_skops(tmp_path / "centroid", NearestCentroid().fit(x, y), 4, 3)
    del manifest.signature.outputs[1]
    with pytest.raises(JobFailure, match=r"nothing for sklearn\.neighbors.*NearestCentroid") as failure:
        convert(tmp_path, tmp_path / "centroid", manifest, "onnx")
    assert failure.value.cause == "UNSUPPORTED"

    class Eigen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x @ x.transpose(-1, -2)).real

    (tmp_path / "eigen").mkdir()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Eigen(), (torch.rand(2, 4, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "eigen" / "model.pt2")
    manifest = write_manifest(
        tmp_path / "eigen",
        runtime="torch",
        kind="pt2",
        entrypoint="model.pt2",
        inputs=[("x", "FP32", (-1, 4, 4))],
        outputs=[("y", "FP32", (-1, 4))],
        max_batch_size=8,
    )
    with pytest.raises(JobFailure, match=r"nothing for the operator aten\.linalg_eig\.default") as failure:
        convert(tmp_path, tmp_path / "eigen", manifest, "onnx")
    assert failure.value.cause == "UNSUPPORTED"


def test_weights_of_a_program_lie_beside_it_in_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    manifest = build_digits_cnn(tmp_path / "cnn", steps=1)
    found, report = convert(tmp_path, tmp_path / "cnn", manifest, "safetensors")
    made = found.version.manifest
    assert (made.format, made.entrypoint) == ("pt2", "model.pt2")
    assert report["difference"] == 0
    weights = load_file(found.path / "model.safetensors")
    program = torch.export.load(found.path / "model.pt2")
    assert weights.keys() == program.state_dict.keys()
    assert all(torch.equal(weights[name], value) for name, value in program.state_dict.items())


def test_what_cannot_be_is_refused_with_what_can(tmp_path: Path) -> None:
    tree, echo = build_tree_skops(tmp_path / "tree"), build_echo_onnx(tmp_path / "echo")
    with pytest.raises(JobFailure, match="is skops, which cannot be converted to pt2; it can to onnx"):
        convert(tmp_path, tmp_path / "tree", tree, "pt2")
    with pytest.raises(JobFailure, match="is onnx already"):
        convert(tmp_path, tmp_path / "echo", echo, "onnx")
    with pytest.raises(JobFailure, match="has no parameter 'opset'"):
        convert(tmp_path, tmp_path / "tree", tree, "safetensors", opset=20)


def test_compiled_code_is_made_only_where_the_operator_allows_it(tmp_path: Path) -> None:
    manifest = build_digits_cnn(tmp_path / "cnn", steps=1)
    context = context_of(tmp_path, tmp_path / "cnn", manifest, "aoti")
    context.allowed = False
    with pytest.raises(JobFailure, match="PENSTOCK_ALLOW_COMPILED_MODELS"):
        job.run(context)


def test_a_result_that_answers_differently_is_not_published_and_the_worst_row_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_tree_skops(tmp_path / "tree")
    context = context_of(
        tmp_path, tmp_path / "tree", manifest, "onnx", dataset=iris_dataset(tmp_path / "data")
    )
    # A conversion that forgets the last split: the tree of another depth.
    whole = job.write_result

    def wrong(source: Any, plan: Any, directory: Path, **more: Any) -> Any:
        from sklearn.tree import DecisionTreeClassifier

        build_skops(
            tmp_path / "other", DecisionTreeClassifier(max_depth=1).fit(*load_iris(return_X_y=True)), 4, 3
        )
        return whole(job.Source(source.name, tmp_path / "other", *_rest(source)), plan, directory, **more)

    monkeypatch.setattr(job, "write_result", wrong)
    with pytest.raises(JobFailure, match=r"row \d+ of 150 has (another answer|a relative)") as failure:
        job.run(context)
    assert failure.value.cause == "NUMERICS"
    assert not context.published()


def _rest(source: job.Source) -> tuple[Any, ...]:
    return source.manifest, source.signature, source.max_rows


def test_a_conversion_that_shall_stop_stops(tmp_path: Path) -> None:
    manifest = build_tree_skops(tmp_path / "tree")
    context = context_of(tmp_path, tmp_path / "tree", manifest, "onnx")
    context.stop()
    with pytest.raises(Stopped):
        job.run(context)


@pytest.mark.parametrize(
    ("given", "found", "difference"),
    [
        ([[10.0, 0.0001]], [[10.0, 0.0002]], 1e-5),
        ([[1.0, float("nan")]], [[1.0, float("nan")]], 0.0),
        ([[1.0, float("nan")]], [[1.0, 2.0]], float("inf")),
        ([[1.0], [float("inf")]], [[1.0], [float("inf")]], 0.0),
        ([[0.0]], [[0.0]], 0.0),
        ([[100.0], [1e-9]], [[100.0], [2e-9]], 1e-5),
    ],
)
def test_differences_are_measured_beside_the_largest_number_of_the_row(
    given: list[list[float]], found: list[list[float]], difference: float
) -> None:
    worst = comparison._worst({"y": np.array(given)}, {"y": np.array(found)}, len(given), 0, 0.001)
    assert worst.difference == pytest.approx(difference)


def test_another_class_is_alike_only_where_two_are_as_good_as_one_another() -> None:
    scores = np.array([[0.5, 0.4999], [0.9, 0.1]])
    given = {"label": np.array([0, 0]), "scores": scores}
    tied = comparison._worst(given, {"label": np.array([1, 0]), "scores": scores}, 2, 0, 0.001)
    assert tied.difference == 0
    other = comparison._worst(given, {"label": np.array([0, 1]), "scores": scores}, 2, 10, 0.001)
    assert (other.difference, other.output, other.row) == (float("inf"), "label", 11)
    with pytest.raises(JobFailure, match="row 11 of 20 has another answer in label"):
        comparison.require_alike(comparison.dataclasses.replace(other, rows=20), 0.001, "it")
