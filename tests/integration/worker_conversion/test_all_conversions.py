"""Every conversion from every kind of source, on real models and their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import ensemble, linear_model, neighbors, neural_network, svm, tree
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from penstock.common.v1 import tensor_pb2
from penstock.registry.v1.manifest_pb2 import Manifest
from penstock_worker.adapters.conversion.job import SOURCES
from penstock_worker.adapters.measuring import drawn_inputs, measure_quality, open_version, questions_of
from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.adapters.training.export import write_bundle
from penstock_worker.adapters.training.texts import make_tokenizer
from penstock_worker.usecases.job_context import JobFailure
from support.conversions import convert
from support.job_context import dataset_of
from support.measured import build_skops, digits_dataset, save_npz
from support.models import build_digits_cnn

pytestmark = [
    pytest.mark.training,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300),
]


def build_recipe(directory: Path) -> Manifest:
    """What a training of a table of 30 columns writes, with fresh weights."""
    directory.mkdir()
    torch.manual_seed(0)
    blueprint = Blueprint(
        task="tabular",
        architecture="mlp",
        parameters={"hidden": (32, 32), "dropout": 0.0, "activation": "relu"},
        outputs=2,
        inputs=(("x", (30,)),),
        classes=("0", "1"),
    )
    return write_bundle(directory, build_model(blueprint), blueprint)


@pytest.mark.parametrize("to", ["pt2", "onnx", "aoti", "safetensors"])
@pytest.mark.parametrize("kind", ["pt2", "torchscript"])
def test_a_trained_network_keeps_its_accuracy_in_every_format(tmp_path: Path, kind: str, to: str) -> None:
    if kind not in SOURCES[to]:
        pytest.skip("nothing to convert")
    manifest = build_digits_cnn(tmp_path / "cnn", steps=60, kind=kind)
    dataset = digits_dataset(tmp_path / "data")
    found, report = convert(tmp_path, tmp_path / "cnn", manifest, to, dataset=dataset, rows=397)
    assert report["rows"] == 397
    assert report["difference"] < 1e-4
    from penstock_worker.adapters.data import open_dataset

    opened = open_dataset(dataset, held_out=0.0)
    with open_version(found.path, found.version.manifest, allow_compiled_models=True) as version:
        quality = measure_quality(version, questions_of(version.signature, opened, opened.train))
    assert quality.metrics["accuracy"] > 0.9


def test_what_a_recipe_made_goes_through_all_formats_and_back(tmp_path: Path) -> None:
    manifest = build_recipe(tmp_path / "recipe")
    weights, _ = convert(tmp_path / "1", tmp_path / "recipe", manifest, "safetensors")
    assert weights.version.manifest.format == "safetensors"
    assert not (weights.path / "model.pt2").exists()
    with (
        open_version(tmp_path / "recipe", manifest) as source,
        open_version(weights.path, weights.version.manifest) as result,
    ):
        inputs = drawn_inputs(source.signature, 70)
        np.testing.assert_allclose(
            result.predict(inputs)["logits"], source.predict(inputs)["logits"], atol=1e-5
        )
    for to in ("pt2", "onnx", "aoti"):
        _, report = convert(tmp_path / to, weights.path, weights.version.manifest, to)
        assert report["difference"] < 1e-4, to


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@pytest.mark.parametrize(
    "model",
    [
        ensemble.RandomForestClassifier(20, random_state=0),
        ensemble.ExtraTreesClassifier(20, random_state=0),
        ensemble.GradientBoostingClassifier(n_estimators=10, random_state=0),
        ensemble.HistGradientBoostingClassifier(max_iter=10, random_state=0),
        ensemble.AdaBoostClassifier(n_estimators=10, random_state=0),
        tree.DecisionTreeClassifier(random_state=0),
        linear_model.LogisticRegression(max_iter=300),
        linear_model.RidgeClassifier(),
        linear_model.SGDClassifier(random_state=0),
        svm.SVC(random_state=0),
        svm.LinearSVC(random_state=0),
        neighbors.KNeighborsClassifier(),
        neural_network.MLPClassifier(max_iter=50, random_state=0),
    ],
    ids=lambda model: type(model).__name__,
)
def test_classifiers_alone_and_behind_a_scaler_become_onnx(tmp_path: Path, model: Any, datatype: str) -> None:
    for load in (load_breast_cancer, load_wine):
        x, y = load(return_X_y=True)
        x = x.astype(np.float32)
        dataset = save_npz(tmp_path / "data" / load.__name__, x, y)
        for name, whole in (("alone", model), ("scaled", make_pipeline(StandardScaler(), model))):
            bundle = tmp_path / load.__name__ / name
            manifest = build_skops(bundle, whole.fit(x, y), x.shape[1], len(set(y)))
            manifest.signature.inputs[0].data_type = tensor_pb2.DataType.Value(f"DATA_TYPE_{datatype}")  # type: ignore[assignment]
            if not hasattr(whole, "predict_proba"):
                del manifest.signature.outputs[1]
            _, report = convert(bundle, bundle, manifest, "onnx", dataset=dataset, rows=1000)
            assert report["rows"] == len(x)
            assert report["difference"] < 1e-4


@pytest.mark.parametrize(
    "model",
    [
        linear_model.Ridge(),
        svm.SVR(),
        ensemble.GradientBoostingRegressor(n_estimators=20, random_state=0),
        tree.DecisionTreeRegressor(max_depth=5, random_state=0),
        neural_network.MLPRegressor(max_iter=50, random_state=0),
    ],
    ids=lambda model: type(model).__name__,
)
def test_regressions_behind_steps_become_onnx(tmp_path: Path, model: Any) -> None:
    x, y = load_diabetes(return_X_y=True)
    x = x.astype(np.float32)
    dataset = save_npz(tmp_path / "data", x, y.astype(np.float32))
    whole = make_pipeline(SimpleImputer(), StandardScaler(), model).fit(x, y)
    manifest = build_skops(tmp_path / "model", whole, 10, 0)
    _, report = convert(tmp_path, tmp_path / "model", manifest, "onnx", dataset=dataset, rows=442)
    assert report["difference"] < 1e-4


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_histogram_boosting_keeps_thresholds_that_are_numbers_of_its_data(
    tmp_path: Path, datatype: str
) -> None:
    # Rows of a dataset are fp32, which is on the other side of many a threshold than the number itself.
    for load, model in (
        (load_breast_cancer, ensemble.HistGradientBoostingClassifier(max_iter=20, random_state=0)),
        (load_wine, ensemble.HistGradientBoostingClassifier(max_iter=10, random_state=0)),
        (load_diabetes, ensemble.HistGradientBoostingRegressor(max_iter=20, random_state=0)),
    ):
        x, y = load(return_X_y=True)
        kinds = len(set(y)) if "Classifier" in type(model).__name__ else 0
        dataset = save_npz(tmp_path / "data" / load.__name__, x.astype(np.float32), y)
        for name, whole in (("alone", model), ("scaled", make_pipeline(StandardScaler(), model))):
            bundle = tmp_path / load.__name__ / name
            manifest = build_skops(bundle, whole.fit(x, y), x.shape[1], kinds)
            manifest.signature.inputs[0].data_type = tensor_pb2.DataType.Value(f"DATA_TYPE_{datatype}")  # type: ignore[assignment]
            found, report = convert(bundle, bundle, manifest, "onnx", dataset=dataset, rows=1000)
            assert report["difference"] < 1e-4
            if datatype == "FP64":
                with open_version(found.path, found.version.manifest) as version:
                    answers = list(version.predict({"x": x}).values())[-1]
                right = whole.predict_proba(x) if kinds else whole.predict(x)
                np.testing.assert_allclose(answers, right, rtol=1e-5, atol=1e-5)


def test_several_inputs_and_the_score_of_the_second_class_keep_their_shapes(tmp_path: Path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    manifest = build_skops(tmp_path / "svc", svm.LinearSVC(random_state=0).fit(x[:, :3], y), 3, 0)
    del manifest.signature.inputs[:], manifest.signature.outputs[:]
    fp64 = tensor_pb2.DATA_TYPE_FP64
    manifest.signature.inputs.add(name="radius", data_type=fp64, shape=[-1])
    manifest.signature.inputs.add(name="more", data_type=fp64, shape=[-1, 2])
    manifest.signature.outputs.add(name="decision_function", data_type=fp64, shape=[-1])
    manifest.signature.outputs.add(name="label", data_type=tensor_pb2.DATA_TYPE_INT64, shape=[-1])
    found, report = convert(tmp_path, tmp_path / "svc", manifest, "onnx")
    assert report["rows"] == 256
    assert found.version.manifest.signature == manifest.signature


def test_what_is_at_the_threshold_of_a_tree_by_another_rounding_is_not_published(tmp_path: Path) -> None:
    from sklearn.preprocessing import MinMaxScaler

    x, y = load_diabetes(return_X_y=True)
    forest = ensemble.RandomForestRegressor(30, random_state=0)
    whole = make_pipeline(SimpleImputer(), MinMaxScaler(), forest).fit(x, y)
    manifest = build_skops(tmp_path / "model", whole, 10, 0)
    dataset = save_npz(tmp_path / "data", x.astype(np.float32), y.astype(np.float32))
    with pytest.raises(JobFailure, match=r"row \d+ of 442 has a relative difference") as failure:
        convert(tmp_path, tmp_path / "model", manifest, "onnx", dataset=dataset, rows=442)
    assert failure.value.cause == "NUMERICS"


TEXTS = [f"row {number} is {'good' if number % 2 else 'bad'} and says so" for number in range(40)]


@pytest.mark.parametrize("to", ["onnx", "safetensors"])
@pytest.mark.parametrize(("task", "architecture"), [("text", "transformer"), ("language_model", "gpt")])
def test_a_transformer_answers_texts_of_any_length_in_other_formats(
    tmp_path: Path, task: str, architecture: str, to: str
) -> None:
    tokenizer = make_tokenizer("bytes", 0, TEXTS)
    size = tokenizer.get_vocab_size()
    blueprint = Blueprint(
        task=task,
        architecture=architecture,
        parameters={"width": 32, "length": 24, "layers": 2, "heads": 2, "dropout": 0.0, "vocabulary": size},
        outputs=2 if task == "text" else size,
        inputs=(("tokens", (-1,)),),
        classes=("bad", "good") if task == "text" else (),
        vocabulary=size,
    )
    (tmp_path / "bundle").mkdir()
    (tmp_path / "data").mkdir()
    torch.manual_seed(0)
    manifest = write_bundle(tmp_path / "bundle", build_model(blueprint).eval(), blueprint, tokenizer)
    rows = ["text,label", *(f"{text},{'good' if 'good' in text else 'bad'}" for text in TEXTS)]
    name, text = ("data.csv", "\n".join(rows)) if task == "text" else ("corpus.txt", "\n".join(TEXTS))
    (tmp_path / "data" / name).write_text(text + "\n")
    dataset = dataset_of(
        tmp_path / "data", format="csv" if task == "text" else "text", description={"task": task}
    )
    for way, given in (("rows", dataset), ("drawn", None)):
        found, report = convert(tmp_path / way, tmp_path / "bundle", manifest, to, dataset=given)
        assert report["difference"] < 1e-4
        assert (found.path / "tokenizer.json").exists()
