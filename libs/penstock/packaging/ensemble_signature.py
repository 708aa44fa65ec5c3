"""The signature of an ensemble, completed by those of the models that its steps call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from penstock.common.v1 import tensor_pb2
from penstock.ensemble_messages import steps_from_proto, tensor_type
from penstock.ensemble_types import ModelType, TensorType, tensor_types
from penstock.ensembles import Step
from penstock.errors import InvalidArgument, Reason
from penstock.packaging.bundle import Bundle
from penstock.packaging.draft import DEFAULT_BATCH_SIZE
from penstock.packaging.specs import data_type, format_spec
from penstock.registry.v1 import manifest_pb2


def completed(bundle: Bundle, models: Mapping[str, ModelType]) -> Bundle:
    """Return the bundle of an ensemble with a whole signature.

    Args:
        bundle: An ensemble's.
        models: What each step calls, by the step's name; those that are not deployed yet are left out.

    Raises:
        FailedPrecondition: The models do not fit together, or not what the ensemble is said to take or give.
        InvalidArgument: The type of a tensor is neither described nor known from the models.
    """
    manifest = manifest_pb2.Manifest()
    manifest.CopyFrom(bundle.manifest)
    steps = steps_from_proto(manifest.ensemble)
    signature = manifest.signature
    types = tensor_types(
        steps,
        models,
        {spec.name: tensor_type(spec) for spec in signature.inputs},
        {spec.name: tensor_type(spec) for spec in signature.outputs},
    )
    unknown = [step for step in steps if step.name not in models]
    for spec in (*signature.inputs, *signature.outputs):
        _fill(spec, types[spec.name], unknown)
    for spec in signature.inputs:
        spec.optional = types[spec.name].optional
    if not manifest.HasField("batching"):
        known = [model.max_batch_size for model in models.values()]
        free = all(spec.shape and spec.shape[0] == -1 for spec in (*signature.inputs, *signature.outputs))
        rows = min(known, default=DEFAULT_BATCH_SIZE) if free else 0
        manifest.batching.max_batch_size = rows
    _check_batch(manifest)
    notes = [f"Step {step.name} was not checked: {step.model} is not deployed yet." for step in unknown]
    return replace(bundle, manifest=manifest, notes=(*bundle.notes, *notes))


def _fill(spec: tensor_pb2.TensorSpec, kind: TensorType, unknown: Iterable[Step]) -> None:
    if spec.data_type:
        return  # described; that it fits has been seen
    if not kind.datatype or kind.shape is None:
        waiting = ", ".join(step.model for step in unknown)
        why = f"; {waiting} would tell once deployed" if waiting else ""
        raise InvalidArgument(
            f"What the tensor {spec.name!r} is like is not known{why}. Describe it: "
            f"{{name: {spec.name}, dataType: FP32, shape: [-1, 64]}}.",
            reason=Reason.INVALID_REQUEST,
            metadata={"tensor": spec.name},
        )
    spec.data_type = data_type(kind.datatype)
    spec.shape[:] = kind.shape
    if not spec.labels:
        spec.labels.extend(kind.labels)


def _check_batch(manifest: manifest_pb2.Manifest) -> None:
    if manifest.batching.max_batch_size <= 0:
        return
    for spec in (*manifest.signature.inputs, *manifest.signature.outputs):
        if not spec.shape or spec.shape[0] != -1:
            raise InvalidArgument(
                f"With a batch size of {manifest.batching.max_batch_size} every shape begins with -1, the "
                f"batch; {format_spec(spec)} does not. Give --batch 0 if the ensemble takes exactly these "
                "shapes.",
                reason=Reason.MANIFEST_MISMATCH,
            )
