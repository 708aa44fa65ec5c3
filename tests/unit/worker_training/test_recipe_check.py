"""What a recipe may say, and in which words it is refused."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs import check
from penstock_kit.jobs.train import plan_of
from penstock_kit.jobs.training import (
    ARCHITECTURES,
    LOSSES,
    METRICS,
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    SCHEDULES,
    STRATEGIES,
    TASKS,
    USUAL_ARCHITECTURE,
)
from penstock_worker.adapters.training.architectures import Blueprint, build_model


def _job() -> job_pb2.Job:
    job = job_pb2.Job(name="jobs/j")
    job.train.dataset, job.train.model = "digits", "models/digits"
    job.train.recipe.SetInParent()
    return job


def _set(path: str, value: Any) -> job_pb2.Job:
    job = _job()
    target: Any = job.train
    *parents, name = path.split(".")
    for parent in parents:
        target = getattr(target, parent)
    if isinstance(value, dict):
        getattr(target, name).update(value)
    else:
        setattr(target, name, value)
    return job


def _refusal(job: job_pb2.Job) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        check(job)
    return caught.value


def test_a_recipe_that_says_nothing_has_the_usual_values() -> None:
    check(_job())
    plan = plan_of(job_work_pb2.Recipe())
    assert (plan.optimizer.name, plan.learning_rate, plan.epochs, plan.batch_size) == ("adamw", 0.001, 10, 32)
    assert (plan.schedule.name, plan.precision, plan.held_out, plan.patience) == ("constant", "fp32", 0.2, 0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("recipe.optimizer.name", "adma", "did you mean 'adam'?"),
        ("recipe.optimizer.name", "sparse", "There is no optimizer 'sparse'"),
        ("recipe.optimizer.name", "SparseAdam", "takes sparse gradients only"),
        ("recipe.architecture", "transfromer", "did you mean 'transformer'?"),
        ("recipe.task", "tabula", "did you mean 'tabular'?"),
        ("recipe.loss", "cross_entropie", "did you mean 'cross_entropy'?"),
        ("recipe.precision", "bf61", "did you mean 'bf16'?"),
        ("recipe.strategy.name", "dpp", "did you mean 'ddp'?"),
        ("recipe.schedule.name", "cosin", "did you mean 'cosine'?"),
        ("recipe.epochs", -1, "must be at least 1"),
        ("recipe.batch_size", -2, "must be at least 1"),
        ("recipe.held_out", 1.5, "must be at least 0 and at most 0.99"),
        ("recipe.clip_gradient_norm", math.inf, "must be at least 0"),
        ("recipe.clip_gradient_norm", math.nan, "must be at least 0"),
        ("recipe.optimizer.learning_rate", -0.1, "must be at least 0"),
        ("recipe.early_stopping.metric", "held_out/acuracy", "must be at least 1"),
        ("recipe.class_weights", {"a": -1.0}, "must be at least 0"),
        ("recipe.strategy.microbatches", 4, "belongs to the strategy pipeline"),
        ("recipe.architecture_parameters", {"layers": 3}, "name it"),
        ("model", "digits", "models/{model}"),
        ("dataset", "", "dataset is required"),
        ("model", "", "model is required"),
        ("script.code", "", "script.code is required"),
        ("script.entrypoint", "../evil.py", "script.code is required"),
    ],
)
def test_what_is_not_there_is_refused_by_name(path: str, value: Any, words: str) -> None:
    refusal = _refusal(_set(path, value))
    assert words in str(refusal)
    if "field" in refusal.metadata:
        assert refusal.metadata["field"].startswith("job.train")


@pytest.mark.parametrize(
    ("optimizer", "parameters", "words"),
    [
        ("sgd", {"momentun": 0.9}, "has no parameter 'momentun'; did you mean 'momentum'?"),
        ("sgd", {"momentum": 1.5}, "must be at least 0 and at most 1"),
        ("sgd", {"momentum": "much"}, "must be a number"),
        ("sgd", {"nesterov": True}, "needs a momentum above 0"),
        ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "no dampening"),
        ("sgd", {"nesterov": 1.0}, "must be true or false"),
        ("adam", {"betas": [0.9]}, "must be a list of 2 numbers"),
        ("adam", {"betas": [0.9, 1.0]}, "must be at least 0 and below 1"),
        ("lbfgs", {"max_iter": 2.5}, "must be a whole number"),
        ("lbfgs", {"line_search_fn": "wolf"}, "it may be strong_wolfe"),
        ("gd", {"momentum": 0.9}, "has no parameter 'momentum'"),
        ("adam", {"eps": math.nan}, "recipe.optimizer.parameters"),
    ],
)
def test_parameters_of_optimizers_have_types_and_ranges(
    optimizer: str, parameters: dict[str, Any], words: str
) -> None:
    job = _set("recipe.optimizer.name", optimizer)
    job.train.recipe.optimizer.parameters.update(parameters)
    assert words in str(_refusal(job))


def test_combinations_that_mean_nothing_are_refused() -> None:
    job = _set("recipe.fine_tune", "models/digits/versions/1")
    job.train.recipe.architecture = "cnn"
    assert "brings its architecture" in str(_refusal(job))

    job = _set("recipe.class_weights", {"a": 2.0})
    job.train.recipe.balance_classes = True
    assert "exclude one another" in str(_refusal(job))

    job = _set("recipe.optimizer.name", "lbfgs")
    job.train.recipe.strategy.name = "fsdp"
    assert "single and ddp can" in str(_refusal(job))

    job = _set("recipe.schedule.name", "one_cycle")
    job.train.recipe.schedule.warmup_steps = 5
    assert "rises by itself" in str(_refusal(job))

    job = _set("recipe.architecture", "cnn")
    job.train.recipe.task = "text"
    assert "for text there are bag, transformer" in str(_refusal(job))

    job = _set("recipe.architecture", "vit")
    job.train.recipe.architecture_parameters.update({"width": 30, "heads": 4})
    assert "width 30 is no multiple of 4 heads" in str(_refusal(job))


def test_a_job_without_work_or_way_is_refused() -> None:
    assert "nothing to do" in str(_refusal(job_pb2.Job(name="jobs/j")))
    job = job_pb2.Job(name="jobs/j")
    job.train.dataset, job.train.model = "digits", "models/digits"
    assert "neither a recipe nor a script" in str(_refusal(job))


def test_every_optimizer_of_torch_is_offered_or_refused_with_a_reason() -> None:
    torchs = {
        name.lower()
        for name, found in vars(torch.optim).items()
        if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
    } - {"optimizer"}
    assert torchs == (set(OPTIMIZERS) - {"gd"}) | set(REFUSED_OPTIMIZERS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_parameters_of_the_table_are_torchs(name: str) -> None:
    entry = OPTIMIZERS[name]
    known = inspect.signature(getattr(torch.optim, entry.cls)).parameters
    assert set(entry.parameters) <= set(known)
    for key, field in entry.parameters.items():
        if field.default is not None:
            assert field.default == known[key].default


def test_tables_agree_with_one_another() -> None:
    assert set(USUAL_ARCHITECTURE) == set(TASKS)
    for task, name in USUAL_ARCHITECTURE.items():
        assert task in ARCHITECTURES[name].tasks
    assert {"held_out/loss", "train/loss"} <= set(METRICS)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_can_be_built_with_its_defaults(name: str) -> None:
    entry = ARCHITECTURES[name]
    parameters = {key: field.default for key, field in entry.parameters.items()}
    of_tokens = entry.tasks[0] in {"text", "language_model"}
    for task in entry.tasks:
        shape = (-1,) if of_tokens else (1, 8, 8) if task == "image" else (7,)
        blueprint = Blueprint(
            task=task,
            architecture=name,
            parameters=parameters,
            outputs=300 if task == "language_model" else 3,
            inputs=(("x", shape),),
            classes=() if task == "language_model" else ("a", "b", "c"),
            vocabulary=300 if of_tokens else 0,
        )
        example = torch.randint(0, 300, (2, 6)) if of_tokens else torch.randn(2, *shape)
        outputs = build_model(blueprint)(example)
        assert outputs.shape == ((2, 6, 300) if task == "language_model" else (2, 3))


def test_the_readme_lists_every_name_that_a_recipe_may_use() -> None:
    readme = (Path(__file__).parents[3] / "services" / "worker" / "README.md").read_text()
    section = readme.partition("## Training")[2].partition("\n## ")[0]
    names = [*ARCHITECTURES, *OPTIMIZERS, *SCHEDULES, *LOSSES, *STRATEGIES, *TASKS, *REFUSED_OPTIMIZERS]
    names += [*METRICS, *(parameter for known in SCHEDULES.values() for parameter in known)]
    names += [parameter for entry in ARCHITECTURES.values() for parameter in entry.parameters]
    missing = [name for name in names if f"`{name}`" not in section]
    assert not missing
