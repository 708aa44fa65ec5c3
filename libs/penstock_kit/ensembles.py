"""Ensembles as services see them: `penstock.ensembles`, and the way from and to messages."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.ensembles import (
    MAX_DEPTH,
    MAX_STEPS,
    Step,
    check_graph,
    needed,
    split_reference,
    stages,
)
from penstock.registry.v1 import manifest_pb2

__all__ = [
    "MAX_DEPTH",
    "MAX_STEPS",
    "Step",
    "check_graph",
    "needed",
    "split_reference",
    "stages",
    "steps_from_proto",
    "steps_to_proto",
]


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
