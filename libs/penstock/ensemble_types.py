"""What follows for an ensemble's tensors from the signatures of the models that its steps call.

Pure, as `penstock.ensembles`. Shapes are compared as they stand, the batch dimension included: tensors are
passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.ensembles import Step, nearest
from penstock.errors import FailedPrecondition, Reason


@dataclass(frozen=True, slots=True)
class TensorType:
    """What is known of a tensor.

    Attributes:
        datatype: Such as "FP32"; empty if unknown.
        shape: Its sizes, -1 for any; None if unknown.
        optional: Whether a request may leave it out.
        labels: Names of the classes along the last dimension.
    """

    datatype: str = ""
    shape: tuple[int, ...] | None = None
    optional: bool = False
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        return f"{self.datatype or 'any datatype'} {shape}"


@dataclass(frozen=True, slots=True)
class ModelType:
    """What a model takes and gives.

    Attributes:
        inputs: Types by name.
        outputs: Types by name.
        max_batch_size: Rows in one call; 0 if the first dimension is no batch.
        words: What it is, for people, such as "scaler:3".
    """

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    max_batch_size: int
    words: str


@dataclass(frozen=True, slots=True)
class _End:
    """Where a tensor is given or taken."""

    kind: TensorType
    words: str


def tensor_types(
    steps: Sequence[Step],
    models: Mapping[str, ModelType],
    inputs: Mapping[str, TensorType],
    outputs: Mapping[str, TensorType],
) -> dict[str, TensorType]:
    """Return what is known of every tensor of an ensemble.

    Args:
        steps: The graph; it has been checked.
        models: What each step calls, by the step's name; a step is left out if that is unknown.
        inputs: The ensemble's inputs as described; types may be unknown.
        outputs: The ensemble's outputs as described.

    Raises:
        FailedPrecondition: A step uses a tensor that its model does not have, leaves out one that it needs,
            or what one gives does not fit what takes it. Reason MANIFEST_MISMATCH.
    """
    for step in steps:
        if step.name in models:
            _check_names(step, models[step.name])
    given: dict[str, _End] = {name: _End(kind, "the ensemble's input") for name, kind in inputs.items()}
    taken: dict[str, list[_End]] = {}
    for step in steps:
        model = models.get(step.name)
        for name, tensor in step.outputs.items():
            kind = model.outputs[name] if model else TensorType()
            given[tensor] = _End(kind, f"the output {name} of step {step.name}")
        for name, tensor in step.inputs.items():
            kind = model.inputs[name] if model else TensorType()
            taken.setdefault(tensor, []).append(_End(kind, f"step {step.name} as its input {name}"))
    for name, kind in outputs.items():
        taken.setdefault(name, []).append(_End(kind, "the ensemble as its output"))
    return {
        tensor: _meet(tensor, end, taken.get(tensor, ()), is_input=tensor in inputs)
        for tensor, end in given.items()
    }


def mismatch(given: TensorType, taken: TensorType) -> str:
    """Return why a tensor of one type cannot be taken as another; empty if it may fit."""
    if given.datatype and taken.datatype and given.datatype != taken.datatype:
        return f"it is {given.datatype}, not {taken.datatype}"
    if given.shape is None or taken.shape is None:
        return ""
    if len(given.shape) != len(taken.shape):
        return f"it has the shape {list(given.shape)}, not {list(taken.shape)}"
    for have, want in zip(given.shape, taken.shape, strict=True):
        if have != want and have >= 0 and want >= 0:
            return f"it has the shape {list(given.shape)}, not {list(taken.shape)}"
    return ""


def _check_names(step: Step, model: ModelType) -> None:
    for kind, used, known in (("input", step.inputs, model.inputs), ("output", step.outputs, model.outputs)):
        for name in used:
            if name not in known:
                raise _wrong(
                    step,
                    f"{model.words} has no {kind} {name!r}; it has {', '.join(known)}.{nearest(name, known)}",
                )
    missing = [name for name, kind in model.inputs.items() if not kind.optional and name not in step.inputs]
    if missing:
        raise _wrong(step, f"{model.words} needs the input {missing[0]!r}, which the step does not give it.")


def _meet(tensor: str, given: _End, taken: Iterable[_End], *, is_input: bool) -> TensorType:
    """Return what is known of a tensor from both its ends, after seeing that they fit."""
    kind = given.kind
    optional = True
    for end in taken:
        problem = mismatch(kind, end.kind)
        if problem:
            raise FailedPrecondition(
                f"Tensor {tensor!r}, {given.words}, does not fit {end.words}: {problem}.",
                reason=Reason.MANIFEST_MISMATCH,
                metadata={"tensor": tensor},
            )
        optional = optional and end.kind.optional
        if is_input:
            kind = _narrowed(kind, end.kind)
    return replace(kind, optional=is_input and (optional or given.kind.optional))


def _narrowed(kind: TensorType, other: TensorType) -> TensorType:
    """Return the type that both allow: they fit each other."""
    shape = kind.shape
    if shape is None:
        shape = other.shape
    elif other.shape is not None:
        shape = tuple(max(one, two) for one, two in zip(shape, other.shape, strict=True))
    return replace(kind, datatype=kind.datatype or other.datatype, shape=shape)


def _wrong(step: Step, words: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"Step {step.name}: {words}", reason=Reason.MANIFEST_MISMATCH, metadata={"step": step.name}
    )
