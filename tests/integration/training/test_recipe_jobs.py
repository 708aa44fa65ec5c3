"""A recipe becomes a version: trained, stopped, gone on with, refused, served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penstock_kit.jobs.train import plan_of
from penstock_worker.adapters.measuring.loading import open_version
from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.adapters.training.job import run
from penstock_worker.adapters.training.memory import Needs, estimate, out_of_memory
from penstock_worker.adapters.training.optimizers import optimizer_maker
from penstock_worker.adapters.training.rebuild import rebuild
from penstock_worker.adapters.training.texts import load_tokenizer
from penstock_worker.usecases.job_context import FetchedDataset, FetchedVersion, JobFailure, Stopped
from support.job_context import FileJobContext, dataset_of, version_of
from support.training import arrays, context_for, example, train


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> FetchedDataset:
    return example(tmp_path_factory.mktemp("digits"), "sklearn:digits")


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> FetchedDataset:
    return example(tmp_path_factory.mktemp("wine"), "sklearn:wine")


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> FetchedDataset:
    return example(tmp_path_factory.mktemp("diabetes"), "sklearn:diabetes")


def _ask(version: FetchedVersion, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    with open_version(version.path, version.version.manifest, name=version.version.name) as opened:
        return dict(opened.predict(inputs))


class _StopsAt(FileJobContext):
    """Asked to stop once it has been asked so often whether to."""

    def __init__(self, context: FileJobContext, calls: int) -> None:
        self.__dict__.update(context.__dict__)
        self._calls = calls

    def should_stop(self) -> bool:
        self._calls -= 1
        return self._calls < 0


def test_a_trained_version_is_served_with_names_and_probabilities(
    tmp_path: Path, digits: FetchedDataset
) -> None:
    context = train(tmp_path, digits, architecture="linear", epochs=6, learning_rate=0.01)
    (version,) = context.published()
    manifest = version.version.manifest
    assert manifest.metrics["held_out/accuracy"] >= 0.95
    assert manifest.metrics["held_out/accuracy"] == context.last_metrics()["held_out/accuracy"]
    assert [spec.name for spec in manifest.signature.outputs] == ["logits", "probabilities"]
    assert list(manifest.signature.outputs[1].labels) == [str(digit) for digit in range(10)]
    assert (manifest.lineage.operation, manifest.lineage.job) == ("train", "jobs/training")
    assert list(manifest.lineage.datasets) == [digits.artifact.name]
    assert manifest.lineage.data_digest == digits.artifact.digest
    with np.load(next(digits.path.glob("*.npz"))) as found:
        images, labels = found["x"][:, None].astype(np.float32), found["y"]
    for rows in (1, manifest.batching.max_batch_size):
        answers = _ask(version, {"x": images[:rows]})
        assert answers["probabilities"].sum(1) == pytest.approx(1)
        assert (answers["probabilities"].argmax(1) == labels[:rows]).mean() >= 0.9
    rebuilt = rebuild(version.path)(torch.from_numpy(images[:5])).detach().numpy()
    assert rebuilt == pytest.approx(_ask(version, {"x": images[:5]})["logits"], abs=1e-4)


STOPPABLE: dict[str, Any] = {
    "architecture": "mlp",
    "parameters": {"hidden": [16], "dropout": 0.3},
    "optimizer": "sgd",
    "optimizer_parameters": {"momentum": 0.9},
    "learning_rate": 0.05,
    "schedule": "plateau",
    "schedule_parameters": {"patience": 0, "factor": 0.5},
    "patience": 4,
    "epochs": 8,
    "batch_size": 16,
}


def test_a_training_that_was_stopped_twice_ends_as_one_that_was_not(
    tmp_path: Path, wine: FetchedDataset
) -> None:
    whole = train(tmp_path / "whole", wine, **STOPPABLE)
    # In the middle of the third epoch of nine batches, and at the end of the fifth.
    for calls in (22, 23):
        context = _StopsAt(context_for(tmp_path / "parts", wine, **STOPPABLE), calls)
        with pytest.raises(Stopped):
            run(context)
    context = context_for(tmp_path / "parts", wine, **STOPPABLE)
    run(context)
    assert sum("Going on from" in line["text"] for line in context.lines("log")) == 2
    assert context.found()["metrics"] == whole.found()["metrics"]
    assert context.found()["best_epoch"] == whole.found()["best_epoch"]
    weights, expected = (
        load_file(found.published()[0].path / "model.safetensors") for found in (context, whole)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_seed_decides_the_result(tmp_path: Path, wine: FetchedDataset) -> None:
    recipe: dict[str, Any] = {
        "parameters": {"hidden": [8], "dropout": 0.2},
        "architecture": "mlp",
        "epochs": 3,
    }
    first, second = (train(tmp_path / name, wine, seed=3, **recipe).found()["metrics"] for name in "ab")
    other = train(tmp_path / "c", wine, seed=4, **recipe).found()["metrics"]
    assert first == second
    assert first != other


def test_gradient_descent_takes_one_step_an_epoch_whatever_is_computed_at_once(
    tmp_path: Path, wine: FetchedDataset
) -> None:
    recipe: dict[str, Any] = {"architecture": "linear", "optimizer": "gd", "learning_rate": 0.5, "epochs": 12}
    at_once = train(tmp_path / "a", wine, **recipe).found()
    in_parts = train(tmp_path / "b", wine, batch_size=10, **recipe).found()
    assert at_once["steps"] == in_parts["steps"] == 12
    assert at_once["metrics"] == pytest.approx(in_parts["metrics"], rel=1e-5)


def test_lbfgs_learns_in_a_few_steps(tmp_path: Path, diabetes: FetchedDataset) -> None:
    found = train(tmp_path, diabetes, architecture="linear", optimizer="lbfgs", epochs=2).found()
    assert found["steps"] == 2
    assert found["metrics"]["held_out/r2"] >= 0.4


def test_numbers_are_predicted_in_their_own_units(tmp_path: Path, diabetes: FetchedDataset) -> None:
    context = train(
        tmp_path,
        diabetes,
        architecture="linear",
        loss="huber",
        optimizer="rprop",
        epochs=40,
        precision="bf16",
    )
    metrics = context.found()["metrics"]
    assert metrics["held_out/r2"] >= 0.4
    # The target runs from 25 to 346.
    assert 30 < metrics["held_out/mae"] < 60
    (version,) = context.published()
    (output,) = version.version.manifest.signature.outputs
    assert (output.name, list(output.shape)) == ("values", [-1])
    answers = _ask(version, {"x": np.zeros((3, 10), np.float32)})
    assert answers["values"].shape == (3,)
    assert 100 < answers["values"][0] < 200


def test_early_stopping_takes_the_best_weights(tmp_path: Path, wine: FetchedDataset) -> None:
    context = train(
        tmp_path,
        wine,
        lambda job: setattr(job.train.recipe.early_stopping, "metric", "held_out/accuracy"),
        architecture="linear",
        optimizer="sgd",
        learning_rate=0.5,
        epochs=50,
        patience=3,
    )
    found = context.found()
    assert found["stopped_early"]
    assert found["epochs"] == found["best_epoch"] + 3
    accuracies = [
        line["values"]["held_out/accuracy"]
        for line in context.lines("metrics")
        if "held_out/accuracy" in line["values"]
    ]
    assert found["metrics"]["held_out/accuracy"] >= max(accuracies)


def test_classes_are_weighed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 2)).astype(np.float32)
    y = ((x[:, 0] + generator.normal(size=400)) > 1.8).astype(np.int64)
    dataset = arrays(tmp_path / "data", x=x, y=y)
    f1 = {
        name: train(
            tmp_path / name, dataset, architecture="linear", epochs=10, learning_rate=0.02, **more
        ).found()["metrics"]["held_out/f1"]
        for name, more in {
            "plain": {},
            "balanced": {"balance_classes": True},
            "named": {"class_weights": {"1": 5.0}},
        }.items()
    }
    assert f1["balanced"] > f1["plain"]
    assert f1["named"] > f1["plain"]
    with pytest.raises(JobFailure, match="'2', which is no class"):
        train(tmp_path / "wrong", dataset, class_weights={"2": 1.0})


def test_a_training_that_diverges_is_stopped_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, diabetes: FetchedDataset
) -> None:
    context = context_for(
        tmp_path,
        diabetes,
        architecture="linear",
        optimizer="sgd",
        learning_rate=3.0,
        epochs=400,
        checkpoint_seconds=0.0,
    )
    with pytest.raises(JobFailure, match=r"diverged in epoch .* smaller learning rate than 3") as caught:
        run(context)
    assert (caught.value.cause, caught.value.permanent) == ("DIVERGED", True)
    last = context.last_checkpoint()
    assert last is not None
    for path in last[1].glob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values())
    assert not context.published()


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path: Path, digits: FetchedDataset) -> None:
    with pytest.raises(JobFailure, match=r"needs about .* MiB \(weights .* each rank has 4.0 MiB") as caught:
        train(
            tmp_path,
            digits,
            lambda job: setattr(job.resources, "memory_bytes", 4 << 20),
            architecture="mlp",
            parameters={"hidden": [1024, 1024]},
        )
    assert caught.value.cause == "OUT_OF_MEMORY"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes"
        ),
    ],
)
def test_used_up_memory_is_said_with_the_numbers(error: Exception) -> None:
    needs = Needs(4 << 20, 4 << 20, 8 << 20, 1 << 20, 0, 32)
    failure = out_of_memory(error, needs, 8 << 20)
    assert failure is not None
    assert "about 17.0 MiB" in str(failure)
    assert "each rank has 8.0 MiB" in str(failure)
    assert failure.permanent
    assert out_of_memory(RuntimeError("shapes do not match"), needs, 0) is None


def test_data_and_recipe_that_do_not_fit_are_refused(
    tmp_path: Path, wine: FetchedDataset, diabetes: FetchedDataset
) -> None:
    one_class = arrays(tmp_path / "one", x=np.ones((20, 2), np.float32), y=np.array(["a"] * 20))
    missing = arrays(tmp_path / "nan", x=np.full((20, 2), np.nan, np.float32), y=np.arange(20) % 2)
    for number, (dataset, recipe, words, cause) in enumerate(
        [
            (wine, {"loss": "mse"}, "leave it out for cross_entropy", "INVALID_RECIPE"),
            (diabetes, {"loss": "cross_entropy"}, "leave it out for mse", "INVALID_RECIPE"),
            (diabetes, {"balance_classes": True}, "are for classes", "INVALID_RECIPE"),
            (wine, {"task": "image"}, "", "INVALID_DATA"),
            (wine, {"label": "colour"}, "colour", "INVALID_DATA"),
            (wine, {"optimizer": "adma"}, "did you mean 'adam'", "INVALID_RECIPE"),
            (wine, {"precision": "fp16"}, "fp16", "INVALID_RECIPE"),
            (one_class, {}, "", "INVALID_DATA"),
            (missing, {}, "", "INVALID_DATA"),
        ]
    ):
        with pytest.raises(JobFailure) as caught:
            train(tmp_path / str(number), dataset, epochs=1, **recipe)
        assert words in str(caught.value)
        assert caught.value.cause == cause


def test_a_version_is_gone_on_with_also_for_other_classes(tmp_path: Path, digits: FetchedDataset) -> None:
    first = train(tmp_path / "first", digits, architecture="mlp", epochs=6)
    (version,) = first.published()
    name = version.version.name
    with np.load(next(digits.path.glob("*.npz"))) as found:
        images, labels = found["x"], found["y"]
    same = train(
        tmp_path / "same",
        digits,
        versions={name: version},
        fine_tune=name,
        epochs=1,
        optimizer="sgd",
        learning_rate=1e-4,
    )
    before = first.found()["metrics"]["held_out/loss"]
    assert same.found()["metrics"]["held_out/loss"] == pytest.approx(before, rel=0.05)
    (published,) = same.published()
    assert list(published.version.manifest.lineage.parents) == [name]

    parity = arrays(tmp_path / "parity", x=images, y=np.where(labels % 2, "odd", "even"))
    other = train(tmp_path / "other", parity, versions={name: version}, fine_tune=name, epochs=4)
    assert other.found()["classes"] == ["even", "odd"]
    assert other.found()["metrics"]["held_out/accuracy"] >= 0.93

    small = arrays(tmp_path / "small", x=images[:, :4, :4], y=labels)
    with pytest.raises(JobFailure, match="takes rows of shape"):
        train(tmp_path / "refused", small, versions={name: version}, fine_tune=name)
    foreign = version_of(tmp_path / "parity", published.version.manifest)
    with pytest.raises(JobFailure, match="not made by a recipe"):
        train(tmp_path / "foreign", digits, versions={name: foreign}, fine_tune=name)


def test_texts_are_classified_by_token_ids_of_the_bundles_tokenizer(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    words = {"fruit": "apple pear plum grape", "tool": "hammer saw drill wrench"}
    generator = np.random.default_rng(0)
    lines = [
        f'{{"text": "{" ".join(generator.choice(some.split(), 3))}", "label": "{label}"}}'
        for label, some in words.items()
        for _ in range(60)
    ]
    (data / "texts.jsonl").write_text("\n".join(lines) + "\n")
    context = train(
        tmp_path / "job",
        dataset_of(data, format="text"),
        architecture="transformer",
        parameters={"width": 16, "layers": 1, "heads": 2, "length": 12, "vocabulary": 300},
        epochs=4,
        learning_rate=0.01,
    )
    assert context.found()["metrics"]["held_out/accuracy"] >= 0.95
    (version,) = context.published()
    manifest = version.version.manifest
    assert "tokenizer.json" in manifest.description
    assert manifest.batching.pad_variable_dimensions
    ids = load_tokenizer(version.path).encode("saw hammer").ids
    alone = _ask(version, {"tokens": np.array([ids])})
    # What fills up a row means nothing.
    filled = _ask(version, {"tokens": np.array([[*ids, *([0] * (12 - len(ids)))]])})
    assert alone["probabilities"][0, 1] > 0.9
    assert filled["logits"] == pytest.approx(alone["logits"], abs=1e-4)


@pytest.mark.parametrize(
    ("recipe", "states"),
    [
        ({"optimizer": "gd"}, 0),
        ({"optimizer": "sgd"}, 0),
        ({"optimizer": "sgd", "optimizer_parameters": {"momentum": 0.9}}, 1),
        ({"optimizer": "rmsprop"}, 1),
        ({"optimizer": "adamw"}, 2),
        ({"optimizer": "lbfgs", "optimizer_parameters": {"max_iter": 4}, "epochs": 2}, 16),
    ],
)
def test_the_estimate_of_an_optimizer_is_what_it_keeps(
    recipe: dict[str, Any], states: int, wine: FetchedDataset, tmp_path: Path
) -> None:
    context = context_for(tmp_path, wine, architecture="linear", **{"epochs": 2, **recipe})
    plan = plan_of(context.job.train.recipe)
    blueprint = Blueprint("tabular", "linear", {}, 3, (("x", (13,)),), classes=("a", "b", "c"))
    needs = estimate(blueprint, plan, 32, 0)
    # What it keeps beside is small: counters, or three vectors of lbfgs.
    assert needs.optimizer // needs.weights in range(states, states + 4)
    model = build_model(blueprint)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = optimizer_maker(plan)(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.randn(8, 13)).square().mean()
        loss.backward()
        return loss

    for _ in range(plan.epochs):
        optimizer.step(closure)
    kept = sum(_elements(value) for state in optimizer.state.values() for value in state.values())
    assert kept <= (states + 3) * parameters + 10


def _elements(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(map(_elements, value)) if isinstance(value, list) else 0
