"""What a COMPRESS job may ask for: the steps, their parameters, the gate. Pure: no torch.

The scheduler refuses with this what cannot be run, before anything is placed; the job reads its steps
with it, so both know the same names, ranges and defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import struct_pb2

from penstock.registry.v1 import gate_pb2
from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.fields import Field, choose, invalid, nearest, read_fields, values_of
from penstock_kit.jobs.measure import METRICS
from penstock_kit.jobs.train import architecture_of

SCHEMES = ("dynamic_int8", "static_int8", "weight_only_int8", "weight_only_int4")
MAX_STEPS = 16
MAX_SEARCH_SECONDS = 24 * 3600.0
DEFAULT_SEARCH_SECONDS = 600.0
_FIELD = "job.compress"


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


def _share(default: float, text: str) -> Field:
    return Field("number", default, text, low=0.0, high=1.0, above_low=True, below_high=True)


def _repair(epochs: float = 0.0) -> dict[str, Field]:
    """Parameters of the training after a step that removes something."""
    return {
        "repair_epochs": Field(
            "number", epochs, "Epochs of training afterwards, to win back what was lost.", low=0, high=1000
        ),
        "learning_rate": Field(
            "number", 0.001, "Learning rate (AdamW) of that training.", low=0.0, high=1.0, above_low=True
        ),
        "batch_size": Field("integer", 64, "Rows of its steps.", low=1, high=65536),
    }


_LAYERS = Field("names", (), "Only layers of these names (or below them); empty means all that it suits.")

STEPS: Mapping[str, Mapping[str, Field]] = {
    "clip": {
        "percentile": Field(
            "number",
            99.9,
            "Bound of each weight tensor: this percentile of its magnitudes.",
            low=50,
            high=100,
        ),
        "absolute": Field("number", 0.0, "The bound itself; 0 means by percentile.", low=0.0),
        "layers": _LAYERS,
    },
    "prune": {
        "amount": _share(0.5, "Part of the weights that become 0, the smallest magnitudes first."),
        "scope": Field(
            "choice", "global", "Smallest of all layers together, or of each.", choices=("global", "layer")
        ),
        "layers": _LAYERS,
        **_repair(),
    },
    "prune_channels": {
        "amount": _share(0.5, "Part of the channels or hidden units that are taken out."),
        "scope": Field(
            "choice",
            "layer",
            "Least important of all layers together, or of each.",
            choices=("global", "layer"),
        ),
        "importance": Field(
            "choice", "l2", "What makes a channel important.", choices=("l1", "l2", "taylor")
        ),
        "round_to": Field("integer", 1, "Channels are left in multiples of this.", low=1, high=256),
        "layers": _LAYERS,
        **_repair(3.0),
    },
    "prune_2_4": {"layers": _LAYERS, **_repair()},
    "quantize": {
        "scheme": Field("choice", "dynamic_int8", "How numbers are stored and computed.", choices=SCHEMES),
        "runtime": Field(
            "choice",
            "onnx",
            "Who serves the result; torch is for static_int8 of linear layers.",
            choices=("onnx", "torch"),
        ),
        "rows": Field(
            "integer", 256, "Rows of the training part that static_int8 calibrates with.", low=1, high=65536
        ),
        "calibration": Field(
            "choice", "minmax", "How static_int8 finds ranges.", choices=("minmax", "entropy", "percentile")
        ),
        "per_channel": Field("flag", True, "A scale for each output channel instead of each tensor."),
        "embeddings": Field("flag", True, "Store embedding tables in 8 bits, too."),
        "group_size": Field(
            "integer",
            64,
            "Weights that share a scale, weight_only only: 16, 32, 64, 128 or 256.",
            low=16,
            high=256,
        ),
    },
    "distill": {
        "teacher": Field("word", "", "The version that teaches; empty means the one that is compressed."),
        "student": Field(
            "word", "", "Architecture of a new student; empty means the model with fewer layers."
        ),
        "student_parameters": Field("mapping", {}, "Sizes of the new student."),
        "keep_layers": Field("integer", 0, "Layers that the student keeps; 0 means half.", low=0, high=1000),
        "epochs": Field("number", 5.0, "Epochs of its training.", low=0, high=10000, above_low=True),
        "learning_rate": Field("number", 0.001, "Learning rate (AdamW).", low=0.0, high=1.0, above_low=True),
        "batch_size": Field("integer", 64, "Rows of a step.", low=1, high=65536),
        "temperature": Field(
            "number", 2.0, "What logits are divided by.", low=0.0, high=100.0, above_low=True
        ),
        "alpha": Field(
            "number", 0.7, "Weight of the teacher's answers beside the labels'.", low=0.0, high=1.0
        ),
        "hidden": Field(
            "number",
            0.0,
            "Weight of the distance between hidden states; 0 leaves them out.",
            low=0.0,
            high=1000.0,
        ),
    },
    "drop_layers": {
        "layers": Field("integer", 1, "How many go, the least important first.", low=1, high=1000),
        "importance": Field(
            "choice",
            "loss",
            "What a layer is worth: the loss without it, or how much it turns its input.",
            choices=("loss", "similarity"),
        ),
        "rows": Field("integer", 256, "Rows that importance is measured on.", low=1, high=65536),
        **_repair(2.0),
    },
    "low_rank": {
        "energy": Field(
            "number",
            0.9,
            "Part of the squared singular values that is kept.",
            low=0.0,
            high=1.0,
            above_low=True,
        ),
        "rank": Field("integer", 0, "The rank itself; 0 means by energy.", low=0, high=1 << 20),
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
        step_of(step.name, values_of(step.parameters, where, f"{_FIELD}.steps"), where)
        for where, step in ((f"compress.steps[{index}]", step) for index, step in enumerate(work.steps))
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
    values = read_fields(f"{where}: {name}", STEPS[name], given, f"{_FIELD}.steps")
    if name == "quantize" and values["group_size"] not in _GROUP_SIZES:
        raise _invalid(
            f"{where}: quantize.group_size is {values['group_size']}; it may be "
            f"{', '.join(map(str, _GROUP_SIZES))}.",
            "steps",
        )
    if values.get("student"):
        # Which task it has to learn, and what it takes over from its teacher, is known later.
        architecture_of("", values["student"], values["student_parameters"], field=f"{_FIELD}.steps")
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


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _invalid(message: str, field_name: str) -> InvalidArgument:
    return invalid(message, f"{_FIELD}.{field_name}")
