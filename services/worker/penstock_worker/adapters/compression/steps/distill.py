"""Knowledge distillation: a student learns the teacher's answers beside the labels (Hinton et al. 2015).

    loss = α·T²·KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 - α)·loss(student, labels) + hidden·MSE

with the mean square between hidden states in the last term, the student's brought to the teacher's width by a
linear layer that is thrown away afterwards (Romero et al. 2015). For numbers instead of classes, the mean
square takes the place of the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from penstock_worker.adapters.compression.fitting import Plan, fit
from penstock_worker.adapters.compression.layers import parameters_of, repeated_blocks
from penstock_worker.adapters.compression.structure import copy_of, drop_blocks
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.teachers import Hidden, Teacher, pairs
from penstock_worker.adapters.compression.tools import Facts, Tools
from penstock_worker.usecases.job_context import JobFailure


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Put a student in the model's place and train it.

    Returns:
        "parameters": the student's numbers over those of the model before; "loss" of its last epoch.

    Raises:
        JobFailure: INVALID_RECIPE if teacher and student do not answer alike, or there are no hidden states.
    """
    module = subject.need_module("distill")
    before = parameters_of(module)
    teacher = tools.teacher(parameters["teacher"])
    student = _student(subject, module, parameters, tools)
    _compare(teacher, student, tools)
    if parameters["hidden"] and teacher.module is None:
        raise JobFailure(
            f"Hidden states of {teacher.name} cannot be seen: it is no recipe's model. Leave hidden out.",
            "INVALID_RECIPE",
        )
    lesson = _Lesson(teacher, student, parameters, tools)
    plan = Plan(parameters["epochs"], parameters["learning_rate"], parameters["batch_size"], tools.seed)
    with lesson:
        loss = fit(
            student, tools.rows, plan, lesson.loss_of, tools.watch, "distillation", more=lesson.projections
        )
    subject.module = student
    return {"loss": loss, "parameters": parameters_of(student) / before}


def _student(subject: Subject, module: nn.Module, parameters: Mapping[str, Any], tools: Tools) -> nn.Module:
    """Return a new model of another architecture, or the model with evenly spread blocks of it."""
    if parameters["student"]:
        student = tools.student(parameters["student"], parameters["student_parameters"])
        subject.changes = [
            {
                "change": "student",
                "architecture": parameters["student"],
                "parameters": dict(parameters["student_parameters"]),
            }
        ]
        return student
    student = copy_of(module)
    blocks = repeated_blocks(student)
    if blocks is None:
        return student  # the model as it is, after steps that made it smaller: it learns from the teacher
    count = len(blocks.names)
    keep = parameters["keep_layers"] or max(1, count // 2)
    if keep > count:
        raise JobFailure(f"The model has {count} blocks; {keep} cannot be kept.", "INVALID_RECIPE")
    if keep < count:
        places = torch.linspace(0, count - 1, keep).round().long().tolist() if keep > 1 else [0]
        dropped = [name for place, name in enumerate(blocks.names) if place not in places]
        subject.changes.append(drop_blocks(student, blocks.container, dropped))
    return student


def _compare(teacher: Teacher, student: nn.Module, tools: Tools) -> None:
    indices = torch.arange(min(2, len(tools.rows)))
    inputs, _ = tools.rows.batch(indices)
    student.eval()
    with torch.no_grad():
        ours = student(inputs)
    theirs = teacher.answer(indices, inputs)
    if ours.shape[1:] != theirs.shape[1:]:
        raise JobFailure(
            f"The teacher {teacher.name} answers a row with {list(theirs.shape[1:])} numbers, the student "
            f"with {list(ours.shape[1:])}: they must be of the same classes in the same order.",
            "INVALID_RECIPE",
        )


class _Lesson:
    """The loss of a student."""

    def __init__(
        self, teacher: Teacher, student: nn.Module, parameters: Mapping[str, Any], tools: Tools
    ) -> None:
        self._teacher, self._student, self._tools = teacher, student, tools
        self._temperature, self._alpha = parameters["temperature"], parameters["alpha"]
        self._weight = parameters["hidden"]
        self._seen = Hidden(student)
        self._shown = Hidden(teacher.module) if self._weight and teacher.module is not None else None
        self.projections: nn.ModuleList | None = None

    def __enter__(self) -> _Lesson:
        if self._shown is not None:
            self._shown.__enter__()
            self._seen.__enter__()
            self.projections = self._project(self._shown)
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.__exit__()
        if self._shown is not None:
            self._shown.__exit__()

    def loss_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over some rows."""
        inputs, targets = self._tools.rows.batch(indices)
        states: list[torch.Tensor] = []
        models: list[torch.Tensor] = []
        if self._shown is None:
            theirs = self._teacher.answer(indices, inputs)
            ours = self._student(inputs)
        else:
            theirs, models = self._shown.of(lambda: self._teacher.answer(indices, inputs))
            ours, states = self._seen.of(lambda: self._student(inputs))
        loss = (1 - self._alpha) * self._tools.loss(ours, targets)
        loss = loss + self._alpha * self._distance(ours, theirs, targets)
        if self.projections is not None:
            loss = loss + self._weight * self._hidden_distance(states, models)
        return loss

    def _distance(self, ours: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.is_floating_point():
            return nn.functional.mse_loss(ours.float(), theirs)
        heat, classes = self._temperature, ours.shape[-1]
        return heat**2 * nn.functional.kl_div(
            nn.functional.log_softmax(ours.reshape(-1, classes).float() / heat, dim=-1),
            nn.functional.log_softmax(theirs.reshape(-1, classes) / heat, dim=-1),
            reduction="batchmean",
            log_target=True,
        )

    def _hidden_distance(self, states: list[torch.Tensor], models: list[torch.Tensor]) -> torch.Tensor:
        distances = [
            nn.functional.mse_loss(projection(states[place]).float(), models[other].float())
            for projection, (place, other) in zip(
                self.projections or (), pairs(len(states), len(models)), strict=True
            )
        ]
        return torch.stack(distances).mean()

    def _project(self, shown: Hidden) -> nn.ModuleList:
        """Return a linear layer for each of the student's hidden states whose width is not the teacher's."""
        indices = torch.arange(min(2, len(self._tools.rows)))
        inputs, _ = self._tools.rows.batch(indices)
        with torch.no_grad():
            _, models = shown.of(lambda: self._teacher.answer(indices, inputs))
            _, states = self._seen.of(lambda: self._student(inputs))
        layers: list[nn.Module] = []
        for place, other in pairs(len(states), len(models)):
            mine, model = states[place].shape, models[other].shape
            if mine[:-1] != model[:-1]:
                raise JobFailure(
                    f"Hidden states of teacher and student differ by more than their width "
                    f"({list(model)} and {list(mine)}); leave hidden out.",
                    "INVALID_RECIPE",
                )
            same = mine[-1] == model[-1]
            layers.append(nn.Identity() if same else nn.Linear(mine[-1], model[-1], bias=False))
        if not layers:
            raise JobFailure(
                "The student has no hidden states to compare; leave hidden out.", "INVALID_RECIPE"
            )
        return nn.ModuleList(layers)
