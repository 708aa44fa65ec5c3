"""Between messages and the plain objects of `penstock.ensembles` and `penstock.ensemble_types`."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.common.v1 import tensor_pb2
from penstock.ensemble_types import ModelType, TensorType
from penstock.ensembles import Step
from penstock.registry.v1 import manifest_pb2

_PREFIX = "DATA_TYPE_"


def steps_from_proto(message: manifest_pb2.Ensemble) -> tuple[Step, ...]:
    """Return the steps of a message; one without a name is called like its deployment."""
    return tuple(
        Step(
            step.name or step.model.partition("@")[0].partition(":")[0],
            step.model,
            dict(step.inputs),
            dict(step.outputs),
        )
        for step in message.steps
    )


def steps_to_proto(steps: Iterable[Step]) -> manifest_pb2.Ensemble:
    """Return the message of steps."""
    return manifest_pb2.Ensemble(
        steps=[
            manifest_pb2.EnsembleStep(
                name=step.name, model=step.model, inputs=step.inputs, outputs=step.outputs
            )
            for step in steps
        ]
    )


def tensor_type(spec: tensor_pb2.TensorSpec) -> TensorType:
    """Return what a description says of a tensor; without a datatype, no dimensions mean any shape."""
    shape = tuple(spec.shape)
    if not spec.data_type:
        return TensorType(shape=shape or None, optional=spec.optional)
    names = tensor_pb2.DataType.DESCRIPTOR.values_by_number
    known = names.get(spec.data_type)  # a newer contract's number has no name here
    return TensorType(
        known.name.removeprefix(_PREFIX) if known else "", shape, spec.optional, tuple(spec.labels)
    )


def model_type(manifest: manifest_pb2.Manifest, words: str) -> ModelType:
    """Return what the model of a manifest takes and gives; `words` say which it is."""
    return ModelType(
        {spec.name: tensor_type(spec) for spec in manifest.signature.inputs},
        {spec.name: tensor_type(spec) for spec in manifest.signature.outputs},
        manifest.batching.max_batch_size,
        words,
    )
