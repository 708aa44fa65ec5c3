"""Who teaches a student: a module, whose hidden states can be seen, or any version by its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from penstock_kit.oip import Array
from penstock_worker.adapters.compression.layers import last_linear, repeated_blocks
from penstock_worker.adapters.measuring.answers import Answers, answers_of
from penstock_worker.adapters.measuring.loading import OpenedVersion
from penstock_worker.adapters.measuring.questions import Questions
from penstock_worker.usecases.job_context import JobFailure

# How far sums of probabilities are from 1, and the least of them that is told apart from none.
_SLACK, _LEAST = 1e-3, 1e-8


class Teacher(Protocol):
    """Answers rows that a student learns from.

    Attributes:
        name: For messages.
        module: The model itself if its hidden states can be seen; else None.
    """

    name: str
    module: nn.Module | None

    def answer(self, indices: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits or numbers.

        Args:
            indices: int64 [B], numbers of rows of the training part.
            inputs: The same rows as the student takes them.

        Returns:
            fp32 [B, …], without a gradient.
        """
        ...


class ModuleTeacher:
    """A model that takes what the student takes."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module: nn.Module | None = module.eval()
        self._answer = module

    def answer(self, indices: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the model."""
        with torch.no_grad():
            answer: torch.Tensor = self._answer(inputs).float()
        return answer


class VersionTeacher:
    """Any version, asked as callers ask it. What it has answered once is kept."""

    def __init__(self, name: str, opened: OpenedVersion, questions: Questions) -> None:
        self.name = name
        self.module: nn.Module | None = None
        self._opened, self._questions = opened, questions
        self._answers: Answers | None = None
        self._kept: dict[int, torch.Tensor] = {}

    def answer(self, indices: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Ask for the rows that are not known yet.

        Raises:
            JobFailure: INVALID_DATA: it has other classes than the dataset; UNSUPPORTED: it gives no scores.
        """
        missing = [row for row in indices.tolist() if row not in self._kept]
        if missing:
            asked, _ = self._questions.batch(np.array(missing, dtype=np.int64))
            given = torch.from_numpy(self._taught(self._opened.predict(asked)).astype(np.float32))
            for row, answer in zip(missing, self._logits(given), strict=True):
                self._kept[row] = answer
        return torch.stack([self._kept[row] for row in indices.tolist()])

    def _taught(self, outputs: dict[str, Array]) -> Array:
        """Return what a student learns of it: scores in the dataset's order, or numbers [rows, 1]."""
        if self._answers is None:
            self._answers = answers_of(self._opened.signature, outputs, self._questions)
        if self._answers.numbers:
            return self._answers.values(outputs)[:, None]
        scores = self._answers.scores(outputs)
        if scores is None:
            raise JobFailure(
                f"The teacher {self.name} gives classes without scores, of which a student learns nothing "
                "that the labels do not say.",
                "UNSUPPORTED",
            )
        return scores

    def _logits(self, given: torch.Tensor) -> torch.Tensor:
        """Return logits of the dataset's classes; of a version that gives probabilities, their logarithms."""
        classes = len(self._questions.classes)
        if not classes:
            return given
        if given.min() >= 0 and bool((given.sum(-1) - 1).abs().max() < _SLACK):
            given = given.clamp_min(_LEAST).log()
        # Behind the dataset's classes are those that only the version has: a student has none of them.
        return given[..., :classes]


class Hidden:
    """Sees the hidden states of a module: what its blocks give, and what its last linear layer takes.

    A context manager: it looks only within it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._stack = ExitStack()
        self.states: list[torch.Tensor] = []

    def __enter__(self) -> Hidden:
        blocks = repeated_blocks(self._module)
        if blocks is not None:
            parent = self._module.get_submodule(blocks.container)
            for name in blocks.names:
                self._hook(parent.get_submodule(name).register_forward_hook(self._given))
        if name := last_linear(self._module):
            self._hook(self._module.get_submodule(name).register_forward_pre_hook(self._taken))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return what a call of the module gives, and its hidden states in order."""
        self.states = []
        answer = call()
        return answer, self.states

    def _hook(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _given(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def _taken(self, module: nn.Module, inputs: Any) -> None:
        self.states.append(inputs[0])


def pairs(student: int, teacher: int) -> Sequence[tuple[int, int]]:
    """Return which of the teacher's hidden states each of the student's should be like: spread evenly."""
    return [(place, (place + 1) * teacher // student - 1) for place in range(student)] if teacher else []
