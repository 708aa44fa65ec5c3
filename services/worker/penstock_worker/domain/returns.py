"""When requests come, seen from the last answer.

Callers that were answered together tend to come back together: within a millisecond or two, all of them.
Callers who do not wait for answers come at any time. Both are learnt as one curve: of so many rows answered,
how many have come after so many seconds, as a share of them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

EDGES: Sequence[float] = tuple(0.00025 * 2 ** (step / 2) for step in range(22))
"""Seconds after an answer at which arrivals are counted: 0.25 ms to 0.36 s."""
# Of a new observation in the running averages.
_WEIGHT = 0.03


class Returns:
    """Learns the curve. Times are seconds on one clock. Not for several threads."""

    def __init__(self) -> None:
        self.answered_at = float("-inf")
        """When the last answers went out."""
        self.answered_rows = 0
        """Their rows."""
        self.arrived_rows = 0
        """Rows that have come since."""
        self._counts = [0] * len(EDGES)
        # At each edge, rows arrived by then and rows answered, as running averages: their ratio is what is
        # learnt. An average of ratios would give small batches the weight of large ones.
        self._arrived = [0.0] * len(EDGES)
        self._answered = [0.0] * len(EDGES)
        self._seen = [0] * len(EDGES)
        # Usual time from one answer to the next.
        self._usual = 0.0
        # The answers before: when, and with which weight each edge was learnt from them.
        self._before: tuple[float, list[float]] = (float("-inf"), [])

    def answered(self, now: float, rows: int) -> None:
        """Say that so many rows were answered just now."""
        if self.answered_rows:
            self._learn(now)
        self.answered_at = now
        self.answered_rows = rows
        self.arrived_rows = 0
        self._counts = [0] * len(EDGES)

    def arrived(self, at: float, rows: int) -> None:
        """Say that so many rows came, at a time that may have passed already."""
        if at < self.answered_at:
            before, weights = self._before
            for edge in range(bisect.bisect_left(EDGES, at - before), len(weights)):
                self._arrived[edge] += weights[edge] * rows
            return
        self.arrived_rows += rows
        edge = bisect.bisect_left(EDGES, at - self.answered_at)
        if edge < len(EDGES):
            self._counts[edge] += rows

    def share(self, seconds: float) -> float:
        """Return how many rows have usually come so long after an answer, per row answered.

        What is not known, because the next answer usually comes earlier, is taken to be as before it.
        """
        if seconds <= 0:
            return 0.0
        edge = bisect.bisect_left(EDGES, seconds)
        if edge >= len(EDGES) or not self._seen[edge]:
            return self._at(max((known for known, seen in enumerate(self._seen) if seen), default=-1))
        low = self._at(edge - 1)
        below = EDGES[edge - 1] if edge else 0.0
        return low + (max(low, self._at(edge)) - low) * (seconds - below) / (EDGES[edge] - below)

    def when(self, share: float) -> float:
        """Return after how many seconds so many rows have usually come, per row answered, or infinity."""
        if share <= 0:
            return 0.0
        low, below = 0.0, 0.0
        for edge, limit in enumerate(EDGES):
            if not self._seen[edge]:
                break
            high = max(low, self._at(edge))
            if high >= share:
                return below + (limit - below) * (share - low) / (high - low)
            low, below = high, limit
        return math.inf

    def rate(self) -> float:
        """Return how many rows come in a second, per row answered, between one answer and the next."""
        return self.share(self._usual) / self._usual if self._usual else 0.0

    def _at(self, edge: int) -> float:
        return self._arrived[edge] / self._answered[edge] if edge >= 0 and self._answered[edge] else 0.0

    def _learn(self, now: float) -> None:
        elapsed = now - self.answered_at
        if elapsed <= EDGES[-1]:
            self._usual += _WEIGHT * (elapsed - self._usual) if self._usual else elapsed
        arrived = 0
        weights: list[float] = []
        for edge, limit in enumerate(EDGES):
            if limit > elapsed:
                break
            arrived += self._counts[edge]
            # The first observations count fully: waiting for a hundred would cost as many poor batches.
            self._seen[edge] += 1
            weight = max(_WEIGHT, 1 / self._seen[edge])
            weights.append(weight)
            self._arrived[edge] += weight * (arrived - self._arrived[edge])
            self._answered[edge] += weight * (self.answered_rows - self._answered[edge])
        self._before = (self.answered_at, weights)
