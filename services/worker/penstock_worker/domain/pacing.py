"""How large a batch may be, and whether a free model should wait for more requests when some wait already.

Both follow from what is measured: the model's curve (see `curve`) and when requests come (see `returns`).

**Waiting.** Callers that were answered together come back together. Taking the first that is back leaves the
others to the next call, and the model alternates between small batches. With w rows waiting, and c rows that
are expected within d seconds,

    begin now         w + c rows in  seconds(w) + seconds(c)
    wait d seconds    w + c rows in  d + seconds(w + c)

and it waits for the d that gains most, if it gains anything. At low load nobody is expected back, so nobody
waits; where a full batch waits already, neither. Nor is a steady stream waited for, of callers who send
whether they are answered or not: it never ends. A crowd that comes back comes faster after an answer than it
does on average.

**Size.** The manifest's limit binds. An objective for the latency limits it further: a request may come just
when a call has begun, so that two calls must fit. And no batch grows beyond what its most urgent member
bears (see `batching`); nor does waiting.
"""

from __future__ import annotations

import dataclasses

from penstock_worker.domain.curve import LatencyCurve
from penstock_worker.domain.returns import EDGES, Returns

# What a wait must promise: estimates are rough, and a wait is certain.
_MARGIN = 1.05
# A return that is likelier than this is worth looking at.
_EXPECTED_ROWS = 0.2
# Of those who come during a wait, so many must be more than come at any time: less may be chance.
_CROWDED = 0.4
# Between the last row's arrival and the end of a wait: more than a thread needs to wake up.
_SLACK_SECONDS = 0.0003
# Less than this is no wait: falling asleep and waking up takes longer.
_SHORTEST_SECONDS = 0.00005
# Batches after which the limit for the objective is looked at again.
_REVIEW_CALLS = 16
# Of the last batch in the running averages that are shown.
_WEIGHT = 0.2
# Where more than this share of batches was full, with more waiting, the model is the bottleneck.
_SATURATED = 0.8


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What the pacer has chosen, for people to look at. Times are seconds."""

    max_rows: int
    """Rows in one call at most, now."""
    objective: float
    """Latency that was asked for; 0 for none."""
    expected_rows: float
    """Rows in a batch, as a running average."""
    pause: float
    """How long the free model waited for more requests, as a running average."""
    saturated: bool
    """Whether the model is the bottleneck: batches are full, and more waits."""
    curve: tuple[tuple[int, float], ...]
    """The measured curve: rows and seconds."""


class Pacer:
    """Chooses how large batches are, and how long to wait for them. Not for several threads.

    Args:
        curve: The model's.
        max_rows: Rows in one call at most.
        objective: Latency in seconds that most requests should keep, from queueing to answer; 0 for none.
    """

    def __init__(self, curve: LatencyCurve, max_rows: int, objective: float = 0.0) -> None:
        self.curve = curve
        self.returns = Returns()
        self.limit = max_rows
        """Rows in one call at most, now."""
        self._max_rows = max_rows
        self._objective = objective
        self._calls = 0
        self._rows = 0.0
        self._pause = 0.0
        self._full = 0.0
        self._review()

    @property
    def saturated(self) -> bool:
        """Whether more comes than the model can compute, and not only for a moment."""
        return self._full > _SATURATED

    def begun(self, rows: int, waiting: int, paused: float) -> None:
        """Say that a call begins.

        Args:
            rows: Its rows.
            waiting: Rows that wait beside it.
            paused: How long the model waited for more before it.
        """
        self._rows += _WEIGHT * (rows - self._rows)
        self._pause += _WEIGHT * (paused - self._pause)
        full = rows >= self.limit and (waiting > 0 or self.limit > 1)
        self._full += _WEIGHT * (full - self._full)

    def computed(self, rows: int, seconds: float, now: float) -> None:
        """Learn from a call that has just ended; its answers go out now."""
        self.curve.measured(rows, seconds)
        self.returns.answered(now, rows)
        self._calls += 1
        if self._calls % _REVIEW_CALLS == 0:
            self._review()

    def pause(self, now: float, waiting: int, since: float, due: float) -> tuple[float, int]:
        """Return how long to wait for more: seconds (0 to begin now), and for how many rows at most.

        Args:
            now: The time.
            waiting: Rows that wait, at least 1.
            since: When the oldest of them was queued, on the clock of `now`.
            due: When the most urgent of them must be answered.
        """
        latest = min(due, since + self._objective) if self._objective else due
        returns = self.returns
        elapsed = now - returns.answered_at
        if waiting >= self.limit or elapsed > EDGES[-1] or not returns.answered_rows:
            return 0.0, 0
        answered = returns.answered_rows
        alone = self.curve.seconds(waiting)
        arrived = returns.arrived_rows
        gone = answered * returns.share(elapsed)
        # How much later than usual the crowd is: those who should be back are on their way, or queued and not
        # read yet. After twice the usual time they are not expected any more.
        usual = returns.when(arrived / answered)
        behind = max(0.0, elapsed - usual)
        if behind > usual:
            behind = 0.0
        else:
            gone = min(gone, arrived)
        # What is back already is not expected again, however early it came.
        to_come = answered * returns.share(elapsed + alone) - max(gone, arrived)
        if to_come < _EXPECTED_ROWS or not alone:
            return 0.0, 0
        steady = answered * returns.rate()
        best, chosen, rows = 1.0, 0.0, 0
        for edge in EDGES:
            pause = edge + behind + _SLACK_SECONDS - elapsed
            if pause <= _SHORTEST_SECONDS:
                continue
            if pause > alone:
                break
            more = min(to_come, answered * returns.share(edge) - gone)
            # Those who come all the time, after the wait as well as during it, are no reason for it.
            if more < _EXPECTED_ROWS or more - steady * pause < _CROWDED * more:
                continue
            size = min(float(self.limit), waiting + more)
            seconds = self.curve.seconds(size)
            if now + pause + seconds > latest:
                break
            apart = (waiting + more) / (alone + self.curve.seconds(more))
            gain = size / (seconds + pause) / apart
            if gain > max(best, _MARGIN):
                best, chosen, rows = gain, pause, min(self.limit, waiting + max(1, round(to_come)))
        return chosen, rows

    def policy(self) -> Policy:
        """Return what is chosen now."""
        return Policy(
            max_rows=self.limit,
            objective=self._objective,
            expected_rows=self._rows,
            pause=self._pause,
            saturated=self.saturated,
            curve=tuple(self.curve.points()),
        )

    def _review(self) -> None:
        if self._objective and self.curve.points():
            self.limit = min(self._max_rows, self.curve.rows_within(self._objective / 2))
