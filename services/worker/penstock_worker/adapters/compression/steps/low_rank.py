"""Low rank: a linear layer becomes two, through as many numbers as its singular values ask for.

W = U·diag(s)·Vᵀ, cut after r singular values, is the nearest matrix of rank r (Eckart and Young 1936). The
layers x → diag(√s)·Vᵀ·x and → U·diag(√s)·… + b have r·(in + out) weights instead of in·out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from penstock_worker.adapters.compression.layers import choose, parameters_of
from penstock_worker.adapters.compression.structure import split_linear
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Split those linear layers that become smaller by it, and repair.

    Returns:
        "layers": how many were split; "parameters": numbers over those before; "loss" of the repair.
    """
    module = subject.need_module("low_rank")
    before = parameters_of(module)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    ranks: dict[str, int] = {}
    for name in choose(linear, parameters["layers"]):
        rank = _split(module, name, parameters["rank"], parameters["energy"])
        if rank:
            ranks[name] = rank
    if ranks:
        subject.changes.append({"change": "low_rank", "ranks": ranks})
    else:
        tools.log("No linear layer becomes smaller at this rank.")
    facts = tools.repair(subject, parameters, "low_rank") if ranks else {}
    return {**facts, "layers": float(len(ranks)), "parameters": parameters_of(module) / before}


def _split(module: nn.Module, name: str, rank: int, energy: float) -> int:
    """Split one layer; return the rank, or 0 if that would not make it smaller."""
    layer = module.get_submodule(name)
    left, values, right = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
    rank = rank or rank_for(values, energy)
    if rank * (layer.in_features + layer.out_features) >= layer.in_features * layer.out_features:
        return 0
    pair = split_linear(module, name, rank)
    root = values[:rank].sqrt()
    first, second = pair[0], pair[1]
    with torch.no_grad():
        first.weight.copy_(root[:, None] * right[:rank])
        second.weight.copy_(left[:, :rank] * root)
        if layer.bias is not None:
            second.bias.copy_(layer.bias)
    return rank


def rank_for(values: torch.Tensor, energy: float) -> int:
    """Return the least rank whose squared singular values are `energy` of all.

    Args:
        values: Singular values, falling.
        energy: 0 < energy ≤ 1.
    """
    kept = values.double().square().cumsum(0)
    return min(len(values), int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1)
