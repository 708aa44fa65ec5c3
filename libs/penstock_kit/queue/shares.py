"""How much of what a replica reads belongs to each priority, while requests of several wait. No I/O here.

High comes first, yet the others never stand still: of all that is read while they wait, a tenth is of low
priority and a fifth of normal, even if high could fill everything. What is promised to a priority that has
nothing waiting goes to the others, and is not saved up.
"""

from collections.abc import Sequence

# Promised to high (which has the rest), normal, low.
PROMISED = (0.0, 0.2, 0.1)


class Shares:
    """Deals out the places of each read. Not for several threads."""

    def __init__(self) -> None:
        self._credit = [0.0] * len(PROMISED)

    def deal(self, places: int) -> list[int]:
        """Return how many of the next ``places`` are for high, normal and low priority; they add up to it."""
        dealt = [0] * len(PROMISED)
        left = places
        for priority in range(len(PROMISED) - 1, 0, -1):
            self._credit[priority] += places * PROMISED[priority]
            # A hair more than rounding errors take away.
            dealt[priority] = min(left, int(self._credit[priority] + 1e-9))
            left -= dealt[priority]
        dealt[0] = left
        return dealt

    def found(self, dealt: Sequence[int], found: Sequence[int]) -> None:
        """Note what was found at the places dealt out, before others took those that stayed empty."""
        for priority in range(1, len(PROMISED)):
            if found[priority] < dealt[priority]:
                self._credit[priority] = 0.0
            else:
                self._credit[priority] -= dealt[priority]
