"""Which combinations of compression steps are worth trying, and in which order. Pure.

A candidate is a *body* (steps that take a model apart and repair it; perhaps none) and a *finish* (a
quantization; perhaps none). Finishes cost seconds, bodies minutes: so all finishes are tried on the source
first, and bodies are then judged with the best two. Bodies run through rungs as in successive halving
(Jamieson & Talwalkar 2016): in each rung the better part goes on, with more epochs of repair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Steps = tuple[tuple[str, Mapping[str, Any]], ...]
"""Names of steps with those parameters that are not at their defaults."""

# Steps of repair that a body gets in each rung, if there is time, and epochs at most: beyond, a small
# dataset has nothing new to say.
RUNG_STEPS = (150, 600, 1500)
RUNG_EPOCHS_MOST = (4.0, 12.0, 30.0)
# Part of the search's time that all repairs of a rung may take together.
RUNG_SHARES = (0.25, 0.2, 0.2)
LAST_RUNG = len(RUNG_STEPS) - 1
# Learning rate of repairs: they begin with weights that are good already.
RATE = 0.0005
# Part of the bodies that goes on to the next rung.
KEPT = 1 / 3
# A repair that is not over yet may still lose so many times the loss that is allowed in the end.
PATIENCE = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What there is in a model to take away.

    Attributes:
        trainable: It can be taken apart and trained.
        convolutions: Convolutional layers.
        linears: Linear layers.
        free_layers: Layers whose channels can be taken out.
        blocks: Repeated blocks; 0 or 1 if there are none to drop.
    """

    trainable: bool
    convolutions: int
    linears: int
    free_layers: int
    blocks: int


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """Steps before a quantization, with the repair of the first rung.

    Attributes:
        name: For people, and the key of what is known of it.
        steps: Those of the first rung.
        prior: What it is worth without being measured: bodies with more come first.
    """

    name: str
    steps: Steps
    prior: float = 0.0


def pace(rows: int, batch_size: int, step_seconds: float, seconds: float, count: int) -> tuple[float, ...]:
    """Return the epochs of repair that a body gets in each rung.

    Args:
        rows: To learn from.
        batch_size: Rows of a step.
        step_seconds: How long a step takes.
        seconds: The time of the whole search.
        count: Bodies in the first rung.
    """
    per_epoch = max(1, math.ceil(rows / batch_size))
    found = []
    for wanted, most, share in zip(RUNG_STEPS, RUNG_EPOCHS_MOST, RUNG_SHARES, strict=True):
        in_time = share * seconds / max(1, count) / max(step_seconds, 1e-9)
        epochs = min(wanted / per_epoch, most, in_time / per_epoch)
        found.append(max(0.02, round(epochs, 2)))
        count = math.ceil(count * KEPT)
    return tuple(found)


def finishes(facts: ModelFacts) -> list[Steps]:
    """Return the quantizations that suit a model, the most promising first."""
    found: list[Steps] = []
    static = (("quantize", {"scheme": "static_int8"}),)
    dynamic = (("quantize", {"scheme": "dynamic_int8"}),)
    found = [static, dynamic] if facts.convolutions else [dynamic, static]
    if not facts.linears:
        found = [static]
    found += [
        (("quantize", {"scheme": "weight_only_int8"}),),
        (("quantize", {"scheme": "weight_only_int4"}),),
    ]
    return found


def clipped(finish: Steps) -> Steps:
    """Return a quantization behind a clipping, for a model whose outliers cost it accuracy."""
    return (("clip", {"percentile": 99.9}), *finish)


def bodies(facts: ModelFacts, epochs: float) -> list[Body]:
    """Return what may be taken away from a model, the most promising first.

    Args:
        facts: What there is.
        epochs: Of repair in the first rung; in a body of two steps each gets half of them.
    """
    if not facts.trainable:
        return []
    found: list[Body] = []
    repair = {"repair_epochs": epochs, "learning_rate": RATE}
    half_repair = {"repair_epochs": epochs / 2, "learning_rate": RATE}
    if facts.free_layers:
        for amount, prior in ((0.5, 3.0), (0.75, 2.5), (0.3, 1.5)):
            found.append(
                Body(f"channels-{amount:g}", (("prune_channels", {"amount": amount, **repair}),), prior)
            )
    if facts.blocks > 1:
        half = facts.blocks // 2
        found.append(Body(f"drop-{half}", (("drop_layers", {"layers": half, **repair}),), 2.8))
        if facts.blocks > 2:
            most = facts.blocks - 1
            found.append(Body(f"drop-{most}", (("drop_layers", {"layers": most, **repair}),), 2.2))
            if half > 1:
                found.append(Body("drop-1", (("drop_layers", {"layers": 1, **repair}),), 1.0))
        if facts.free_layers:
            steps = (
                ("drop_layers", {"layers": half, **half_repair}),
                ("prune_channels", {"amount": 0.5, **half_repair}),
            )
            found.append(Body(f"drop-{half}+channels-0.5", steps, 2.6))
        student = {"keep_layers": max(1, half), "epochs": epochs, "learning_rate": RATE}
        found.append(Body(f"distill-{max(1, half)}", (("distill", student),), 1.8))
    if facts.linears > 1:
        found.append(Body("low-rank-0.8", (("low_rank", {"energy": 0.8, **repair}),), 1.2))
    return sorted(found, key=lambda body: -body.prior)


def score(speed_up: float, size_ratio: float, metric_loss: float, max_loss: float) -> float:
    """Return what a candidate promises: what it gains, less what it loses beyond what is allowed.

    Args:
        speed_up: Throughput over the source's.
        size_ratio: Size over the source's.
        metric_loss: In the metric's unit.
        max_loss: What may be lost; each time that much beyond it costs 1, as a factor of e in speed gains.
    """
    beyond = max(0.0, metric_loss - max_loss) / max(max_loss, 1e-6)
    return math.log(max(speed_up, 1e-9)) - math.log(max(size_ratio, 1e-9)) - min(beyond, 50.0)


def survivors(scores: Mapping[str, float], rung: int) -> list[str]:
    """Return who goes on after a rung, the best first; nobody after the last.

    Args:
        scores: By body.
        rung: From 0.
    """
    if rung >= LAST_RUNG:
        return []
    count = max(1, math.ceil(len(scores) * KEPT))
    return sorted(scores, key=lambda name: -scores[name])[:count]


def allowed_loss(max_loss: float, rung: int) -> float:
    """Return what may be lost in a rung: more in early ones, whose repair goes on."""
    return max_loss * float(PATIENCE ** ((LAST_RUNG - min(rung, LAST_RUNG)) / LAST_RUNG))
