"""Structured pruning: whole channels and hidden units go, and the tensors around them become smaller.

torch-pruning follows what depends on a channel (the next layer's inputs, normalization). Taken from are
layers whose channels nothing else counts on: not the answer itself, not the stream that residual
connections add to, not the heads of an attention. Which those are is found by trying each layer on a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from penstock_worker.adapters.compression.layers import choose, layers, parameters_of
from penstock_worker.adapters.compression.structure import copy_of
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools
from penstock_worker.usecases.job_context import JobFailure

# Layers below modules whose class is called so hold the heads of an attention.
_ATTENTION = "attention"


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Take `amount` of the channels out of the layers that allow it, and repair.

    Returns:
        "layers": how many were taken from; "parameters": numbers over those before; "loss" of the repair.

    Raises:
        JobFailure: UNSUPPORTED if no layer allows it.
    """
    module = subject.need_module("prune_channels")
    before = parameters_of(module)
    example = tools.example()
    free = free_layers(module, example)
    if not free:
        raise JobFailure(
            "No channels can be taken out without breaking what follows; take low_rank or drop_layers.",
            "UNSUPPORTED",
        )
    chosen = set(choose(free, parameters["layers"]))
    _prune(module, chosen, parameters, tools)
    subject.changes.append({"change": "shapes"})
    facts = tools.repair(subject, parameters, "prune_channels")
    return {**facts, "layers": float(len(chosen)), "parameters": parameters_of(module) / before}


def free_layers(module: nn.Module, example: torch.Tensor) -> list[str]:
    """Return the names of layers whose channels can be taken out, by trying each on a copy.

    Args:
        module: The model; it is left alone.
        example: Its input, a few rows.
    """
    module.eval()
    with torch.no_grad():
        shape = module(example).shape
    return [
        name
        for name in layers(module)
        if not _in_attention(module, name) and _survives(module, name, example, shape)
    ]


def _in_attention(module: nn.Module, name: str) -> bool:
    parents = [name[:at] for at, letter in enumerate(name) if letter == "."]
    return any(_ATTENTION in type(module.get_submodule(parent)).__name__.lower() for parent in parents)


def _survives(module: nn.Module, name: str, example: torch.Tensor, shape: torch.Size) -> bool:
    """Whether a copy still answers in its shape without a channel, and nothing but layers is hit."""
    trial = copy_of(module)
    layer = trial.get_submodule(name)
    if _channels(layer) < 2:
        return False
    try:
        graph = _dependencies(trial, example)
        group = graph.get_pruning_group(layer, _pruner(layer), idxs=[0])
        # Whatever hangs together with an embedding or a parameter of its own is the residual stream.
        hit = {type(item.dep.target.module) for item in group}
        if hit & {nn.Embedding, nn.LayerNorm, nn.Parameter, nn.MultiheadAttention}:
            return False
        if not graph.check_pruning_group(group):
            return False
        group.prune()
        with torch.no_grad():
            return bool(trial(example).shape == shape)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError):
        return False  # it cannot be followed, or breaks what comes behind it


def _prune(module: nn.Module, chosen: set[str], parameters: Mapping[str, Any], tools: Tools) -> None:
    import torch_pruning

    ignored = [part for name, part in layers(module).items() if name not in chosen]
    ignored += [part for part in module.modules() if isinstance(part, nn.MultiheadAttention | nn.Embedding)]
    kind = parameters["importance"]
    if kind == "taylor":
        importance = torch_pruning.importance.GroupTaylorImportance()
        _gradients(module, tools)
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=1 if kind == "l1" else 2)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            module,
            tools.example(),
            importance,
            pruning_ratio=parameters["amount"],
            global_pruning=parameters["scope"] == "global",
            # A layer that loses nearly all of itself is a bottleneck that no repair widens again.
            max_pruning_ratio=0.95,
            ignored_layers=ignored,
            round_to=parameters["round_to"] if parameters["round_to"] > 1 else None,
        )
        pruner.step()
    module.zero_grad(set_to_none=True)


def _gradients(module: nn.Module, tools: Tools) -> None:
    inputs, targets = tools.rows.batch(torch.arange(min(256, len(tools.rows))))
    module.zero_grad(set_to_none=True)
    tools.loss(module(inputs), targets).backward()


def _dependencies(module: nn.Module, example: torch.Tensor) -> Any:
    import torch_pruning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)


def _pruner(layer: nn.Module) -> Any:
    import torch_pruning

    if isinstance(layer, nn.Linear):
        return torch_pruning.prune_linear_out_channels
    return torch_pruning.prune_conv_out_channels


def _channels(layer: nn.Module) -> int:
    weight: torch.Tensor = layer.weight
    return int(weight.shape[0])
