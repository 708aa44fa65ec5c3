"""The run of one request through an ensemble: a step begins as soon as all that it takes is there.

No I/O and no clock here: whoever runs a graph gives it a way to call steps, and calls back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from penstock_kit.ensembles import Step, needed
from penstock_kit.errors import PenstockError

T = TypeVar("T")
_PLANS_KEPT = 64


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step as a run needs it.

    Attributes:
        index: Its place among the planned steps.
        step: The step.
        inputs: (the model's input, tensor of the ensemble) in a fixed order.
        outputs: (the model's output, tensor of the ensemble) that somebody needs.
        waits_for: How many other steps must have ended before it.
        followers: Indexes of the steps that wait for it.
    """

    index: int
    step: Step
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    waits_for: int
    followers: tuple[int, ...]


class Plan:
    """The steps that some outputs of an ensemble need; the others are not run.

    Args:
        steps: The graph; it has been checked.
        outputs: Names of the outputs that are asked for.
    """

    def __init__(self, steps: Sequence[Step], outputs: tuple[str, ...]) -> None:
        wanted = needed(steps, outputs)
        taken = {tensor for step in wanted for tensor in step.inputs.values()} | set(outputs)
        producer = {tensor: index for index, step in enumerate(wanted) for tensor in step.outputs.values()}
        before = [{producer[t] for t in step.inputs.values() if t in producer} for step in wanted]
        self.outputs = outputs
        self.steps = tuple(
            PlannedStep(
                index,
                step,
                tuple(sorted(step.inputs.items())),
                tuple(sorted(pair for pair in step.outputs.items() if pair[1] in taken)),
                len(before[index]),
                tuple(follower for follower, earlier in enumerate(before) if index in earlier),
            )
            for index, step in enumerate(wanted)
        )
        self.waits = [planned.waits_for for planned in self.steps]
        self.first = [planned for planned in self.steps if not planned.waits_for]


class Plans:
    """The plans of one ensemble, by what callers ask for.

    Args:
        steps: The graph; it has been checked.
        outputs: Names of all outputs, in the order of the signature.
    """

    def __init__(self, steps: Sequence[Step], outputs: Sequence[str]) -> None:
        self._steps = tuple(steps)
        self._all = tuple(outputs)
        self._kept: dict[tuple[str, ...], Plan] = {}

    def get(self, outputs: tuple[str, ...] | None) -> Plan:
        """Return the plan for some outputs; None means all."""
        key = self._all if outputs is None else outputs
        plan = self._kept.get(key)
        if plan is None:
            if len(self._kept) >= _PLANS_KEPT:
                self._kept.clear()
            plan = self._kept[key] = Plan(self._steps, key)
        return plan


class Run(Generic[T]):
    """One request on its way through a graph. Used by one thread.

    Args:
        plan: What to run.
        inputs: The ensemble's inputs; optional ones may be missing.
        call: Begins a step with its inputs by the model's names. Its answer comes through `answered` or
            `failed`, later or at once.
        done: Gets the outputs that were asked for, or the first error. Called once.
    """

    __slots__ = ("_call", "_done", "_plan", "_tensors", "_waits", "ended", "open_steps")

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, T],
        call: Callable[[Run[T], PlannedStep, dict[str, T]], None],
        done: Callable[[dict[str, T] | PenstockError], None],
    ) -> None:
        self._plan = plan
        self._tensors = dict(inputs)
        self._call = call
        self._done = done
        self._waits = plan.waits.copy()
        self.open_steps: set[int] = set()
        self.ended = False

    def start(self) -> None:
        """Begin all steps that need nothing but the inputs."""
        if not self._plan.steps:
            self._end()
            return
        self._begin(self._plan.first)

    def answered(self, planned: PlannedStep, outputs: Mapping[str, T]) -> None:
        """Take what a step gave, by the model's names, and begin what waited for it.

        Raises:
            KeyError: The model did not give an output that was asked for.
        """
        if self.ended:
            return
        tensors = self._tensors
        for name, tensor in planned.outputs:
            tensors[tensor] = outputs[name]
        self.open_steps.discard(planned.index)
        ready = []
        for follower in planned.followers:
            self._waits[follower] -= 1
            if not self._waits[follower]:
                ready.append(self._plan.steps[follower])
        if ready:
            self._begin(ready)
        elif not self.open_steps:
            self._end()

    def failed(self, error: PenstockError) -> None:
        """End the run: a step failed, or nobody waits for it any more."""
        if not self.ended:
            self.ended = True
            self._done(error)

    def _begin(self, ready: Sequence[PlannedStep]) -> None:
        # All of them count as open before the first is called: its answer may come at once.
        self.open_steps.update([planned.index for planned in ready])
        tensors = self._tensors
        for planned in ready:
            if self.ended:
                return
            inputs = {name: tensors[tensor] for name, tensor in planned.inputs if tensor in tensors}
            self._call(self, planned, inputs)

    def _end(self) -> None:
        self.ended = True
        self._done({name: self._tensors[name] for name in self._plan.outputs if name in self._tensors})
