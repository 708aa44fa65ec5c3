"""What a module consists of, as far as steps ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from penstock_worker.usecases.job_context import JobFailure

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Blocks:
    """Layers of one kind behind one another, any of which a model can do without.

    Attributes:
        container: Name of the module whose children they are; "" is the model itself.
        names: Names of the children, in order.
    """

    container: str
    names: tuple[str, ...]


def layers(module: nn.Module, chosen: Sequence[str] = ()) -> dict[str, Layer]:
    """Return linear and convolutional layers by name.

    Args:
        module: The model.
        chosen: Only those of these names or below them; empty means all.

    Raises:
        JobFailure: INVALID_RECIPE if nothing is of a chosen name.
    """
    found: dict[str, Layer] = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    return {name: found[name] for name in choose(found, chosen)}


def choose(names: Iterable[str], chosen: Sequence[str]) -> list[str]:
    """Return those of the names that were chosen, or that lie below one that was; all if none was."""
    names = list(names)
    if not chosen:
        return names
    for wanted in chosen:
        if not any(_below(name, wanted) for name in names):
            raise JobFailure(
                f"No layer that the step can change is called {wanted!r}; there are {', '.join(names[:50])}.",
                "INVALID_RECIPE",
            )
    return [name for name in names if any(_below(name, wanted) for wanted in chosen)]


def _below(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}.")


def repeated_blocks(module: nn.Module) -> Blocks | None:
    """Return the longest run of children of one class and shape, or None if there is no such run.

    Single layers (linear, convolution, activation) are no blocks: what they take is seldom what they give.
    """
    best: Blocks | None = None
    for name, part in module.named_modules():
        run: list[str] = []
        last: tuple[object, ...] | None = None
        for child_name, child in part.named_children():
            kind = _shape(child)
            run = [*run, child_name] if kind is not None and kind == last else [child_name] if kind else []
            last = kind
            if len(run) >= 2 and (best is None or len(run) > len(best.names)):
                best = Blocks(name, tuple(run))
    return best


def _shape(block: nn.Module) -> tuple[object, ...] | None:
    """Return what blocks of one kind have in common; None for what is no block."""
    if not any(True for _ in block.children()):
        return None
    shapes = tuple((name, tuple(value.shape)) for name, value in block.named_parameters())
    return (type(block), shapes) if shapes else None


def last_linear(module: nn.Module) -> str:
    """Return the name of the last linear layer: what makes the answer of most models; "" if there is none."""
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return names[-1] if names else ""


def parameters_of(module: nn.Module) -> int:
    """Return how many numbers a module has learnt."""
    return sum(parameter.numel() for parameter in module.parameters())


def zeros_of(tensors: Iterable[torch.Tensor]) -> float:
    """Return which part of all numbers is 0."""
    counted = [(int((tensor == 0).sum()), int(tensor.numel())) for tensor in tensors]
    zeros, total = sum(zeros for zeros, _ in counted), sum(size for _, size in counted)
    return zeros / total if total else 0.0
