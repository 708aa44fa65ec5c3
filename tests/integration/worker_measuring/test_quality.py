"""What a version is worth on rows whose answers are known, beside scikit-learn's own words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error, r2_score

from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.measuring import measure_quality, open_version, questions_of
from penstock_worker.usecases.job_context import JobFailure
from support.measured import build_skops, diabetes_dataset, digits_dataset, iris_dataset
from support.models import build_digits_cnn, build_python, build_tree_skops, digits_test_set


def test_a_network_has_the_accuracy_and_loss_that_its_logits_give(tmp_path: Path) -> None:
    manifest = build_digits_cnn(tmp_path / "cnn", steps=20)
    dataset = open_dataset(digits_dataset(tmp_path / "data"), held_out=0.0)
    with open_version(tmp_path / "cnn", manifest) as opened:
        found = measure_quality(opened, questions_of(opened.signature, dataset, dataset.train))
        images, labels = digits_test_set()
        logits = opened.predict({"x": images})["y"].astype(np.float64)
    assert logits.shape == (397, 10)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert found.metrics["f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert found.metrics["loss"] == pytest.approx(log_loss(labels, powers / powers.sum(1, keepdims=True)))
    assert found.rows == 397
    accuracy = found.metrics["accuracy"]
    assert found.margins["accuracy"] == pytest.approx(1.96 * (accuracy * (1 - accuracy) / 397) ** 0.5)


def test_a_tree_has_the_loss_of_its_probabilities(tmp_path: Path) -> None:
    manifest = build_tree_skops(tmp_path / "tree")
    dataset = open_dataset(iris_dataset(tmp_path / "data"), held_out=0.0)
    with open_version(tmp_path / "tree", manifest) as opened:
        found = measure_quality(opened, questions_of(opened.signature, dataset, dataset.train))
        x, y = load_iris(return_X_y=True)
        probabilities = opened.predict({"x": x.astype(np.float32)})["probabilities"]
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(y, probabilities.argmax(1)))
    assert found.metrics["loss"] == pytest.approx(log_loss(y, probabilities), rel=1e-6)


def test_a_regression_has_the_errors_of_its_numbers(tmp_path: Path) -> None:
    x, y = load_diabetes(return_X_y=True)
    manifest = build_skops(tmp_path / "ridge", Ridge().fit(x, y), 10, 0)
    dataset = open_dataset(diabetes_dataset(tmp_path / "data"), held_out=0.0)
    with open_version(tmp_path / "ridge", manifest) as opened:
        found = measure_quality(opened, questions_of(opened.signature, dataset, dataset.train))
        given = opened.predict({"x": x.astype(np.float32)})["prediction"]
    assert found.metrics["r2"] == pytest.approx(r2_score(y, given), rel=1e-5)
    assert found.metrics["mae"] == pytest.approx(mean_absolute_error(y, given), rel=1e-5)
    assert found.metrics["mse"] == found.metrics["loss"]


def test_only_part_of_the_rows_and_only_what_is_wanted_can_be_measured(tmp_path: Path) -> None:
    manifest = build_tree_skops(tmp_path / "tree")
    dataset = open_dataset(iris_dataset(tmp_path / "data"), held_out=0.2)
    with open_version(tmp_path / "tree", manifest) as opened:
        questions = questions_of(opened.signature, dataset, dataset.held_out)
        found = measure_quality(opened, questions, metrics=["accuracy"], limit=10)
        assert (found.rows, set(found.metrics)) == (10, {"accuracy"})
        with pytest.raises(JobFailure, match="has no r2; it has accuracy"):
            measure_quality(opened, questions, metrics=["r2"])


def test_classes_that_come_as_words_are_compared_by_their_names(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n\n\nclass Model:\n    def predict(self, inputs):\n"
        '        return {"label": np.where(inputs["x"][:, 2] < 2.5, b"0", b"2").astype(object)}\n'
    )
    manifest = build_python(
        tmp_path / "rule",
        code,
        inputs=[("x", "FP32", (-1, 4))],
        outputs=[("label", "BYTES", (-1,))],
    )
    dataset = open_dataset(iris_dataset(tmp_path / "data"), held_out=0.0)
    with open_version(tmp_path / "rule", manifest, allow_python_runtime=True) as opened:
        questions = questions_of(opened.signature, dataset, dataset.train)
        found = measure_quality(opened, questions, metrics=["accuracy"])
        assert found.metrics["accuracy"] == pytest.approx(2 / 3)
        with pytest.raises(JobFailure, match="loss needs a score for each class"):
            measure_quality(opened, questions, metrics=["loss"])


def test_a_bundle_that_cannot_be_opened_fails_the_job_with_why(tmp_path: Path) -> None:
    manifest = build_tree_skops(tmp_path / "tree")
    (tmp_path / "tree" / "model.skops").write_bytes(b"nothing")
    with pytest.raises(JobFailure, match="cannot be opened") as failure:
        open_version(tmp_path / "tree", manifest, name="models/tree/versions/1")
    assert failure.value.cause == "UNSUPPORTED"
