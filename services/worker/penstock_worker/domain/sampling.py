"""Which rows are held out, and which rank sees which rows when.

All are functions of what they are given and nothing else: not of the number of ranks, the processor, or a
library's release. Rows are put in order by a keyed hash of their number (the finalizer of SplitMix64: Steele,
Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(state: int) -> int:
    """Return the SplitMix64 output for one state."""
    z = state & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _keys(rows: int, *seeds: int) -> NDArray[np.uint64]:
    """Return one pseudorandom uint64 for each row, for these seeds."""
    base = 0
    for seed in seeds:
        base = _mix(base + (seed & _MASK) * _GOLDEN + _GOLDEN)
    z = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(base)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def split(
    rows: int, held_out: float, seed: int, classes: NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to learn from and the rows held out, each rising.

    With classes, of each class the same part is held out; a class of one row is not held out, and one of two
    or more keeps a row on both sides unless `held_out` is 0.

    Args:
        rows: How many there are.
        held_out: Part of them, 0 ≤ held_out < 1.
        seed: Of the choice.
        classes: int64 [rows].
    """
    keys = _keys(rows, seed, 1)
    held = np.zeros(rows, dtype=bool)
    groups = [np.arange(rows)]
    if classes is not None:
        order = np.argsort(classes, kind="stable")
        borders = np.flatnonzero(np.diff(classes[order])) + 1
        groups = np.split(order, borders)
    for group in groups:
        count = round(len(group) * held_out)
        if held_out > 0 and len(group) > 1:
            count = min(max(count, 1), len(group) - 1)
        elif len(group) == 1:
            count = 0
        chosen = group[np.argsort(keys[group], kind="stable")[:count]]
        held[chosen] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def epoch_order(rows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """Return 0 … rows−1 in the order of an epoch."""
    return np.argsort(_keys(rows, seed, 2, epoch), kind="stable").astype(np.int64)


def rank_batches(
    order: NDArray[np.int64], batch_size: int, rank: int, world_size: int, *, first_step: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Yield what one rank takes of each step of an epoch.

    A step is on the same `batch_size` rows whatever the number of ranks: each takes an even, consecutive
    part of them. The last step may have fewer rows; a rank may then have none.

    Args:
        order: The epoch's, of all ranks.
        batch_size: Rows of a step, of all ranks together.
        rank: Which this is.
        world_size: How many there are.
        first_step: Where to go on.
    """
    for start in range(first_step * batch_size, len(order), batch_size):
        step = order[start : start + batch_size]
        low = len(step) * rank // world_size
        high = len(step) * (rank + 1) // world_size
        yield step[low:high]
