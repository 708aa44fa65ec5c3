"""Whether two answers to one request agree: that of the version in use, and that of its shadow.

Fractions agree if they differ by no more than a part of the larger, element by element, NaN with NaN and an
infinity with itself; integers, booleans and bytes if they are equal. Names, datatypes and shapes must be the
same, their order need not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Elements compared at once: what is made of them stays in the processor's cache, and others get their turn.
_CHUNK = 65_536
FRACTIONS = frozenset({"FP16", "BF16", "FP32", "FP64"})


class Output(NamedTuple):
    """One output of an answer. `values` is an array, or lists of lists as JSON has them."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Any


def same_outputs(first: Iterable[Output], second: Iterable[Output], tolerance: float) -> bool:
    """Return whether two answers agree.

    Args:
        first: Outputs of one answer.
        second: Outputs of the other.
        tolerance: How far fractions may differ, relative to the larger.
    """
    ours, theirs = sorted(first, key=_name), sorted(second, key=_name)
    if [one[:3] for one in ours] != [one[:3] for one in theirs]:
        return False
    return all(
        _same_values(a.values, b.values, tolerance, a.datatype) for a, b in zip(ours, theirs, strict=True)
    )


def _name(output: Output) -> str:
    return output.name


def _same_values(first: Any, second: Any, tolerance: float, datatype: str) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return same_arrays(first, second, tolerance)
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return False  # the same request is answered in the same form
    return same_trees(first, second, tolerance, fractions=datatype in FRACTIONS)


def same_arrays(first: Array, second: Array, tolerance: float) -> bool:
    """Return whether two arrays agree; the tolerance is for fractions only."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    ours, theirs = first.reshape(-1), second.reshape(-1)
    for start in range(0, ours.size, _CHUNK):
        x, y = ours[start : start + _CHUNK], theirs[start : start + _CHUNK]
        if first.dtype.kind == "f":
            if not _close(x, y, tolerance):
                return False
        elif not np.array_equal(x, y):
            return False
    return True


def _close(x: Array, y: Array, tolerance: float) -> bool:
    equal = (x == y) | (np.isnan(x) & np.isnan(y))
    if equal.all():
        return True
    # In double precision: the difference of two numbers of theirs may not be one of theirs.
    a, b = x[~equal].astype(np.float64), y[~equal].astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return False
    with np.errstate(over="ignore"):
        return bool((np.abs(a - b) <= tolerance * np.maximum(np.abs(a), np.abs(b))).all())


def same_trees(first: Any, second: Any, tolerance: float, *, fractions: bool = False) -> bool:
    """Return whether two JSON values agree.

    Args:
        first: One.
        second: The other.
        tolerance: How far fractions may differ, relative to the larger.
        fractions: Whether numbers without a point are fractions too. Otherwise two of them must be equal.
    """
    left = [(first, second)]
    while left:  # not by recursion: who nests deeply must not get further than the parser lets him
        a, b = left.pop()
        if isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            if set(map(type, a)) | set(map(type, b)) == {float}:  # nearly all there is, ten times as fast so
                if not _close(np.array(a), np.array(b), tolerance):
                    return False
                continue
            left += zip(a, b, strict=True)
        elif isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            left += [(a[key], b[key]) for key in a]
        elif _is_number(a) and _is_number(b):
            exact = isinstance(a, int) and isinstance(b, int) and not fractions
            if a != b and (exact or not _near(a, b, tolerance)):
                return False
        elif type(a) is not type(b) or a != b:
            return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _near(a: float, b: float, tolerance: float) -> bool:
    try:
        a, b = float(a), float(b)
    except OverflowError:  # an integer that no double can hold
        return False
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= tolerance * max(abs(a), abs(b))
