"""What a step may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.registry.v1 import manifest_pb2
from penstock_worker.adapters.compression.export import Form
from penstock_worker.adapters.compression.fitting import Loss, Plan, Watch, fit
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.teachers import Teacher
from penstock_worker.adapters.measuring.questions import Questions
from penstock_worker.adapters.training.rows import Rows

Facts = dict[str, float]
"""What a step has done, in numbers: {"zeros": 0.5}."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a step may use.

    Attributes:
        manifest: Of the source; its signature is that of the result.
        questions: The rows to learn from, as the served model is asked.
        rows: The same, as the module takes them.
        loss: What is made small.
        teacher: Opens a version as a teacher; "" is the source.
        form: How callers see a module; None for graphs.
        student: Builds an untrained model of an architecture with these sizes, for the source's data.
        seed: Of random numbers.
        scratch: A directory for files that need not survive.
        watch: Told how far a step is; raises `Stopped` when the job shall stop.
        log: Writes a line into the job's log.
    """

    manifest: manifest_pb2.Manifest
    questions: Questions
    rows: Rows
    loss: Loss
    teacher: Callable[[str], Teacher]
    form: Form | None
    student: Callable[[str, Mapping[str, Any]], torch.nn.Module]
    seed: int
    scratch: Path
    watch: Watch
    log: Callable[[str], None]

    def example(self, rows: int = 2) -> torch.Tensor:
        """Return inputs of a few rows as the module takes them."""
        return self.rows.batch(torch.arange(min(rows, len(self.rows))))[0]

    def repair(self, subject: Subject, parameters: Mapping[str, Any], phase: str) -> Facts:
        """Train a module that something was taken from, as `repair_epochs` and the like say."""
        epochs = parameters["repair_epochs"]
        if not epochs:
            return {}
        module = subject.need_module(f"{phase} with repair")

        def loss_of(indices: torch.Tensor) -> torch.Tensor:
            inputs, targets = self.rows.batch(indices)
            return self.loss(module(inputs), targets)

        plan = Plan(epochs, parameters["learning_rate"], parameters["batch_size"], self.seed)
        return {"loss": fit(module, self.rows, plan, loss_of, self.watch, f"repair after {phase}")}
