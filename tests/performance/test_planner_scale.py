"""The planner at full size, and a thousand small clusters that live through faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from performance.simulation import many
from performance.simulation.cluster import Size

pytestmark = [pytest.mark.performance, pytest.mark.timeout(600)]

TESTS = Path(__file__).parents[1]
BURST_SECONDS = 10.0
STEADY_SECONDS = 1.0
PEAK_GIB = 4.0
SEEDS = 1000
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
