"""Small clusters live through faults, and no rule is broken; `make bench-scheduler` has more of them."""

from __future__ import annotations

import pytest

from performance.simulation import many
from performance.simulation.cluster import Size

SEEDS = 32


@pytest.mark.parametrize("first", range(0, SEEDS, 8))
def test_clusters_keep_every_rule_through_faults_and_settle_after_them(first: int, seed: int) -> None:
    lives = many.run(range(seed + first, seed + first + 8), Size(), 1, print)
    assert not lives.breaches
    # They lived: places were given, and things went wrong.
    assert lives.tally.placed > 100
    assert lives.tally.faults > 100
