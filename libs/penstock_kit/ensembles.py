"""Ensembles as services see them: `penstock.ensembles` and what belongs to it, in one place."""

from __future__ import annotations

from penstock.ensemble_messages import model_type, steps_from_proto, steps_to_proto
from penstock.ensemble_types import ModelType, TensorType, tensor_types
from penstock.ensembles import (
    MAX_DEPTH,
    MAX_STEPS,
    Step,
    check_graph,
    needed,
    split_reference,
    stages,
)

__all__ = [
    "MAX_DEPTH",
    "MAX_STEPS",
    "ModelType",
    "Step",
    "TensorType",
    "check_graph",
    "model_type",
    "needed",
    "split_reference",
    "stages",
    "steps_from_proto",
    "steps_to_proto",
    "tensor_types",
]
