"""Depth pruning: the least important of a model's repeated blocks go, and the rest is trained to do without.

Importance by "loss": how much the loss rises without the block, one block after the other, greedily. By
"similarity": 1 - cos(what it takes, what it gives), as Men et al. 2024 have it (arXiv:2403.03853).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from penstock_worker.adapters.compression.fitting import mean_loss
from penstock_worker.adapters.compression.layers import Blocks, parameters_of, repeated_blocks
from penstock_worker.adapters.compression.structure import drop_blocks
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools
from penstock_worker.usecases.job_context import JobFailure


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Take `layers` blocks out and repair.

    Returns:
        "blocks": how many are left; "parameters": numbers over those before; "loss" of the repair.

    Raises:
        JobFailure: INVALID_RECIPE if the model has no repeated blocks, or not more than shall go.
    """
    module = subject.need_module("drop_layers")
    blocks = blocks_of(module, parameters["layers"])
    before = parameters_of(module)
    indices = _spread(len(tools.rows), parameters["rows"])
    if parameters["importance"] == "similarity":
        kept = _by_similarity(module, blocks, parameters["layers"], indices, tools)
    else:
        kept = _by_loss(module, blocks, parameters["layers"], indices, tools)
    dropped = [name for name in blocks.names if name not in kept]
    subject.changes.append(drop_blocks(module, blocks.container, dropped))
    tools.log(f"Kept the blocks {', '.join(kept)} of {', '.join(blocks.names)}.")
    facts = tools.repair(subject, parameters, "drop_layers")
    return {**facts, "blocks": float(len(kept)), "parameters": parameters_of(module) / before}


def blocks_of(module: nn.Module, dropped: int) -> Blocks:
    """Return the model's blocks.

    Raises:
        JobFailure: INVALID_RECIPE if there are not more than shall go.
    """
    blocks = repeated_blocks(module)
    if blocks is None:
        raise JobFailure(
            "The model has no repeated blocks, so no layers can be dropped; take prune_channels or low_rank.",
            "INVALID_RECIPE",
        )
    if dropped >= len(blocks.names):
        raise JobFailure(
            f"The model has {len(blocks.names)} blocks; {dropped} cannot be dropped: one must stay.",
            "INVALID_RECIPE",
        )
    return blocks


def _spread(rows: int, wanted: int) -> torch.Tensor:
    return torch.linspace(0, rows - 1, min(rows, wanted)).round().long()


def _by_loss(
    module: nn.Module, blocks: Blocks, dropped: int, indices: torch.Tensor, tools: Tools
) -> list[str]:
    kept = list(blocks.names)
    for _ in range(dropped):
        losses = {name: _loss_without(module, blocks, [*kept], name, indices, tools) for name in kept}
        kept.remove(min(losses, key=lambda name: losses[name]))
    return kept


def _loss_without(
    module: nn.Module, blocks: Blocks, kept: Sequence[str], name: str, indices: torch.Tensor, tools: Tools
) -> float:
    parent = module.get_submodule(blocks.container)
    original = parent._modules
    gone = {child for child in blocks.names if child == name or child not in kept}
    try:
        parent._modules = {child: part for child, part in original.items() if child not in gone}
        return mean_loss(module, tools.rows, indices, tools.loss)
    finally:
        parent._modules = original


def _by_similarity(
    module: nn.Module, blocks: Blocks, dropped: int, indices: torch.Tensor, tools: Tools
) -> list[str]:
    turned: dict[str, float] = {}
    parent = module.get_submodule(blocks.container)

    def hook(name: str) -> Any:
        def see(_: nn.Module, inputs: Any, output: Any) -> None:
            taken, given = inputs[0], output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(taken.float(), given.float(), dim=-1)
            turned[name] = turned.get(name, 0.0) + 1.0 - float(cosine.mean())

        return see

    handles = [parent.get_submodule(name).register_forward_hook(hook(name)) for name in blocks.names]
    try:
        mean_loss(module, tools.rows, indices, tools.loss)
    finally:
        for handle in handles:
            handle.remove()
    gone = sorted(blocks.names, key=lambda name: turned[name])[:dropped]
    return [name for name in blocks.names if name not in gone]
