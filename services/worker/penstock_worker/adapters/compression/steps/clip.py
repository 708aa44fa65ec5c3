"""Weight clipping: magnitudes beyond a bound become the bound.

A few outliers stretch the range that a quantization has to cover with 256 values; without them the others are
told apart better. Alone it changes neither size nor speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from penstock_worker.adapters.compression.steps.weights import changed_weights
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools


def apply(subject: Subject, parameters: Mapping[str, Any], tools: Tools) -> Facts:
    """Clip each weight tensor at `absolute`, or at its own `percentile` of magnitudes.

    Returns:
        "clipped": which part of the weights was beyond its bound.
    """
    beyond, total = 0, 0
    with changed_weights(subject, parameters["layers"], tools.scratch) as weights, torch.no_grad():
        for weight in weights:
            tensor = weight.tensor
            bound = parameters["absolute"] or _percentile(tensor, parameters["percentile"])
            beyond += int((tensor.abs() > bound).sum())
            total += tensor.numel()
            tensor.clamp_(-bound, bound)
    return {"clipped": beyond / max(1, total)}


def _percentile(tensor: torch.Tensor, percent: float) -> float:
    """Return the magnitude that `percent` of all do not exceed (torch.quantile has a limit of 2²⁴)."""
    place = max(1, math.ceil(tensor.numel() * percent / 100))
    return float(tensor.detach().abs().flatten().kthvalue(place).values)
