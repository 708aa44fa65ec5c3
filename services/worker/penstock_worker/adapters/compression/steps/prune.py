"""Magnitude pruning: the smallest weights become 0 (torch.nn.utils.prune).

The tensors keep their shape, so neither the file nor a call on an ordinary CPU gains by it; it makes what is
stored compress better, and is what later steps and sparse hardware build on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.utils import prune

from penstock_worker.adapters.compression.layers import zeros_of
from penstock_worker.adapters.compression.steps.weights import changed_weights
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Set `amount` of the weights to 0; while they are repaired they stay 0.

    Returns:
        "zeros": which part of the weights is 0 now; "loss" of the repair.
    """
    if parameters["repair_epochs"]:
        subject.need_module("prune with repair")
    with changed_weights(subject, parameters["layers"], tools.scratch) as weights:
        pairs = [(weight.owner, weight.attribute) for weight in weights]
        if parameters["scope"] == "global":
            prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=parameters["amount"])
        else:
            for owner, attribute in pairs:
                prune.l1_unstructured(owner, attribute, amount=parameters["amount"])
        facts = tools.repair(subject, parameters, "prune")
        for owner, attribute in pairs:
            prune.remove(owner, attribute)
        return {**facts, "zeros": zeros_of(weight.tensor for weight in weights)}
