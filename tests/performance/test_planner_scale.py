"""The planner at full size, and a thousand small clusters that live through faults."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from performance.simulation import many, packing
from performance.simulation.cluster import Size

pytestmark = [pytest.mark.performance, pytest.mark.timeout(600)]

TESTS = Path(__file__).parents[1]
BURST_SECONDS = 10.0
STEADY_SECONDS = 1.0
PEAK_GIB = 4.0
SEEDS = 1000
CASES = 20
BELOW_OPTIMUM = 0.05
MEASURE = """
from performance.simulation.scale import Size, measure
figures = measure(Size(), 1, lambda line: print(line, flush=True))
print("figures", figures.burst_placed, figures.burst_seconds, figures.steady_seconds, figures.peak_gib)
"""


def test_ten_thousand_nodes_take_a_burst_and_stay_settled() -> None:
    # In a process of its own: the peak of memory is of the whole process.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    *_, figures = done.stdout.splitlines()
    placed, burst, steady, peak = map(float, figures.split()[1:])
    assert placed == 10_000
    assert burst < BURST_SECONDS
    assert steady < STEADY_SECONDS
    assert peak < PEAK_GIB


def test_a_thousand_clusters_break_no_rule(seed: int) -> None:
    lives = many.run(range(seed, seed + SEEDS), Size(), len(os.sched_getaffinity(0)), print)
    print(lives)
    assert not lives.breaches


def test_a_burst_fills_gpus_nearly_as_well_as_the_best_of_all_schedules() -> None:
    fills = packing.report(range(CASES), (0.8, 1.0, 1.3), print)
    below = [packing.shortfall(fill.at_once, fill.optimum) for fill in fills]
    first_fit = [packing.shortfall(fill.first_fit, fill.optimum) for fill in fills]
    assert statistics.mean(below) < BELOW_OPTIMUM
    assert statistics.mean(below) < statistics.mean(first_fit)
