"""Whether a request would be answered in time, judged by what waits ahead of it and how fast that goes.

One `Backlog` is one priority of one queue, as one gateway process sees it. Within it requests are answered
in the order of their coming, so that a new one is answered when all ahead of it are:

    wait  =  (own unanswered + those of other gateways)  ×  seconds per answer

Seconds per answer are measured between answers while something waits; the time in which nothing waits, the
first answer after it (a cold start, a compilation) and stalls (a replica that died) say nothing about the
pace and are left out. The figures are forgotten over a quarter of a second or eight groups of answers,
whichever is longer. How far answers come later than reckoned is followed as its 95th percentile and kept
as a margin, which so holds the time in the model, transport, and the error of the reckoning itself.

What is refused wrongly is lost to a caller whom there was room for, while what is admitted wrongly costs
next to nothing (replicas drop it unread). Hence doubt admits:

1. Without figures nothing is refused, and not beyond twice the backlog that they were measured at. By
   Little's law (backlog = pace × time taken) requests did then take half of what this one would, or more. A
   burst from idle, a fresh start and a waking replica are never refused.
2. The margin takes at most half of what is left: a wait of up to half the time is always admitted. The
   backlog thus never starves, answers keep coming, and figures that were wrong are measured anew. With rule
   1: nobody is refused unless requests did take a quarter of what this one has left.
3. While there may be room in a batch that is not computed yet, all are admitted: refusing would make nothing
   faster. That is up to two full batches for each replica, one of which it computes. (Otherwise a pace that
   was measured at half-full batches would keep them half full.)

Each priority reckons with its own answers only. Whatever share the replicas give to it shows in its pace:
when higher priorities take the capacity, the lower ones' pace falls and they are refused first.

Sources: J. D. C. Little, "A Proof for the Queuing Formula L = λW" (1961); R. Ibrahim and W. Whitt,
"Real-Time Delay Estimation Based on Delay History" (2009), for the choice of estimator; N. Cardwell et al.,
"BBR" (2016), for a pace that is measured only while it is not the sender who limits it; I. Cho et al.,
"Breakwater" (2020), for dropping at the server what admission let through too much.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock_gateway.domain.traffic import NOBODY, Tally

PRIORITIES = 3

# Answers that come closer together than this are taken as one group; replicas answer whole batches.
GROUP_SECONDS = 0.010
# How long the pace, and the backlog that it was measured at, are remembered; in groups at least these.
_PACE_SECONDS, _PACE_GROUPS = 0.25, 8
_BACKLOG_SECONDS, _BACKLOG_GROUPS = 0.1, 3
# Groups that must have been seen before the pace is believed.
_FIRST_GROUPS = 4
# A gap between answers this many times the usual one (and this long) is a stall, which says no pace.
_STALL_FACTOR, _STALL_SECONDS = 8.0, 0.1
# Figures this old are forgotten: machines change.
_MEMORY_SECONDS = 30.0
# Of how many answers the margin may be exceeded, and how fast it follows, as a part of the time taken.
_LATE_SHARE = 0.05
_MARGIN_STEP = 0.05
# It fades by itself too, by a fifth in a second: where nothing waits nothing else would lower it.
_MARGIN_KEPT = 0.98
# Of the time left, what the way back to the caller may take.
_WAY_BACK = 0.1
# The figures speak for a backlog this many times the one that they were measured at; see rule 1.
_REACH = 2.0
# Of a queue's depth: fewer are this process' own that were counted a moment too early or too late.
_OWN_SHARE = 0.05


class Backlog:
    """What waits in one queue at one priority. Times are seconds; clocks are `time.monotonic`'s.

    Attributes:
        waiting: Unanswered requests of this process.
        others: Unanswered requests of other gateways, as last counted.
        seconds_each: Expected time for each that waits ahead; 0 while unknown.
        margin: How much later than reckoned 95 % of the answers come at most.
        room: With fewer ahead, there may be room in a batch that is not computed yet; see rule 3.
    """

    __slots__ = (
        "_answers",
        "_asked",
        "_backlog",
        "_backlog_time",
        "_count",
        "_fold_at",
        "_gaps",
        "_groups",
        "_left_behind",
        "_reach",
        "_replicas",
        "_since",
        "_time",
        "margin",
        "others",
        "room",
        "seconds_each",
        "waiting",
    )

    def __init__(self) -> None:
        self.waiting = 0
        self.others = 0
        self.seconds_each = 0.0
        self.margin = 0.0
        self._replicas = 1
        self.room = 2.0
        # Ahead of a request at most, for the figures to say something about it.
        self._reach = 0.0
        self._forget()

    def _restart(self) -> None:
        """Measure the pace anew."""
        self.seconds_each = self._reach = 0.0
        # Sums over groups of answers, fading: their number, time, answers; time × backlog, and its time.
        self._gaps = self._time = self._count = 0.0
        self._backlog = self._backlog_time = 0.0
        self._groups = 0

    def _forget(self) -> None:
        self._restart()
        self.margin = 0.0
        # When the last group came, 0 for "nothing has waited since"; answers and backlog after it.
        self._since = 0.0
        self._answers = 0
        self._left_behind = 0
        self._fold_at = 0.0
        self._asked = 0.0

    @property
    def answers_per_second(self) -> float:
        """The pace at which this process' requests are answered while they wait; 0 while unknown."""
        return self._count / self._time if self._groups >= _FIRST_GROUPS else 0.0

    @property
    def expected_wait(self) -> float:
        """Expected time from now to the answer of a request that came now; 0 while unknown."""
        ahead = self.waiting + self.others
        return ahead * self.seconds_each + self.margin if ahead and self.seconds_each else 0.0

    def enter(self, left: float) -> float:
        """Admit a request, or refuse it.

        Args:
            left: Time to its deadline.

        Returns:
            The time that those ahead of it are reckoned to take (0 if unknown, or if there is room in the
            next batches), to be given back when the request ends; −1 if it is refused.
        """
        ahead = self.waiting + self.others
        wait = 0.0
        if ahead >= self.room:
            wait = ahead * self.seconds_each
            if wait > left / 2 and ahead <= self._reach and wait + self.margin > left - left * _WAY_BACK:
                return -1.0
        self.waiting += 1
        return wait

    def answered(self, now: float, took: float, reckoned: float) -> None:
        """Note that a request was answered by a replica.

        Args:
            now: The time.
            took: Time since the request entered.
            reckoned: What `enter` returned.
        """
        self.waiting -= 1
        self._answers += 1
        if now >= self._fold_at:
            self._fold(now, took, reckoned)
        if not self.waiting:
            self._since = 0.0

    def leave(self) -> None:
        """Note that a request went away unanswered: cancelled, or moved to another queue."""
        self.waiting -= 1
        if not self.waiting:
            self._since = 0.0

    def missed(self, now: float, took: float, reckoned: float) -> None:
        """Note that the deadline of a request passed. What leaves so says nothing about the pace."""
        self.leave()
        if reckoned and now >= self._asked:
            self._asked = now + GROUP_SECONDS
            self._learn(took, took - reckoned)

    def join(self) -> None:
        """Take over a request from another queue; it was admitted there."""
        self.waiting += 1

    def see_others(self, count: int) -> None:
        """Take how many requests of other gateways wait in the queue at this priority."""
        self.others = count
        self._reckon()

    def see_replicas(self, count: int, requests_per_call: float = 1.0) -> None:
        """Take how many replicas answer now, and how many requests one call of the model computes.

        The pace is expected to follow their number.
        """
        count = max(count, 1)
        self.room = 2 * count * max(requests_per_call, 1.0)
        if count != self._replicas:
            self._time *= self._replicas / count
            self._replicas = count
            self._reckon()

    def age(self, now: float) -> None:
        """Forget figures that are too old to act on; to be called ten times a second or so."""
        self.margin *= _MARGIN_KEPT
        if self._groups and now - self._fold_at > max(_MEMORY_SECONDS, _PACE_GROUPS * self._usual_gap):
            self._forget()

    @property
    def _usual_gap(self) -> float:
        return self._time / self._gaps if self._gaps else 0.0

    def _fold(self, now: float, took: float, reckoned: float) -> None:
        """Add what was answered since the last group to the figures."""
        since, answers, behind = self._since, self._answers, self._left_behind
        self._since, self._answers, self._left_behind = now, 0, self.waiting
        self._fold_at = now + GROUP_SECONDS
        if not since:
            return  # how long the first answer after an idle time takes says no pace
        gap = now - since
        if self._groups >= _FIRST_GROUPS:
            gap = min(gap, _STALL_FACTOR * self._usual_gap + _STALL_SECONDS)
        ahead = (behind + self.waiting + answers) / 2
        if self._groups > 1 and ahead * self._backlog_time > _REACH * self._backlog:
            # A burst: what was measured at a far smaller backlog says little about this one.
            self._restart()
        keep = 1.0 - min(gap / _PACE_SECONDS, 1.0 / _PACE_GROUPS)
        self._gaps = self._gaps * keep + 1.0
        self._time = self._time * keep + gap
        self._count = self._count * keep + answers
        keep = 1.0 - min(gap / _BACKLOG_SECONDS, 1.0 / _BACKLOG_GROUPS)
        self._backlog_time = self._backlog_time * keep + gap
        self._backlog = self._backlog * keep + gap * ahead
        self._groups += 1
        if reckoned:
            self._learn(took, took - reckoned)
        self._reckon()

    def _learn(self, took: float, late: float) -> None:
        """Move the margin towards the 95th percentile of how much later than reckoned answers come."""
        # By parts of the time taken, or of the margin where that is more, as after a stall: it must not
        # take minutes to forget one.
        step = _MARGIN_STEP * max(took, self.margin)
        if late > self.margin:
            self.margin = min(late, self.margin + step * (1.0 - _LATE_SHARE))
        else:
            self.margin = max(0.0, self.margin - step * _LATE_SHARE)

    def _reckon(self) -> None:
        if self._groups < _FIRST_GROUPS:
            return
        own = self._backlog / self._backlog_time
        both = own + self.others
        self._reach = _REACH * both
        # The queue's pace is to this process' as the whole backlog is to its own part of it.
        self.seconds_each = self._time / self._count * (own / both)


class _Nowhere(Backlog):
    """Where requests count that are in no queue by themselves: it keeps no figures."""

    __slots__ = ()

    def answered(self, now: float, took: float, reckoned: float) -> None:
        """Nothing was ahead of it."""

    def leave(self) -> None:
        """It was not counted."""

    def missed(self, now: float, took: float, reckoned: float) -> None:
        """Nothing was ahead of it."""


NOWHERE = _Nowhere()


class Waitlist:
    """What waits in one queue, by priority.

    Args:
        queue: Its name.

    Attributes:
        backlogs: High, normal, low.
        tally: Where the answers of the queue's version are counted.
    """

    __slots__ = ("_max_rows", "_replicas", "_requests", "_rows", "_rows_each", "backlogs", "queue", "tally")

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.backlogs = tuple(Backlog() for _ in range(PRIORITIES))
        self.tally: Tally = NOBODY
        self._replicas = self._max_rows = 1
        self._rows_each = 1.0
        # Counters of all replicas, as last read.
        self._requests = self._rows = 0

    @property
    def waiting(self) -> int:
        """Unanswered requests of this process."""
        return sum([backlog.waiting for backlog in self.backlogs])

    @property
    def busy(self) -> bool:
        """Whether anything waits, here or at another gateway, as far as known."""
        return any(backlog.waiting or backlog.others for backlog in self.backlogs)

    def offer(self, replicas: int, max_rows: int) -> None:
        """Take how many replicas answer now, and how many rows one call of the model takes at most."""
        self._replicas, self._max_rows = replicas, max(max_rows, 1)
        self._tell()

    def see_depths(self, before: Sequence[int], depths: Sequence[int]) -> None:
        """Take how many requests the queue holds at each priority.

        Args:
            before: What waited here, by priority, before the depths were asked for.
            depths: What came back. Requests that were answered or sent meanwhile are in one of the counts.
        """
        for backlog, own, depth in zip(self.backlogs, before, depths, strict=True):
            others = depth - max(own, backlog.waiting)
            backlog.see_others(others if others > depth * _OWN_SHARE else 0)

    def alone(self) -> None:
        """Forget what waits at other gateways."""
        for backlog in self.backlogs:
            backlog.see_others(0)

    def see_totals(self, requests: int, rows: int) -> None:
        """Take how many requests the replicas have answered, and how many rows those had, ever.

        What was added since the last time says how many requests fill a call of the model.
        """
        more_requests, more_rows = requests - self._requests, rows - self._rows
        self._requests, self._rows = requests, rows
        if more_requests <= 0 or more_rows <= 0:
            return  # nothing new, or a replica took its counters with it
        self._rows_each = more_rows / more_requests
        self._tell()

    def _tell(self) -> None:
        for backlog in self.backlogs:
            backlog.see_replicas(self._replicas, self._max_rows / self._rows_each)

    def age(self, now: float) -> None:
        """Forget what is too old to act on."""
        for backlog in self.backlogs:
            backlog.age(now)
