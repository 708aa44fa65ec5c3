"""What a TRAIN job may ask for. Pure: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import struct_pb2

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.jobs.fields import check_range, choose, invalid, read_fields, values_of
from penstock_kit.jobs.training import (
    ARCHITECTURES,
    LOSSES,
    METRICS,
    OPTIMIZERS,
    PRECISIONS,
    REFUSED_OPTIMIZERS,
    SCHEDULES,
    STRATEGIES,
    TASKS,
    USUAL_ARCHITECTURE,
)
from penstock_kit.names import parse_model

DEFAULT_EPOCHS = 10
DEFAULT_BATCH_SIZE = 32
# Rows computed at once where a step is on all rows: many, as they only bound memory.
DEFAULT_MICRO_BATCH = 1024
DEFAULT_HELD_OUT = 0.2
MAX_EPOCHS = 1_000_000
MAX_BATCH_SIZE = 2**20
MAX_CHECKPOINT_SECONDS = 7 * 24 * 3600.0
_MAX_OUTPUT_BYTES = 2**40
_MAX_PROCESSES = 65536
_FIELD = "job.train"


@dataclass(frozen=True, slots=True)
class Named:
    """A name from a table with all its parameters."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe with everything filled in that does not depend on the data.

    Attributes:
        task: Empty means what the dataset is.
        architecture: None with fine_tune, or if the usual one of the task is meant and the task is empty.
        fine_tune: Name of a version to go on from; empty for none.
        loss: Empty means the usual one.
        optimizer: Name, and the parameters that were given or have defaults here.
        learning_rate: Above 0.
        schedule: Name and parameters.
        warmup_steps: Steps of rising first.
        epochs: At least 1.
        batch_size: Rows of a step; of a micro-batch, if the optimizer takes all rows.
        clip_gradient_norm: 0 for unbounded.
        precision: fp32, bf16 or fp16.
        patience: Epochs without a gain that end it; 0 for never.
        stop_metric: What has to get better.
        min_delta: A gain at least.
        class_weights: By label; empty for none.
        balance_classes: Weigh classes by how rare they are.
        strategy: Empty means by the number of ranks.
        microbatches: Of a pipeline; 0 for its own choice.
        servers: Of a parameter server; 0 for its own choice.
        asynchronous: Of a parameter server.
        staleness: Of a parameter server; 0 for its own choice.
        held_out: Above 0, below 1.
        label: Column of the label; empty for the dataset's own.
        features: Columns to learn from; empty for all.
    """

    task: str
    architecture: Named | None
    fine_tune: str
    loss: str
    optimizer: Named
    learning_rate: float
    schedule: Named
    warmup_steps: int
    epochs: int
    batch_size: int
    clip_gradient_norm: float
    precision: str
    patience: int
    stop_metric: str
    min_delta: float
    class_weights: Mapping[str, float]
    balance_classes: bool
    strategy: str
    microbatches: int
    servers: int
    asynchronous: bool
    staleness: int
    held_out: float
    label: str
    features: tuple[str, ...]


def check(work: job_work_pb2.TrainWork) -> None:
    """Refuse a training that no worker could do.

    Raises:
        InvalidArgument: The words name what is wrong and the nearest valid name.
    """
    if not work.dataset:
        raise invalid("train.dataset is required: the dataset to learn from.", f"{_FIELD}.dataset")
    if not work.model:
        raise invalid("train.model is required: models/{model} that gets the version.", f"{_FIELD}.model")
    parse_model(work.model)
    seconds = work.checkpoint_interval.seconds + work.checkpoint_interval.nanos * 1e-9
    check_range(
        "train.checkpoint_interval (s)",
        seconds,
        f"{_FIELD}.checkpoint_interval",
        low=0.0,
        high=MAX_CHECKPOINT_SECONDS,
    )
    way = work.WhichOneof("way")
    if way == "recipe":
        plan_of(work.recipe)
    elif way == "script":
        _check_script(work.script)
    else:
        raise invalid("The training has neither a recipe nor a script.", f"{_FIELD}.way")


def plan_of(recipe: job_work_pb2.Recipe) -> Plan:
    """Return a recipe with its defaults.

    Raises:
        InvalidArgument: A name, a value or a combination is wrong.
    """
    if recipe.task:
        choose("task", recipe.task, TASKS, f"{_FIELD}.recipe.task")
    epochs = recipe.epochs or DEFAULT_EPOCHS
    _check("epochs", epochs, low=1, high=MAX_EPOCHS)
    held_out = recipe.held_out or DEFAULT_HELD_OUT
    _check("held_out", held_out, low=0.0, high=0.99)
    _check("clip_gradient_norm", recipe.clip_gradient_norm, low=0.0)
    precision = recipe.precision or "fp32"
    choose("precision", precision, PRECISIONS, f"{_FIELD}.recipe.precision")
    if recipe.loss:
        choose("loss", recipe.loss, LOSSES, f"{_FIELD}.recipe.loss")
        if recipe.task == "language_model" and recipe.loss != "cross_entropy":
            raise invalid(
                f"The loss {recipe.loss!r} is for numbers; a language model's is cross_entropy.",
                f"{_FIELD}.recipe.loss",
            )
    optimizer, learning_rate = _optimizer(recipe.optimizer)
    usual = DEFAULT_MICRO_BATCH if OPTIMIZERS[optimizer.name].full_batch else DEFAULT_BATCH_SIZE
    batch_size = recipe.batch_size or usual
    _check("batch_size", batch_size, low=1, high=MAX_BATCH_SIZE)
    schedule = _schedule(recipe.schedule)
    _check_stopping(recipe)
    weights = _class_weights(recipe)
    _check_strategy(recipe.strategy, closure=OPTIMIZERS[optimizer.name].closure)
    return Plan(
        task=recipe.task,
        architecture=_architecture(recipe),
        fine_tune=recipe.fine_tune,
        loss=recipe.loss,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=recipe.schedule.warmup_steps,
        epochs=epochs,
        batch_size=batch_size,
        clip_gradient_norm=recipe.clip_gradient_norm,
        precision=precision,
        patience=recipe.early_stopping.patience,
        stop_metric=recipe.early_stopping.metric or "held_out/loss",
        min_delta=recipe.early_stopping.min_delta,
        class_weights=weights,
        balance_classes=recipe.balance_classes,
        strategy=recipe.strategy.name,
        microbatches=recipe.strategy.microbatches,
        servers=recipe.strategy.servers,
        asynchronous=recipe.strategy.asynchronous,
        staleness=recipe.strategy.staleness,
        held_out=held_out,
        label=recipe.label,
        features=tuple(recipe.features),
    )


def architecture_of(
    task: str, name: str, given: Mapping[str, Any], *, field: str = f"{_FIELD}.recipe.architecture"
) -> Named:
    """Return an architecture with all its parameters.

    Args:
        task: What it has to learn; empty if not known yet.
        name: Which; empty for the usual one of the task.
        given: Parameters as a Struct gives them.
        field: Path of the field with the name, for programs.

    Raises:
        InvalidArgument: It is unknown, learns no such task, or a parameter is wrong.
    """
    name = choose("architecture", name or USUAL_ARCHITECTURE[task], ARCHITECTURES, field)
    entry = ARCHITECTURES[name]
    if task and task not in entry.tasks:
        fitting = [other for other, known in ARCHITECTURES.items() if task in known.tasks]
        raise invalid(
            f"The architecture {name} is for {' and '.join(entry.tasks)}; for {task} there are "
            f"{', '.join(sorted(fitting))}.",
            field,
        )
    where = f"the architecture {name}"
    found = read_fields(where, entry.parameters, given, f"{field}_parameters")
    if "heads" in found and found["width"] % found["heads"]:
        raise invalid(
            f"{where}: width {found['width']} is no multiple of {found['heads']} heads.",
            f"{field}_parameters",
        )
    return Named(name, found)


def _architecture(recipe: job_work_pb2.Recipe) -> Named | None:
    given = _struct(recipe.architecture_parameters, "architecture_parameters")
    field = f"{_FIELD}.recipe.architecture"
    if recipe.fine_tune:
        if recipe.architecture or given:
            raise invalid(
                "A fine-tuned version brings its architecture: leave out architecture and its parameters.",
                field,
            )
        return None
    if not recipe.architecture and not recipe.task:
        if given:
            raise invalid(
                f"The parameters {', '.join(sorted(given))} belong to an architecture: name it.", field
            )
        return None
    return architecture_of(recipe.task, recipe.architecture, given)


def _optimizer(optimizer: job_work_pb2.Optimizer) -> tuple[Named, float]:
    field = f"{_FIELD}.recipe.optimizer"
    name = (optimizer.name or "adamw").lower()
    if name in REFUSED_OPTIMIZERS:
        raise invalid(
            f"The optimizer {optimizer.name!r} does not suit: {REFUSED_OPTIMIZERS[name]}.", f"{field}.name"
        )
    choose("optimizer", name, OPTIMIZERS, f"{field}.name")
    entry = OPTIMIZERS[name]
    found = read_fields(
        f"the optimizer {name}",
        entry.parameters,
        _struct(optimizer.parameters, "optimizer.parameters"),
        f"{field}.parameters",
    )
    if found.get("nesterov") and (found["momentum"] == 0 or found["dampening"] != 0):
        raise invalid(
            "the optimizer sgd: nesterov needs a momentum above 0 and no dampening.", f"{field}.parameters"
        )
    check_range(
        "optimizer.learning_rate", optimizer.learning_rate, f"{field}.learning_rate", low=0.0, high=1e6
    )
    return Named(name, found), optimizer.learning_rate or entry.learning_rate


def _schedule(schedule: job_work_pb2.LearningRateSchedule) -> Named:
    field = f"{_FIELD}.recipe.schedule"
    name = schedule.name or "constant"
    choose("schedule", name, SCHEDULES, f"{field}.name")
    check_range("schedule.warmup_steps", schedule.warmup_steps, f"{field}.warmup_steps", low=0, high=1e12)
    if name == "one_cycle" and schedule.warmup_steps:
        raise invalid(
            "The schedule one_cycle rises by itself: leave warmup_steps out.", f"{field}.warmup_steps"
        )
    found = read_fields(
        f"the schedule {name}",
        SCHEDULES[name],
        _struct(schedule.parameters, "schedule.parameters"),
        f"{field}.parameters",
    )
    return Named(name, found)


def _check_stopping(recipe: job_work_pb2.Recipe) -> None:
    if not recipe.HasField("early_stopping"):
        return
    stopping = recipe.early_stopping
    field = f"{_FIELD}.recipe.early_stopping"
    check_range("early_stopping.patience", stopping.patience, f"{field}.patience", low=1, high=MAX_EPOCHS)
    check_range("early_stopping.min_delta", stopping.min_delta, f"{field}.min_delta", low=0.0)
    if stopping.metric:
        choose("metric", stopping.metric, METRICS, f"{field}.metric")


def _class_weights(recipe: job_work_pb2.Recipe) -> dict[str, float]:
    field = f"{_FIELD}.recipe.class_weights"
    weights = dict(recipe.class_weights)
    for label, weight in weights.items():
        check_range(f"class_weights[{label!r}]", weight, field, low=0.0, high=1e9)
    if weights and not any(weights.values()):
        raise invalid("class_weights: all are 0, so nothing would be learned.", field)
    if weights and recipe.balance_classes:
        raise invalid("class_weights and balance_classes exclude one another.", field)
    return weights


def _check_strategy(strategy: job_work_pb2.Strategy, *, closure: bool) -> None:
    field = f"{_FIELD}.recipe.strategy"
    name = strategy.name
    if name:
        choose("strategy", name, STRATEGIES, f"{field}.name")
    if closure and name not in {"", "single", "ddp"}:
        raise invalid(
            f"The optimizer lbfgs computes the loss several times in a step, which the strategy {name} "
            "cannot; single and ddp can.",
            f"{field}.name",
        )
    owners = {
        "microbatches": "pipeline",
        "servers": "parameter_server",
        "asynchronous": "parameter_server",
        "staleness": "parameter_server",
    }
    for key, owner in owners.items():
        value = getattr(strategy, key)
        if value and name != owner:
            raise invalid(f"strategy.{key} belongs to the strategy {owner}.", f"{field}.{key}")
        check_range(f"strategy.{key}", value, f"{field}.{key}", low=0, high=4096)
    if strategy.staleness and not strategy.asynchronous:
        raise invalid("strategy.staleness needs asynchronous.", f"{field}.staleness")


def _check_script(script: job_work_pb2.Script) -> None:
    field = f"{_FIELD}.script"
    if not script.code:
        raise invalid("script.code is required: the directory with the program.", f"{field}.code")
    parts = (script.entrypoint or "train.py").split("/")
    if not parts[-1].endswith(".py") or any(part in {"", ".", ".."} for part in parts):
        raise invalid(
            f"script.entrypoint {script.entrypoint!r} is no path of a Python file in the directory.",
            f"{field}.entrypoint",
        )
    check_range(
        "script.max_output_bytes",
        script.max_output_bytes,
        f"{field}.max_output_bytes",
        low=0,
        high=_MAX_OUTPUT_BYTES,
    )
    check_range(
        "script.max_processes", script.max_processes, f"{field}.max_processes", low=0, high=_MAX_PROCESSES
    )


def _check(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    check_range(f"recipe.{name}", value, f"{_FIELD}.recipe.{name}", low=low, high=high)


def _struct(parameters: struct_pb2.Struct, name: str) -> dict[str, Any]:
    return values_of(parameters, f"recipe.{name}", f"{_FIELD}.recipe.{name}")
