"""Ensembles: what makes a graph of deployed models right, and what follows from it.

Pure: no files, no network, no messages. The edges of a graph are tensors with names of their own. The
ensemble's inputs and what steps give are produced; what steps take and the ensemble's outputs are consumed.
Sequence, fan-out and join follow:

    image ──▶ scale ──▶ scaled ──┬──▶ forest ──▶ p1 ──┬──▶ vote ──▶ label
                                 └──▶ linear ──▶ p2 ──┘
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from penstock.errors import InvalidArgument

MAX_STEPS = 64
# Ensembles of ensembles: a request passes through at most so many of them.
MAX_DEPTH = 4
MAX_NAME = 256
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Step:
    """One model of an ensemble.

    Attributes:
        name: Its name in errors, unique in the ensemble.
        model: ``deployment``, ``deployment@alias`` or ``deployment:number``.
        inputs: The model's inputs → tensors of the ensemble.
        outputs: The model's outputs → tensors of the ensemble.
    """

    name: str
    model: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def deployment(self) -> str:
        """The deployment that computes it."""
        return split_reference(self.model)[0]

    @property
    def selector(self) -> str:
        """What is selected inside the deployment: "@alias", a number, or nothing."""
        return split_reference(self.model)[1]


@lru_cache(maxsize=4096)
def split_reference(model: str) -> tuple[str, str]:
    """Return deployment and selector ("@alias", a number, or nothing) of what a step calls.

    Raises:
        InvalidArgument: It is not of the form deployment, deployment@alias or deployment:number.
    """
    deployment, mark, rest = model.partition("@")
    if not mark:
        deployment, mark, rest = model.partition(":")
    fits = bool(_ID.fullmatch(deployment))
    if mark == "@":
        fits = fits and bool(_ID.fullmatch(rest)) and not rest.isdecimal()
    elif mark:
        fits = fits and bool(_NUMBER.fullmatch(rest))
    if not fits:
        raise InvalidArgument(
            f"{model[:80]!r} is not what a step can call: write DEPLOYMENT, DEPLOYMENT@ALIAS or "
            "DEPLOYMENT:NUMBER."
        )
    return deployment, f"@{rest}" if mark == "@" else rest


def check_graph(steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    """Return remarks on a graph that can be served, such as tensors that nobody uses.

    Args:
        steps: In any order.
        inputs: Names of the ensemble's inputs.
        outputs: Names of the ensemble's outputs.

    Raises:
        InvalidArgument: It cannot; the words name the step or tensor, and what may have been meant.
    """
    _check_steps(steps)
    producers = _producers(steps, inputs)
    for step in steps:
        for name, tensor in sorted(step.inputs.items()):
            if tensor not in producers:
                raise InvalidArgument(
                    f"Step {step.name} takes {tensor!r} as its input {name}, but no step gives that and it "
                    f"is no input of the ensemble.{_hint(tensor, producers)}",
                    metadata={"step": step.name, "tensor": tensor},
                )
    for tensor in outputs:
        if tensor not in producers:
            raise InvalidArgument(
                f"The ensemble's output {tensor!r} is given by no step.{_hint(tensor, producers)}",
                metadata={"tensor": tensor},
            )
    stages(steps)
    return _remarks(steps, inputs, outputs)


def stages(steps: Sequence[Step]) -> tuple[tuple[Step, ...], ...]:
    """Return the steps by the length of the longest way to them: each stage needs only earlier ones.

    Raises:
        InvalidArgument: Steps wait for each other; the words show the circle.
    """
    producer = {tensor: step for step in steps for tensor in step.outputs.values()}
    waits_for = {
        step.name: {producer[tensor].name for tensor in step.inputs.values() if tensor in producer}
        for step in steps
    }
    found: list[tuple[Step, ...]] = []
    placed: set[str] = set()
    left = list(steps)
    while left:
        stage = tuple(step for step in left if waits_for[step.name] <= placed)
        if not stage:
            raise _circle(left, producer)
        found.append(stage)
        placed |= {step.name for step in stage}
        left = [step for step in left if step.name not in placed]
    return tuple(found)


def needed(steps: Sequence[Step], outputs: Iterable[str]) -> tuple[Step, ...]:
    """Return the steps that some outputs of the ensemble depend on, in the given order."""
    producer = {tensor: step for step in steps for tensor in step.outputs.values()}
    wanted: set[str] = set()
    open_tensors = list(outputs)
    while open_tensors:
        step = producer.get(open_tensors.pop())
        if step is not None and step.name not in wanted:
            wanted.add(step.name)
            open_tensors += step.inputs.values()
    return tuple(step for step in steps if step.name in wanted)


def free_inputs(steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the tensors that steps take and none gives, in the order of the steps: natural inputs."""
    given = {tensor for step in steps for tensor in step.outputs.values()}
    taken = [tensor for step in steps for tensor in step.inputs.values()]
    return tuple(dict.fromkeys(tensor for tensor in taken if tensor not in given))


def free_outputs(steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the tensors that steps give and none takes, in the order of the steps: natural outputs."""
    taken = {tensor for step in steps for tensor in step.inputs.values()}
    return tuple(t for step in steps for t in step.outputs.values() if t not in taken)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" for the known word most like one that is not; empty if none is."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check_steps(steps: Sequence[Step]) -> None:
    if not 1 <= len(steps) <= MAX_STEPS:
        raise InvalidArgument(f"An ensemble has 1 to {MAX_STEPS} steps, not {len(steps)}.")
    seen: set[str] = set()
    for step in steps:
        if not _ID.fullmatch(step.name):
            raise InvalidArgument(
                f"{step.name[:80]!r} cannot name a step: use 1 to 63 letters, digits, '_', '.' and '-', a "
                "letter or digit first."
            )
        if step.name in seen:
            raise InvalidArgument(
                f"Two steps are called {step.name}; give each a name of its own.",
                metadata={"step": step.name},
            )
        seen.add(step.name)
        split_reference(step.model)
        for side, tensors in (("takes", step.inputs), ("gives", step.outputs)):
            if not tensors:
                what = "inputs" if side == "takes" else "outputs"
                raise InvalidArgument(
                    f"Step {step.name} {side} nothing; say which tensors are its {what}.",
                    metadata={"step": step.name},
                )
            for name in (*tensors, *tensors.values()):
                if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
                    raise InvalidArgument(
                        f"Step {step.name}: {name[:80]!r} is not a tensor name (1 to {MAX_NAME} printable "
                        "characters).",
                        metadata={"step": step.name},
                    )


def _producers(steps: Sequence[Step], inputs: Sequence[str]) -> dict[str, str]:
    """Return who produces each tensor, in words."""
    producers = dict.fromkeys(inputs, "the ensemble's inputs")
    for step in steps:
        for tensor in step.outputs.values():
            if tensor in producers:
                raise InvalidArgument(
                    f"Tensor {tensor!r} is given by step {step.name} and by {producers[tensor]}; every "
                    "tensor has one producer. Rename one of them.",
                    metadata={"step": step.name, "tensor": tensor},
                )
            producers[tensor] = f"step {step.name}"
    return producers


def _hint(tensor: str, known: Collection[str]) -> str:
    return nearest(tensor, known) or f" There are {', '.join(sorted(known)[:20])}."


def _circle(left: Sequence[Step], producer: Mapping[str, Step]) -> InvalidArgument:
    """Return the error that shows a circle among steps of which each waits for another."""
    names = {step.name for step in left}
    seen: dict[str, int] = {}
    way: list[tuple[Step, str]] = []
    step = left[0]
    while step.name not in seen:
        seen[step.name] = len(way)
        tensor = next(t for t in step.inputs.values() if t in producer and producer[t].name in names)
        way.append((step, tensor))
        step = producer[tensor]
    circle = way[seen[step.name] :]
    words = ", ".join(f"{one.name} takes {tensor!r} of {producer[tensor].name}" for one, tensor in circle)
    return InvalidArgument(
        f"The steps wait for each other in a circle: {words}.",
        metadata={"cycle": " ".join(one.name for one, _ in circle)},
    )


def _remarks(steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    useful = {step.name for step in needed(steps, outputs)}
    remarks = [
        f"Step {step.name} adds nothing to the outputs and never runs."
        for step in steps
        if step.name not in useful
    ]
    taken = {tensor for step in steps for tensor in step.inputs.values()} | set(outputs)
    remarks += [
        f"Nobody uses {tensor!r}, which step {step.name} gives."
        for step in steps
        if step.name in useful
        for tensor in step.outputs.values()
        if tensor not in taken
    ]
    remarks += [f"No step takes the input {tensor!r}." for tensor in inputs if tensor not in taken]
    return tuple(remarks)
