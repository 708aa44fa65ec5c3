"""What a COMPRESS job may ask for: the steps, their parameters, the gate. Pure: no torch.

The scheduler refuses with this what cannot be run, before anything is placed; the job reads its steps
with it, so both know the same names, ranges and defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format, struct_pb2

from penstock.registry.v1 import gate_pb2
from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.errors import InvalidArgument, Reason
from penstock_kit.jobs.fields import choose, nearest
from penstock_kit.jobs.measure import METRICS

SCHEMES = ("dynamic_int8", "static_int8", "weight_only_int8", "weight_only_int4")
MAX_STEPS = 16
MAX_SEARCH_SECONDS = 24 * 3600.0
DEFAULT_SEARCH_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a step.

    Attributes:
        kind: integer, number, flag, word, choice, names (a list of words) or mapping.
        default: What it is if nobody says.
        low: It must not be below; numbers and integers only.
        high: It must not be above.
        above_low: It must not be equal to `low` either.
        below_high: It must not be equal to `high` either.
        choices: What a choice may be.
        help: What it does, for people.
    """

    kind: str
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    below_high: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One step with all its parameters.

    Attributes:
        name: Which.
        parameters: By name; those that were not given have their defaults.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return it as people read it: the name, and what differs from the defaults."""
        known = STEPS[self.name]
        said = [
            f"{name}={_brief(value)}"
            for name, value in self.parameters.items()
            if value != known[name].default
        ]
        return f"{self.name}({', '.join(said)})" if said else self.name


def _share(default: float, text: str) -> Parameter:
    return Parameter("number", default, text, low=0.0, high=1.0, above_low=True, below_high=True)


def _repair(epochs: float = 0.0) -> dict[str, Parameter]:
    """Parameters of the training after a step that removes something."""
    return {
        "repair_epochs": Parameter(
            "number", epochs, "Epochs of training afterwards, to win back what was lost.", low=0, high=1000
        ),
        "learning_rate": Parameter(
            "number", 0.001, "Learning rate (AdamW) of that training.", low=0.0, high=1.0, above_low=True
        ),
        "batch_size": Parameter("integer", 64, "Rows of its steps.", low=1, high=65536),
    }


_LAYERS = Parameter("names", (), "Only layers of these names (or below them); empty means all that it suits.")

STEPS: Mapping[str, Mapping[str, Parameter]] = {
    "clip": {
        "percentile": Parameter(
            "number",
            99.9,
            "Bound of each weight tensor: this percentile of its magnitudes.",
            low=50,
            high=100,
        ),
        "absolute": Parameter("number", 0.0, "The bound itself; 0 means by percentile.", low=0.0),
        "layers": _LAYERS,
    },
    "prune": {
        "amount": _share(0.5, "Part of the weights that become 0, the smallest magnitudes first."),
        "scope": Parameter(
            "choice", "global", "Smallest of all layers together, or of each.", choices=("global", "layer")
        ),
        "layers": _LAYERS,
        **_repair(),
    },
    "prune_channels": {
        "amount": _share(0.5, "Part of the channels or hidden units that are taken out."),
        "scope": Parameter(
            "choice",
            "layer",
            "Least important of all layers together, or of each.",
            choices=("global", "layer"),
        ),
        "importance": Parameter(
            "choice", "l2", "What makes a channel important.", choices=("l1", "l2", "taylor")
        ),
        "round_to": Parameter("integer", 1, "Channels are left in multiples of this.", low=1, high=256),
        "layers": _LAYERS,
        **_repair(3.0),
    },
    "prune_2_4": {"layers": _LAYERS, **_repair()},
    "quantize": {
        "scheme": Parameter(
            "choice", "dynamic_int8", "How numbers are stored and computed.", choices=SCHEMES
        ),
        "runtime": Parameter(
            "choice",
            "onnx",
            "Who serves the result; torch is for static_int8 of linear layers.",
            choices=("onnx", "torch"),
        ),
        "rows": Parameter(
            "integer", 256, "Rows of the training part that static_int8 calibrates with.", low=1, high=65536
        ),
        "calibration": Parameter(
            "choice", "minmax", "How static_int8 finds ranges.", choices=("minmax", "entropy", "percentile")
        ),
        "per_channel": Parameter("flag", True, "A scale for each output channel instead of each tensor."),
        "embeddings": Parameter("flag", True, "Store embedding tables in 8 bits, too."),
        "group_size": Parameter(
            "integer",
            64,
            "Weights that share a scale, weight_only only: 16, 32, 64, 128 or 256.",
            low=16,
            high=256,
        ),
    },
    "distill": {
        "teacher": Parameter("word", "", "The version that teaches; empty means the one that is compressed."),
        "student": Parameter(
            "word", "", "Architecture of a new student; empty means the model with fewer layers."
        ),
        "student_parameters": Parameter("mapping", {}, "Sizes of the new student."),
        "keep_layers": Parameter(
            "integer", 0, "Layers that the student keeps; 0 means half.", low=0, high=1000
        ),
        "epochs": Parameter("number", 5.0, "Epochs of its training.", low=0, high=10000, above_low=True),
        "learning_rate": Parameter(
            "number", 0.001, "Learning rate (AdamW).", low=0.0, high=1.0, above_low=True
        ),
        "batch_size": Parameter("integer", 64, "Rows of a step.", low=1, high=65536),
        "temperature": Parameter(
            "number", 2.0, "What logits are divided by.", low=0.0, high=100.0, above_low=True
        ),
        "alpha": Parameter(
            "number", 0.7, "Weight of the teacher's answers beside the labels'.", low=0.0, high=1.0
        ),
        "hidden": Parameter(
            "number",
            0.0,
            "Weight of the distance between hidden states; 0 leaves them out.",
            low=0.0,
            high=1000.0,
        ),
    },
    "drop_layers": {
        "layers": Parameter("integer", 1, "How many go, the least important first.", low=1, high=1000),
        "importance": Parameter(
            "choice",
            "loss",
            "What a layer is worth: the loss without it, or how much it turns its input.",
            choices=("loss", "similarity"),
        ),
        "rows": Parameter("integer", 256, "Rows that importance is measured on.", low=1, high=65536),
        **_repair(2.0),
    },
    "low_rank": {
        "energy": Parameter(
            "number",
            0.9,
            "Part of the squared singular values that is kept.",
            low=0.0,
            high=1.0,
            above_low=True,
        ),
        "rank": Parameter("integer", 0, "The rank itself; 0 means by energy.", low=0, high=1 << 20),
        "layers": _LAYERS,
        **_repair(),
    },
}
"""Parameters of each step."""

_GROUP_SIZES = (16, 32, 64, 128, 256)


def check(work: job_work_pb2.CompressWork) -> None:
    """Return if the job can be begun.

    Raises:
        InvalidArgument: A field, step or parameter that cannot be; names come with the nearest valid one.
    """
    if not work.version:
        raise _invalid("compress.version is empty; name the version to compress.", "version")
    if not work.dataset:
        raise _invalid(
            "compress.dataset is empty; name the dataset to measure and calibrate with.", "dataset"
        )
    searching = work.HasField("search")
    if work.steps and searching:
        raise _invalid("compress.steps and compress.search exclude each other; give one.", "search")
    if not work.steps and not searching:
        raise _invalid("compress has neither steps nor a search; give one.", "steps")
    if len(work.steps) > MAX_STEPS:
        raise _invalid(f"compress.steps has {len(work.steps)} steps, more than {MAX_STEPS}.", "steps")
    steps = steps_of(work)
    for step in steps[:-1]:
        if step.name == "quantize":
            raise _invalid(
                "compress.steps: quantize must be the last step: what it makes is not changed any further.",
                "steps",
            )
    if searching:
        _check_search(work.search)
    _check_gate(work.gate)


def steps_of(work: job_work_pb2.CompressWork) -> tuple[Step, ...]:
    """Return the steps with all their parameters.

    Raises:
        InvalidArgument: One is unknown, or a parameter of it is.
    """
    return tuple(
        step_of(step.name, json_format.MessageToDict(step.parameters), f"compress.steps[{index}]")
        for index, step in enumerate(work.steps)
    )


def step_of(name: str, given: Mapping[str, Any], where: str = "step") -> Step:
    """Return a step with all its parameters.

    Args:
        name: Which.
        given: The parameters that differ from the defaults.
        where: How errors call it.

    Raises:
        InvalidArgument: It is unknown, or a parameter of it is, or has a value that it cannot have.
    """
    if name not in STEPS:
        raise _invalid(f"{where}.name: there is no step {name!r}{nearest(name, STEPS)}", "steps")
    known = STEPS[name]
    for key in given:
        if key not in known:
            raise _invalid(f"{where}: the step {name} has no parameter {key!r}{nearest(key, known)}", "steps")
    values = {
        key: _value(f"{where}: {name}.{key}", parameter, given[key]) if key in given else parameter.default
        for key, parameter in known.items()
    }
    if name == "quantize" and values["group_size"] not in _GROUP_SIZES:
        raise _invalid(
            f"{where}: quantize.group_size is {values['group_size']}; it may be "
            f"{', '.join(map(str, _GROUP_SIZES))}.",
            "steps",
        )
    return Step(name, values)


def step_message(step: Step) -> job_work_pb2.CompressionStep:
    """Return a step as the contract has it, without what is at its default."""
    parameters = struct_pb2.Struct()
    parameters.update(
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in step.parameters.items()
            if value != STEPS[step.name][name].default
        }
    )
    return job_work_pb2.CompressionStep(name=step.name, parameters=parameters)


def search_seconds(search: job_work_pb2.CompressionSearch) -> float:
    """Return how long a search may take, in seconds."""
    return search.budget.seconds + search.budget.nanos * 1e-9 or DEFAULT_SEARCH_SECONDS


def _check_search(search: job_work_pb2.CompressionSearch) -> None:
    seconds = search_seconds(search)
    if not 1.0 <= seconds <= MAX_SEARCH_SECONDS:
        raise _invalid(
            f"compress.search.budget is {seconds:g} s; it may be 1 s to {MAX_SEARCH_SECONDS:g} s.", "search"
        )
    if search.max_trials < 0:
        raise _invalid("compress.search.max_trials is negative.", "search")


def _check_gate(gate: gate_pb2.Gate) -> None:
    if gate.metric:
        choose("metric", gate.metric, METRICS, "job.compress.gate")
    for bound, value in gate.ListFields():
        if bound.name != "metric" and not (math.isfinite(value) and value >= 0):
            raise _invalid(f"compress.gate.{bound.name} is {value}; it must be a number from 0 on.", "gate")


def _value(where: str, parameter: Parameter, value: Any) -> Any:
    """Return a given value in the parameter's own type."""
    if parameter.kind == "flag":
        if isinstance(value, bool):
            return value
        raise _invalid(f"{where} is {value!r}; it must be true or false.", "steps")
    if parameter.kind in {"integer", "number"}:
        return _number(where, parameter, value)
    if parameter.kind == "names":
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise _invalid(f"{where} is {value!r}; it must be a list of names.", "steps")
    if parameter.kind == "mapping":
        if isinstance(value, Mapping):
            return dict(value)
        raise _invalid(f"{where} is {value!r}; it must be a mapping.", "steps")
    if not isinstance(value, str):
        raise _invalid(f"{where} is {value!r}; it must be a word.", "steps")
    if parameter.kind == "choice" and value not in parameter.choices:
        choices = ", ".join(parameter.choices)
        raise _invalid(f"{where} cannot be {value!r}; it may be {choices}.", "steps")
    return value


def _number(where: str, parameter: Parameter, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid(f"{where} is {value!r}; it must be a number.", "steps")
    if parameter.kind == "integer" and value != int(value):
        raise _invalid(f"{where} is {value!r}; it must be a whole number.", "steps")
    low = value <= parameter.low if parameter.above_low else value < parameter.low
    high = value >= parameter.high if parameter.below_high else value > parameter.high
    if low or high:
        raise _invalid(f"{where} is {value:g}; it must be {_range(parameter)}.", "steps")
    return int(value) if parameter.kind == "integer" else float(value)


def _range(parameter: Parameter) -> str:
    words = []
    if parameter.low > -math.inf:
        words.append(f"{'above' if parameter.above_low else 'at least'} {parameter.low:g}")
    if parameter.high < math.inf:
        words.append(f"{'below' if parameter.below_high else 'at most'} {parameter.high:g}")
    return " and ".join(words)


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _invalid(message: str, field_name: str) -> InvalidArgument:
    return InvalidArgument(
        message, reason=Reason.INVALID_REQUEST, metadata={"field": f"job.compress.{field_name}"}
    )
