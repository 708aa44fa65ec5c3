"""What the gateways report, as counts that only grow and as windows of the last seconds."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from penstock_kit.errors import Reason, Unavailable
from penstock_scheduler.domain.traffic import NO_COUNTS, Counts, Seen, TrafficKey, Window
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.ports import Wakeup

GONE_SECONDS = 4.0
"""A gateway that is silent for so long has ended, or cannot be reached: it reports once a second."""
REPORT_SECONDS = 1.0
"""How often a gateway reports."""
HISTORY_SECONDS = 30.0
"""Longest window."""
MAX_GATEWAYS = 1024
MAX_TARGETS = 4096
"""Versions that one process speaks of at most."""
MAX_VERSIONS = 64
"""Versions of one deployment that are told apart; of more, those that were silent longest are forgotten."""
# Reports of several gateways come at different moments; closer than this they make one entry.
_GRAIN_SECONDS = 0.5


class _Moment(NamedTuple):
    at: float
    counts: Counts


class _Gateway:
    """One gateway process."""

    def __init__(self) -> None:
        self.heard_at = 0.0
        self.last: dict[TrafficKey, Seen] = {}


class _Sum:
    """What all gateways counted of one version, gone ones included."""

    def __init__(self, now: float) -> None:
        self.total = NO_COUNTS
        self.changed_at = now
        # Without latencies, which would be most of its size and of the work.
        self._plain = NO_COUNTS
        self._history: deque[_Moment] = deque([_Moment(now, NO_COUNTS)])

    def add(self, delta: Counts, now: float) -> None:
        """Adds what happened since the report before, which came a second ago."""
        if delta == NO_COUNTS:
            return
        history = self._history
        if now - history[-1].at > REPORT_SECONDS:
            # It did not happen over the whole of the silence, but since the last report.
            history.append(_Moment(now - REPORT_SECONDS, self._plain))
        self.total += delta
        self._plain = self.total.without_latencies()
        self.changed_at = now
        if len(history) > 1 and now - history[-2].at < _GRAIN_SECONDS:
            history[-1] = _Moment(now, self._plain)
        else:
            history.append(_Moment(now, self._plain))
        while len(history) > 2 and history[1].at < now - HISTORY_SECONDS:
            history.popleft()

    def since(self, moment: float) -> Counts:
        """What happened since then, without latencies; between two reports it is spread evenly."""
        later, later_at = self._plain, math.inf
        for at, counts in reversed(self._history):
            if at <= moment:
                if later_at == math.inf:
                    return NO_COUNTS
                before = counts + (later - counts).part((moment - at) / (later_at - at))
                return self._plain - before
            later, later_at = counts, at
        return self._plain - later


class Traffic:
    """Takes the reports of the gateways and adds them up.

    A process counts from its start and reports the whole, so that a lost report costs nothing and one that
    comes late or twice changes nothing. It is kept in memory only: a new leader begins with empty windows,
    which fill within seconds.

    Args:
        wakeup: told when a request waits for a replica.
        clock: seconds that only grow.
    """

    def __init__(self, wakeup: Wakeup, clock: Callable[[], float] = time.monotonic) -> None:
        self._wakeup = wakeup
        self._clock = clock
        self._led_since: float | None = None
        self._gateways: dict[str, _Gateway] = {}
        self._sums: dict[str, dict[VersionKey, _Sum]] = {}
        self._alive: frozenset[str] | None = None

    def follow(self, leading: bool) -> None:
        """Begins anew when this scheduler takes the lead; refuses reports while another one has it."""
        if leading == (self._led_since is not None):
            return
        self._led_since = self._clock() if leading else None
        self._gateways.clear()
        self._sums.clear()

    def report(self, gateway: str, uptime_seconds: float | None, seen: Iterable[Seen]) -> None:
        """Takes up what a gateway process has counted since it began.

        Args:
            gateway: name of the process.
            uptime_seconds: how long it has run; None counts all that it says as new.
            seen: all that it has counted.

        Raises:
            Unavailable: another scheduler leads.
        """
        if self._led_since is None:
            raise Unavailable(
                "Another scheduler leads; report there.",
                reason=Reason.DEPENDENCY_UNAVAILABLE,
                retry_after_seconds=1.0,
            )
        now = self._clock()
        known = self._gateways.get(gateway)
        # What a process counted before this scheduler led happened at no moment that is known here.
        old_news = known is None and uptime_seconds is not None and now - uptime_seconds < self._led_since
        if known is None:
            self._make_room()
            known = self._gateways[gateway] = _Gateway()
        known.heard_at = now
        last: dict[TrafficKey, Seen] = {}
        asked = False
        for one in seen:
            before = known.last[one.key].counts if one.key in known.last else NO_COUNTS
            # Of two reports that overtake each other the earlier must not take anything back.
            counts = one.counts.most(before)
            last[one.key] = replace(one, counts=counts)
            if self._alive is None or one.key.deployment in self._alive:
                delta = NO_COUNTS if old_news else counts - before
                self._sum(one.key, now).add(delta, now)
                asked = asked or one.waiting_for_replica > 0
        for key, earlier in known.last.items():
            if key not in last and len(last) < MAX_TARGETS:
                last[key] = replace(earlier, waiting=0, waiting_for_replica=0)
        known.last = last
        if asked:
            self._wakeup.wake()

    def totals(self, deployment: str, version: VersionKey) -> Counts:
        """Everything counted of a version since this scheduler leads; never falls while it does.

        The difference of two totals is what happened between; what a gateway counted shortly before the
        moment may come up to a second later.
        """
        found = self._sums.get(deployment, {}).get(version)
        return NO_COUNTS if found is None else found.total

    def window(self, deployment: str, version: VersionKey, seconds: float) -> Window:
        """What happened to a version over the last seconds, `HISTORY_SECONDS` at most; without latencies."""
        now = self._clock()
        live = [g for g in self._gateways.values() if now - g.heard_at <= GONE_SECONDS]
        if not live or self._led_since is None:
            return Window()
        # It ends at the last report: what came after that nobody has told yet.
        end = max(gateway.heard_at for gateway in live)
        # A scheduler that has led for a moment only has seen no more than that.
        length = min(seconds, HISTORY_SECONDS, max(end - self._led_since, 1.0))
        known = self._sums.get(deployment, {}).get(version)
        said = [one for gateway in live if (one := gateway.last.get(TrafficKey(deployment, version)))]
        return Window(
            length,
            NO_COUNTS if known is None else known.since(end - length),
            sum(one.waiting for one in said),
            sum(one.waiting_for_replica for one in said),
        )

    def versions(self, deployment: str) -> Collection[VersionKey]:
        """The versions of which gateways have said anything."""
        return tuple(self._sums.get(deployment, {}))

    def keep(self, alive: Collection[str]) -> None:
        """Forgets deployments that are not named, and ignores them from now on; forgets old gateways."""
        self._alive = frozenset(alive)
        for name in [name for name in self._sums if name not in alive]:
            del self._sums[name]
        now = self._clock()
        for name, gateway in list(self._gateways.items()):
            if now - gateway.heard_at > HISTORY_SECONDS:
                del self._gateways[name]

    # -- parts ------------------------------------------------------------------------------------

    def _sum(self, key: TrafficKey, now: float) -> _Sum:
        sums = self._sums.setdefault(key.deployment, {})
        found = sums.get(key.version)
        if found is None:
            if len(sums) >= MAX_VERSIONS:
                del sums[min(sums, key=lambda version: sums[version].changed_at)]
            found = sums[key.version] = _Sum(now)
        return found

    def _make_room(self) -> None:
        if len(self._gateways) >= MAX_GATEWAYS:
            silent = min(self._gateways, key=lambda name: self._gateways[name].heard_at)
            del self._gateways[silent]


__all__ = ["GONE_SECONDS", "HISTORY_SECONDS", "MAX_TARGETS", "Traffic"]
