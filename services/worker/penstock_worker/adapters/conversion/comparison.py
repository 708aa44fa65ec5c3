"""Whether two versions answer alike.

The difference of a row is the largest |a - b| of an output over the largest number of the row in both: a
logit of 0.0001 beside one of 10 may differ by more than itself without anybody noticing. Answers that are not
numbers (classes, texts, integers) must be equal, unless the scores of the row say that two classes are as
good as one another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from penstock_kit.oip import BFLOAT16, Array
from penstock_worker.adapters.measuring.loading import OpenedVersion
from penstock_worker.domain.runtime import Batch
from penstock_worker.usecases.job_context import JobFailure

# Rows that are so much smaller than the largest of their batch are compared with that instead.
_FLOOR = 1e-6
_ROWS_AT_ONCE = 64
# Numbers of a row that a message shows.
_SHOWN = 4

Inputs = Callable[[int, int], Batch]


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """How far the answers are apart at most.

    Attributes:
        rows: How many were compared.
        difference: The largest, relative; inf for an answer that is another one.
        output: Where.
        row: In which row, from 0.
        source: What the source gave there, for people.
        result: What the result gave.
    """

    rows: int = 0
    difference: float = 0.0
    output: str = ""
    row: int = 0
    source: str = ""
    result: str = ""


def compare(
    source: OpenedVersion,
    result: OpenedVersion,
    inputs: Inputs,
    rows: int,
    *,
    tolerance: float,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Ask both the same rows: one alone, then as many as a call takes.

    Args:
        source: What was converted.
        result: What came out.
        inputs: Gives so many rows, from a row on.
        rows: How many are compared.
        tolerance: What may be the difference of two classes that are as good as one another.
        progress: Called with the rows done and all of them; may raise to end it.

    Raises:
        JobFailure: NUMERICS: shapes of answers differ.
        ModelError: One of them raised an error.
    """
    worst = Comparison()
    at = 0
    while at < rows:
        most = min(_ROWS_AT_ONCE, source.max_rows) if source.batched else 1
        count = 1 if at == 0 else min(most, rows - at)
        asked = inputs(count, at)
        source.take_turn()
        given = source.predict(asked)
        result.take_turn()
        found = result.predict(asked)
        here = _worst(given, found, count, at, tolerance)
        if here.difference > worst.difference or math.isnan(here.difference):
            worst = here
        at += count
        progress(at, rows)
    return dataclasses.replace(worst, rows=rows)


def require_alike(comparison: Comparison, tolerance: float, what: str) -> None:
    """Return if the answers are within the tolerance.

    Raises:
        JobFailure: NUMERICS, with the worst row and both answers.
    """
    if comparison.difference <= tolerance:
        return
    far = (
        "another answer"
        if math.isinf(comparison.difference)
        else f"a relative difference of {comparison.difference:.3g}, more than {tolerance:g}"
    )
    raise JobFailure(
        f"{what} does not answer as its source: row {comparison.row} of {comparison.rows} has {far} in "
        f"{comparison.output}: {comparison.source} became {comparison.result}.",
        "NUMERICS",
    )


def _worst(given: Batch, found: Batch, rows: int, start: int, tolerance: float) -> Comparison:
    worst = Comparison()
    ties = _ties(given, rows, tolerance)
    for name, wanted in given.items():
        got = found[name]
        if wanted.shape != got.shape:
            raise JobFailure(
                f"The output {name} has the shape {list(got.shape)} where the source gives "
                f"{list(wanted.shape)}.",
                "NUMERICS",
            )
        a, b = _rows(wanted, rows), _rows(got, rows)
        if _is_float(a):
            differences = _relative(a.astype(np.float64), b.astype(np.float64))
        else:
            differences = np.where((a != b).any(axis=1) & ~ties, math.inf, 0.0)
        row = int(differences.argmax()) if len(differences) else 0
        if len(differences) and differences[row] > worst.difference:
            worst = Comparison(0, float(differences[row]), name, start + row, _show(a[row]), _show(b[row]))
    return worst


def _rows(array: Array, rows: int) -> Array:
    return array.reshape(rows, -1) if array.ndim and len(array) == rows else array.reshape(1, -1)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype == BFLOAT16


def _relative(a: Array, b: Array) -> Array:
    """Return the difference of each row; inf where one is finite and the other is not."""
    if not a.shape[1]:
        return np.zeros(len(a))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    sizes = np.where(finite, np.maximum(np.abs(a), np.abs(b)), 0.0).max(axis=1)
    sizes = np.maximum(sizes, sizes.max() * _FLOOR)
    apart = np.where(finite, np.abs(np.where(finite, a, 0.0) - np.where(finite, b, 0.0)), math.inf)
    apart = np.where(same, 0.0, apart).max(axis=1)
    found: Array = np.divide(apart, sizes, out=np.where(apart > 0, math.inf, 0.0), where=sizes > 0)
    return found


def _ties(given: Batch, rows: int, tolerance: float) -> Array:
    """Return in which rows the two best scores of the source are as good as one another."""
    ties = np.zeros(rows, dtype=bool)
    for array in given.values():
        if _is_float(array) and array.ndim == 2 and len(array) == rows and array.shape[1] > 1:
            scores = np.sort(array.astype(np.float64), axis=1)
            gap = scores[:, -1] - scores[:, -2]
            ties |= gap <= 2 * tolerance * np.abs(scores).max(axis=1)
    return ties


def _show(row: Array) -> str:
    values = [value.item() if hasattr(value, "item") else value for value in row[:_SHOWN]]
    texts = [f"{value:.6g}" if isinstance(value, float) else repr(value) for value in values]
    return f"[{', '.join(texts)}{', …' if len(row) > _SHOWN else ''}]"
