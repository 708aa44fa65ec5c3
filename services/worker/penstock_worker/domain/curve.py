"""How long a call of this model takes on this device, by its number of rows: measured, else guessed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

# Of a new measurement in the running average of its size.
_WEIGHT = 0.2
# Sizes up to this are kept apart; larger ones share a point with those within an eighth.
_EXACT = 16


class LatencyCurve:
    """Seconds by rows. Not for several threads.

    Args:
        max_rows: Rows in one call at most.
        seconds_of_one: Time of a call with one row, as the warm-up measured it; 0 if unknown.
        seconds_of_max: Time of a full one.
        profile: Rows, rising, and seconds, as they were measured on this kind of device at another time. What
            is measured here moves them; until then they are better than a line between one row and all.
    """

    def __init__(
        self,
        max_rows: int,
        seconds_of_one: float = 0.0,
        seconds_of_max: float = 0.0,
        profile: Sequence[tuple[int, float]] = (),
    ) -> None:
        self._max_rows = max_rows
        self._rows: list[int] = []
        self._seconds: list[float] = []
        for rows, seconds in profile:
            if rows <= max_rows:
                self.measured(rows, seconds)
        if seconds_of_one and seconds_of_max:
            self.measured(1, seconds_of_one)
            if max_rows > 1:
                self.measured(max_rows, seconds_of_max)

    def measured(self, rows: int, seconds: float) -> None:
        """Learn how long a call took."""
        rows = self._point(rows)
        at = bisect.bisect_left(self._rows, rows)
        if at < len(self._rows) and self._rows[at] == rows:
            self._seconds[at] += _WEIGHT * (seconds - self._seconds[at])
        else:
            self._rows.insert(at, rows)
            self._seconds.insert(at, seconds)

    def seconds(self, rows: float) -> float:
        """Return how long a call of so many rows is likely to take; 0 if nothing is known.

        Less than one row is so much of a call: what a row that may or may not come costs on average.
        """
        known = self._rows
        if not known or rows <= 0:
            return 0.0
        if rows < 1:
            return rows * self.seconds(1)
        at = bisect.bisect_left(known, rows)
        if at == 0:
            return self._seconds[0]
        if at == len(known):
            return self._seconds[-1] * max(1.0, rows / known[-1])
        low, fast, slow = known[at - 1], self._seconds[at - 1], self._seconds[at]
        return fast + (slow - fast) * (rows - low) / (known[at] - low)

    def points(self) -> list[tuple[int, float]]:
        """Return what was measured: rows and seconds, fewest rows first."""
        return list(zip(self._rows, self._seconds, strict=True))

    def rows_within(self, seconds: float) -> int:
        """Return the most rows that a call can have and be done in time; at least 1."""
        low, high = 1, self._max_rows
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _point(self, rows: int) -> int:
        rows = min(rows, self._max_rows)
        if rows <= _EXACT or rows == self._max_rows:
            return rows
        step = 1 << (rows.bit_length() - 4)
        return rows // step * step
