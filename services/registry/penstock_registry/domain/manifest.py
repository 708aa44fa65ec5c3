"""The standard model description and its rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from penstock_kit.artifacts.paths import check_bundle_path
from penstock_kit.ensembles import Step, check_graph
from penstock_kit.errors import InvalidArgument, Reason
from penstock_registry.domain.lineage import GateVerdict, Lineage, check_lineage, check_verdict
from penstock_registry.domain.texts import Empty, check_keys, check_text, check_texts

# Which formats a runtime loads.
FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("pt2", "torchscript", "safetensors", "aoti"),
        "onnx": ("onnx",),
        "sklearn": ("skops",),
        "python": ("python",),
        "ensemble": ("ensemble",),
    }
)
DATA_TYPES = frozenset(
    {"BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"}
    | {"FP16", "BF16", "FP32", "FP64", "BYTES"}
)
_ENUM_PREFIX = "DATA_TYPE_"

MAX_TENSORS = 256
MAX_RANK = 16
LARGEST_AMOUNT = 2**53
# A replica warms up with a whole batch: an absurd size would be an absurd amount of memory.
_MOST_OF_BATCHING = {
    "max_batch_size": 65_536,
    "max_delay_microseconds": 10_000_000,
    "latency_objective_microseconds": 3_600_000_000,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, datatype (OIP's word, such as "FP32") and shape of one tensor; -1 is any size."""

    name: str
    data_type: str
    shape: tuple[int, ...]
    optional: bool = False
    description: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives, in its order."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests may be joined; max_batch_size 0 means that the model does not batch."""

    max_batch_size: int = 0
    max_delay_microseconds: int = 0
    pad_variable_dimensions: bool = False
    latency_objective_microseconds: int = 0


@dataclass(frozen=True, slots=True)
class Resources:
    """What one replica needs."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The standard description of a version. Parts that were not given are None; steps are an ensemble's."""

    runtime: str
    format: str
    entrypoint: str
    signature: Signature
    batching: Batching | None = None
    resources: Resources | None = None
    metrics: Mapping[str, float] = field(default_factory=lambda: Empty)
    lineage: Lineage | None = None
    license: str = ""
    description: str = ""
    parameters: Mapping[str, str] = field(default_factory=lambda: Empty)
    steps: tuple[Step, ...] = ()
    gate: GateVerdict | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the versions this one was made from."""
        return self.lineage.parents if self.lineage else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as the JSON mapping of its proto (with the proto's field names)."""
        fields: dict[str, Any] = {
            "runtime": self.runtime,
            "format": self.format,
            "entrypoint": self.entrypoint,
            "signature": {
                "inputs": [_tensor_to_dict(spec) for spec in self.signature.inputs],
                "outputs": [_tensor_to_dict(spec) for spec in self.signature.outputs],
            },
            "metrics": dict(self.metrics),
            "license": self.license,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        if self.batching is not None:
            fields["batching"] = _slots_to_dict(self.batching)
        if self.resources is not None:
            fields["resources"] = _slots_to_dict(self.resources)
        if self.lineage is not None:
            fields["lineage"] = self.lineage.to_dict()
        if self.gate is not None:
            fields["gate"] = self.gate.to_dict()
        if self.steps:
            fields["ensemble"] = {"steps": [_step_to_dict(step) for step in self.steps]}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the manifest that `to_dict` gave."""
        return cls(
            runtime=fields["runtime"],
            format=fields["format"],
            entrypoint=fields["entrypoint"],
            signature=Signature(
                inputs=tuple(_tensor_from_dict(spec) for spec in fields["signature"]["inputs"]),
                outputs=tuple(_tensor_from_dict(spec) for spec in fields["signature"]["outputs"]),
            ),
            batching=Batching(**fields["batching"]) if "batching" in fields else None,
            resources=Resources(**fields["resources"]) if "resources" in fields else None,
            # JSONB gives whole numbers back as integers.
            metrics={key: float(value) for key, value in fields["metrics"].items()},
            lineage=Lineage.from_dict(fields["lineage"]) if "lineage" in fields else None,
            license=fields["license"],
            description=fields["description"],
            parameters=dict(fields["parameters"]),
            steps=tuple(Step(**step) for step in fields.get("ensemble", {"steps": ()})["steps"]),
            gate=GateVerdict.from_dict(fields["gate"]) if "gate" in fields else None,
        )


def check_manifest(
    manifest: Manifest, *, allow_python_runtime: bool, allow_compiled_models: bool = False
) -> None:
    """Return if the manifest keeps every rule that can be checked without the files.

    Args:
        manifest: The manifest.
        allow_python_runtime: Whether the operator lets models bring their own code.
        allow_compiled_models: Whether the operator lets models bring compiled code.

    Raises:
        InvalidArgument: It breaks one. Reasons: UNKNOWN_RUNTIME, UNSAFE_FORMAT, INVALID_REQUEST.
    """
    formats = FORMATS.get(manifest.runtime)
    if formats is None:
        raise InvalidArgument(
            f"No runtime {manifest.runtime!r}; there are {', '.join(FORMATS)}.",
            reason=Reason.UNKNOWN_RUNTIME,
            metadata={"runtime": manifest.runtime},
        )
    if manifest.format not in formats:
        raise InvalidArgument(
            f"Runtime {manifest.runtime} loads {', '.join(formats)}, not {manifest.format!r}.",
            reason=Reason.UNKNOWN_RUNTIME,
            metadata={"runtime": manifest.runtime, "format": manifest.format},
        )
    if manifest.format == "python" and not allow_python_runtime:
        raise InvalidArgument(
            "Format python runs the model's own code, and this server does not allow it. Convert the model "
            "(torch.export, ONNX, skops), or have the operator set PENSTOCK_ALLOW_PYTHON_RUNTIME=true.",
            reason=Reason.UNSAFE_FORMAT,
            metadata={"format": manifest.format},
        )
    if manifest.format == "aoti" and not allow_compiled_models:
        raise InvalidArgument(
            "Format aoti is a shared library that is loaded into the server, and this server does not allow "
            "it. Push the .pt2 or .onnx that it was compiled from, or have the operator set "
            "PENSTOCK_ALLOW_COMPILED_MODELS=true.",
            reason=Reason.UNSAFE_FORMAT,
            metadata={"format": manifest.format},
        )
    check_bundle_path(manifest.entrypoint)
    _check_signature(manifest.signature, manifest.batching or Batching())
    _check_batching(manifest.batching or Batching())
    _check_resources(manifest.resources or Resources())
    check_metrics(manifest.metrics)
    check_texts("manifest.parameters", manifest.parameters)
    check_lineage(manifest.lineage or Lineage())
    if manifest.gate is not None:
        check_verdict(manifest.gate)
    _check_ensemble(manifest)
    check_text("manifest.license", manifest.license)
    check_text("manifest.description", manifest.description)


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Return if the metrics can be stored, ordered and filtered by.

    Raises:
        InvalidArgument: They cannot.
    """
    check_keys("manifest.metrics", metrics)
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise InvalidArgument(f"manifest.metrics[{key!r}] is {value}; metrics are finite numbers.")


def _check_signature(signature: Signature, batching: Batching) -> None:
    for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        if not specs:
            raise InvalidArgument(f"manifest.signature.{side} is empty; name at least one tensor.")
        if len(specs) > MAX_TENSORS:
            raise InvalidArgument(f"manifest.signature.{side} has more than {MAX_TENSORS} tensors.")
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidArgument(f"manifest.signature.{side} names {twice!r} twice.")
        for spec in specs:
            _check_tensor(f"manifest.signature.{side}", spec, batching)
    if all(spec.optional for spec in signature.inputs):
        raise InvalidArgument("manifest.signature.inputs are all optional; at least one must be required.")
    for spec in signature.outputs:
        if spec.optional:
            raise InvalidArgument(f"manifest.signature.outputs {spec.name!r}: only inputs can be optional.")


def _check_tensor(where: str, spec: TensorSpec, batching: Batching) -> None:
    if not spec.name or len(spec.name) > 256 or not spec.name.isprintable():
        raise InvalidArgument(
            f"{where}: {spec.name[:80]!r} is not a tensor name (1 to 256 printable characters)."
        )
    if spec.data_type not in DATA_TYPES:
        raise InvalidArgument(
            f"{where} {spec.name!r} has no data type; give one of {', '.join(sorted(DATA_TYPES))}."
        )
    for text in (spec.description, *spec.labels):
        check_text(f"{where} {spec.name!r}: a description or label", text)
    if len(spec.shape) > MAX_RANK:
        raise InvalidArgument(f"{where} {spec.name!r} has more than {MAX_RANK} dimensions.")
    for size in spec.shape:
        if size < -1 or size == 0:
            raise InvalidArgument(
                f"{where} {spec.name!r} has a dimension of {size}; sizes are positive, and -1 means any."
            )
    if batching.max_batch_size > 0 and (not spec.shape or spec.shape[0] != -1):
        raise InvalidArgument(
            f"{where} {spec.name!r} has shape {list(spec.shape)}; with batching.max_batch_size "
            f"{batching.max_batch_size} the first dimension is the batch and must be -1."
        )
    if spec.labels and (where.endswith("inputs") or not spec.shape):
        raise InvalidArgument(f"{where} {spec.name!r}: labels name the last dimension of an output.")
    if spec.labels and spec.shape[-1] not in (-1, len(spec.labels)):
        raise InvalidArgument(
            f"{where} {spec.name!r} has {len(spec.labels)} labels for a last dimension of {spec.shape[-1]}."
        )


def _check_ensemble(manifest: Manifest) -> None:
    if manifest.runtime != "ensemble":
        if manifest.steps:
            raise InvalidArgument(
                f"manifest.ensemble is for the runtime ensemble, not for {manifest.runtime}.",
                reason=Reason.MANIFEST_MISMATCH,
            )
        return
    try:
        check_graph(
            manifest.steps,
            [spec.name for spec in manifest.signature.inputs],
            [spec.name for spec in manifest.signature.outputs],
        )
    except InvalidArgument as error:
        raise InvalidArgument(
            f"manifest.ensemble: {error.message}", reason=Reason.MANIFEST_MISMATCH, metadata=error.metadata
        ) from error


def _check_batching(batching: Batching) -> None:
    for name, most in _MOST_OF_BATCHING.items():
        if not 0 <= getattr(batching, name) <= most:
            raise InvalidArgument(
                f"manifest.batching.{name} is {getattr(batching, name)}; use 0 to {most}, as in a deployment."
            )


def _check_resources(resources: Resources) -> None:
    for name in Resources.__slots__:
        if not 0 <= getattr(resources, name) <= LARGEST_AMOUNT:
            raise InvalidArgument(
                f"manifest.resources.{name} is {getattr(resources, name)}; use 0 to {LARGEST_AMOUNT}."
            )


def _tensor_to_dict(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _ENUM_PREFIX + spec.data_type,
        "shape": list(spec.shape),
        "optional": spec.optional,
        "description": spec.description,
        "labels": list(spec.labels),
    }


def _tensor_from_dict(fields: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=fields["name"],
        data_type=fields["data_type"].removeprefix(_ENUM_PREFIX),
        shape=tuple(fields["shape"]),
        optional=fields["optional"],
        description=fields["description"],
        labels=tuple(fields["labels"]),
    )


def _step_to_dict(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "model": step.model,
        "inputs": dict(step.inputs),
        "outputs": dict(step.outputs),
    }


def _slots_to_dict(part: Batching | Resources) -> dict[str, Any]:
    return {name: getattr(part, name) for name in type(part).__slots__}
