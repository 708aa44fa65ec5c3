"""How the learning rate changes, as a factor on the recipe's.

With the step s from 0, S steps in all, W steps of warm-up, epochs e from 0:

constant     1
cosine       f + (1 − f)(1 + cos πp)/2  with p = (s − W)/(S − W) and the final part f
             (Loshchilov & Hutter, SGDR, ICLR 2017, without restarts)
linear       1 − (1 − f)p
step         γ^⌊e / size⌋
exponential  γ^e
one_cycle    from 1/start up to 1 over the first part of the steps and down to 1/(start · end), both along
             half a cosine (Smith & Topin 2018, as torch's OneCycleLR has it; momentum stays)
plateau      times `factor` after each `patience` epochs without a gain of the held-out loss

During a warm-up the factor is (s + 1)/(W + 1) of what the schedule begins with.
"""

from __future__ import annotations

import math
from typing import Any

from penstock_kit.jobs.train import Named


class Schedule:
    """Factors on the learning rate; what it remembers goes into checkpoints.

    Args:
        schedule: Name and parameters.
        warmup_steps: Steps of rising first.
        total_steps: Steps of the whole training.
        steps_per_epoch: Steps of one epoch.
    """

    def __init__(self, schedule: Named, warmup_steps: int, total_steps: int, steps_per_epoch: int) -> None:
        self._name, self._parameters = schedule.name, schedule.parameters
        self._warmup = warmup_steps
        self._total, self._per_epoch = max(1, total_steps), max(1, steps_per_epoch)
        self._drops = 0
        self._best: float | None = None
        self._bad = 0

    def factor(self, step: int) -> float:
        """Return the factor of a step, counted from 0."""
        if step < self._warmup:
            return (step + 1) / (self._warmup + 1)
        parameters = self._parameters
        match self._name:
            case "cosine":
                final = float(parameters["final"])
                return final + (1 - final) * (1 + math.cos(math.pi * self._progress(step))) / 2
            case "linear":
                return 1 - (1 - float(parameters["final"])) * self._progress(step)
            case "step":
                drops = step // self._per_epoch // int(parameters["step_size"])
                return float(float(parameters["gamma"]) ** drops)
            case "exponential":
                return float(float(parameters["gamma"]) ** (step // self._per_epoch))
            case "one_cycle":
                return self._one_cycle(step)
            case "plateau":
                return float(float(parameters["factor"]) ** self._drops)
            case _:
                return 1.0

    def epoch_ended(self, loss: float) -> None:
        """Take note of the held-out loss of an epoch."""
        if self._name != "plateau":
            return
        least = self._parameters["min_delta"]
        if self._best is None or loss < self._best * (1 - least if self._best > 0 else 1 + least):
            self._best, self._bad = loss, 0
            return
        self._bad += 1
        if self._bad > self._parameters["patience"]:
            self._drops, self._bad = self._drops + 1, 0

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as JSON can say it."""
        return {"drops": self._drops, "best": self._best, "bad": self._bad}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._drops, self._best, self._bad = state["drops"], state["best"], state["bad"]

    def _progress(self, step: int) -> float:
        return min(1.0, (step - self._warmup) / max(1, self._total - self._warmup))

    def _one_cycle(self, step: int) -> float:
        parameters = self._parameters
        first = 1 / parameters["start"]
        last = first / parameters["end"]
        top = max(parameters["rise"] * self._total - 1, 0.0)
        if step <= top and top > 0:
            return _along_cosine(first, 1.0, step / top)
        return _along_cosine(1.0, last, min(1.0, (step - top) / max(1e-9, self._total - 1 - top)))


def _along_cosine(begin: float, end: float, part: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * part))
