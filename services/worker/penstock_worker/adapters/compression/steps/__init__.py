"""The steps of a compression, one file each: each changes a subject and says in numbers what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock_worker.adapters.compression.steps import (
    clip,
    distill,
    drop_layers,
    low_rank,
    prune,
    prune_2_4,
    prune_channels,
    quantize,
)
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools

StepFunction = Callable[[Subject, Mapping[str, Any], Tools], Facts]

STEPS: Mapping[str, StepFunction] = {
    "clip": clip.apply,
    "prune": prune.apply,
    "prune_channels": prune_channels.apply,
    "prune_2_4": prune_2_4.apply,
    "quantize": quantize.apply,
    "distill": distill.apply,
    "drop_layers": drop_layers.apply,
    "low_rank": low_rank.apply,
}
"""By the names that `penstock_kit.jobs.compress` knows."""
