"""2:4 sparsity: of any four weights behind one another in a row, the two smallest become 0.

NVIDIA GPUs from Ampere on multiply such matrices at twice the rate (Mishra et al. 2021, arXiv:2104.08378).
CPUs gain nothing by it, and the file does not get smaller: the tensors keep their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils import prune

from penstock_worker.adapters.compression.layers import zeros_of
from penstock_worker.adapters.compression.steps.weights import changed_weights
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools

_GROUP, _KEPT = 4, 2


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Set two of four weights to 0 in all layers whose rows are a multiple of four.

    Returns:
        "zeros": which part of the weights is 0 now; "loss" of the repair.
    """
    if parameters["repair_epochs"]:
        subject.need_module("prune_2_4 with repair")
    with changed_weights(subject, parameters["layers"], tools.scratch) as weights:
        fitting = [weight for weight in weights if weight.tensor[0].numel() % _GROUP == 0]
        for weight in fitting:
            prune.custom_from_mask(weight.owner, weight.attribute, mask_2_4(weight.tensor))
        facts = tools.repair(subject, parameters, "prune_2_4")
        for weight in fitting:
            prune.remove(weight.owner, weight.attribute)
        tools.log(
            f"2:4 sparsity in {len(fitting)} of {len(weights)} layers. NVIDIA GPUs from Ampere on use it; "
            "on a CPU it changes neither speed nor size."
        )
        return {**facts, "zeros": zeros_of(weight.tensor for weight in weights)}


def mask_2_4(weight: torch.Tensor) -> torch.Tensor:
    """Return 1 for the two largest magnitudes of each four along a row, 0 for the others.

    Args:
        weight: [out, …]; the numbers of one output are a multiple of four.
    """
    groups = weight.detach().abs().reshape(-1, _GROUP)
    kept = groups.topk(_KEPT, dim=1).indices
    return torch.zeros_like(groups).scatter_(1, kept, 1.0).reshape(weight.shape)
