"""How fast versions are, by rows in one call.

A machine is noisy: other processes, clocks that change, caches that are cold. So versions are timed in turns
of some hundredths of a second, in an order that is turned round each time, and compared turn by turn: what
slows down one of two neighbouring turns slows down the other. What is reported is the median over turns, with
the spread beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from penstock_kit.oip import Array
from penstock_worker.adapters.measuring.loading import OpenedVersion
from penstock_worker.adapters.measuring.quality import Progress, unheard

# Warm-up of each size: caches, lazy initialization, oneDNN's primitives.
_WARM_CALLS, _WARM_SECONDS = 3, 0.1
# A turn is so long, at least one call, and there are at least so many of them.
_TURN_SECONDS, _LEAST_TURNS = 0.04, 5

Inputs = Callable[[OpenedVersion, int], dict[str, Array]]


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Calls of one version with so many rows.

    Attributes:
        batch_size: Rows in a call.
        p50_seconds: Median of a call.
        p99_seconds: 99th percentile.
        rows_per_second: Median over turns of the rows a second.
        spread: Width of the middle half of the turns' rows a second, over their median: 0.02 is a quiet
            machine, 0.3 one whose figures mean little.
        calls: How many were measured.
    """

    batch_size: int
    p50_seconds: float
    p99_seconds: float
    rows_per_second: float
    spread: float
    calls: int


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Rows a second of one version over those of the first, in neighbouring turns.

    Attributes:
        batch_size: Rows in a call.
        ratio: Median over turns.
        low: A quarter of the turns had less.
        high: A quarter of the turns had more.
    """

    batch_size: int
    ratio: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """All that was measured.

    Attributes:
        speeds: For each version, by rising batch size.
        comparisons: For each version but the first, by rising batch size.
    """

    speeds: tuple[tuple[Speed, ...], ...]
    comparisons: tuple[tuple[Comparison, ...], ...]

    def best_ratio(self, version: int) -> float:
        """Return the highest throughput of a version over the highest of the first one.

        Each at the batch size that it likes best: what a replica under load can do.

        Args:
            version: Its place among the versions, from 1.
        """
        best = [max(speed.rows_per_second for speed in speeds) for speeds in self.speeds]
        return best[version] / best[0]


def measure_speed(
    versions: Sequence[OpenedVersion],
    batch_sizes: Sequence[int],
    inputs: Inputs,
    *,
    seconds: float = 2.0,
    progress: Progress = unheard,
) -> Measurement:
    """Time versions in turns.

    Args:
        versions: At least one; the others are compared with the first.
        batch_sizes: Rows in a call; those that a version does not take in one call are measured as its
            replicas compute them, in several.
        inputs: Gives the inputs of a version with so many rows.
        seconds: How long each version is measured at each size.
        progress: Called with the sizes done and all of them, also between turns; may raise to end it.

    Raises:
        ModelError: A model raised an error.
    """
    sizes = sorted(set(batch_sizes))
    speeds: list[list[Speed]] = [[] for _ in versions]
    comparisons: list[list[Comparison]] = [[] for _ in versions[1:]]
    for index, size in enumerate(sizes):
        questions = [inputs(version, size) for version in versions]
        times = _turns(versions, questions, seconds, functools.partial(progress, index, len(sizes)))
        rates = [[size * len(turn) / sum(turn) for turn in turns] for turns in times]
        for found, turns, rate in zip(speeds, times, rates, strict=True):
            found.append(_speed(size, turns, rate))
        for compared, rate in zip(comparisons, rates[1:], strict=True):
            ratios = [one / base for one, base in zip(rate, rates[0], strict=True)]
            low, middle, high = _quartiles(ratios)
            compared.append(Comparison(size, middle, low, high))
        progress(index + 1, len(sizes))
    return Measurement(
        tuple(tuple(found) for found in speeds), tuple(tuple(compared) for compared in comparisons)
    )


def _turns(
    versions: Sequence[OpenedVersion],
    questions: Sequence[dict[str, Array]],
    seconds: float,
    between: Callable[[], None],
) -> list[list[list[float]]]:
    """Return the seconds of each call, of each turn, of each version."""
    for version, question in zip(versions, questions, strict=True):
        version.take_turn()
        start = time.perf_counter()
        for call in range(1000):
            version.predict(question)
            if call + 1 >= _WARM_CALLS and time.perf_counter() - start >= _WARM_SECONDS:
                break
    times: list[list[list[float]]] = [[] for _ in versions]
    spent = [0.0] * len(versions)
    turn = 0
    while turn < _LEAST_TURNS or min(spent) < seconds:
        order = range(len(versions)) if turn % 2 == 0 else range(len(versions) - 1, -1, -1)
        for place in order:
            version, question = versions[place], questions[place]
            version.take_turn()
            calls: list[float] = []
            taken = 0.0
            while taken < _TURN_SECONDS:
                start = time.perf_counter()
                version.predict(question)
                calls.append(time.perf_counter() - start)
                taken += calls[-1]
            times[place].append(calls)
            spent[place] += taken
        between()
        turn += 1
    return times


def _speed(size: int, turns: Sequence[Sequence[float]], rates: Sequence[float]) -> Speed:
    calls = np.array([seconds for turn in turns for seconds in turn])
    low, middle, high = _quartiles(rates)
    return Speed(
        batch_size=size,
        p50_seconds=float(np.median(calls)),
        p99_seconds=float(np.percentile(calls, 99)),
        rows_per_second=middle,
        spread=(high - low) / middle,
        calls=len(calls),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
