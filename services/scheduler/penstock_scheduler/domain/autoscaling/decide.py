"""`decide(facts, memory, now) → (replicas, memory)`: how many replicas the load asks for.

What one replica can do is not asked of the owner but measured: whenever requests have to wait longer than
the objective although every replica works, the answers per second and replica are what a replica can do.
From that and from the requests that come, the formula of Erlang says how many replicas keep the wait short.

- Up at once: from the last ten seconds, or from the last two if those show, beyond chance, that more comes
  now; and for what has piled up, so that it is answered within a few seconds.
- Down slowly: to the most that was needed at any moment of the cool-down, reckoned with a tenth more load.
  What comes at random, and waves shorter than the cool-down, therefore move nothing.
- To zero when nothing came for as long as the owner says; back as soon as anything comes.
- Nothing changes while no gateway reports: silence is not idleness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from penstock_scheduler.domain.autoscaling.queueing import replicas_needed
from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.traffic import Window
from penstock_scheduler.domain.version import VersionKey

STEADY_SECONDS = 10.0
"""Window of what comes as a rule."""
SUDDEN_SECONDS = 2.0
"""Window of what comes all of a sudden; gateways report once a second."""
DRAIN_SECONDS = 3.0
"""What has piled up is to be answered within this time."""
# A change beyond three standard deviations of random arrivals (Poisson) is a step, not chance: about one
# false alarm in a thousand looks, and what it costs is one replica for one cool-down.
_SIGMAS = 3.0
# Fewer replicas must be enough for this much more load than there is: the gap between up and down.
_DOWN_MARGIN = 1.1
# The most that was needed is kept in so many parts of the cool-down.
_COOL_DOWN_PARTS = 12
# Replicas grow to at most so many times as many at once where the demand shows only when there are more.
_GROWTH = 2
# One look may take so much off what a replica is believed to do: a pause of a machine is no new speed.
_WORSE = 0.8
# Replicas that give so much of what they can have as much to do as they can.
_SATURATED = 0.92
# Fewer answers within a window tell little about a rate.
_FEW_ANSWERS = 20
# Requests that wait this long on end are a queue; one look may meet a batch.
_QUEUE_SECONDS = 0.9
# A replica also reads, decodes and answers, its batches are not always full, and requests may have several
# rows: so much of a profile is counted on. Too little costs a replica for one cool-down, too much a queue
# until it is measured.
_PROFILE_SHARE = 0.5
# What was measured of a replica is stored anew when it moved by more than this.
_NEWS = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """One version that a deployment serves or is about to.

    Attributes:
        version: which.
        steady: what came and was answered over the last `STEADY_SECONDS`.
        sudden: the same over the last `SUDDEN_SECONDS`.
        ready: replicas that answer now.
        fastest_seconds: how long the fastest twentieth of its answers took; None before any.
        max_batch_size: requests that one replica computes at once, at least 1.
        profiled: requests of one row a second that one replica did in a profile on such a device; None if
            none was made.
    """

    version: VersionKey
    steady: Window
    sudden: Window
    ready: int = 0
    fastest_seconds: float | None = None
    max_batch_size: int = 1
    profiled: float | None = None

    @property
    def estimate(self) -> float | None:
        """What one replica is believed to answer a second until that is measured; None if nobody can say."""
        if not self.profiled:
            return None
        seen = self.recent.answers_per_second / max(self.ready, 1)
        return max(_PROFILE_SHARE * self.profiled, seen)

    @property
    def recent(self) -> Window:
        """The last moments, or a little more where answers are so few that chance would speak."""
        return self.sudden if self.sudden.counts.answered >= _FEW_ANSWERS else self.steady


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one deployment at one moment.

    Attributes:
        settings: what its owner asks for.
        scale: what was decided before.
        targets: its versions.
        arrived: requests that ever came, of all versions.
        starved: replicas of other deployments find no room, and this one is idle.
    """

    settings: Autoscaling
    scale: Scale
    targets: tuple[Target, ...]
    arrived: int = 0
    starved: bool = False

    @property
    def known(self) -> bool:
        """Whether any gateway reports."""
        return bool(self.targets) and all(t.sudden.known and t.steady.known for t in self.targets)

    @property
    def waiting(self) -> int:
        """Requests that wait for an answer."""
        return sum(target.sudden.waiting for target in self.targets)


@dataclass(frozen=True, slots=True)
class Memory:
    """What the decider remembers of one deployment; a new leader begins with none, and its cool-down anew.

    Attributes:
        since: when it began to remember.
        busy_at: when anything last came or waited.
        arrived: requests that had come then.
        needs: the most replicas that were needed in each part of the cool-down, with the part's number.
        queued_since: since when requests of a version wait longer than they may, on end.
        ready: replicas that answered when it last looked, and since when it is so many, by version.
        capacities: answers per second that one replica was measured to give, by version.
    """

    since: float
    busy_at: float
    arrived: int = 0
    needs: tuple[tuple[int, int], ...] = ()
    queued_since: Mapping[VersionKey, float] = field(default_factory=dict)
    ready: Mapping[VersionKey, tuple[int, float]] = field(default_factory=dict)
    capacities: Mapping[VersionKey, float] = field(default_factory=dict)


def decide(facts: Facts, memory: Memory | None, now: float) -> tuple[Scale, Memory]:
    """How many replicas of each target there should be from now on, and what to remember.

    Pure; to be asked about once a second, and whenever a request waits for a replica.

    Args:
        facts: what is known.
        memory: what the call before returned; None at first.
        now: seconds on a clock that only grows.
    """
    if memory is None:
        memory = Memory(now, now, facts.arrived, capacities=dict(facts.scale.capacities))
    settings, scale = facts.settings, facts.scale
    if not facts.known:
        return scale, replace(memory, busy_at=now, queued_since={})
    came = facts.arrived > memory.arrived or facts.waiting > 0
    memory = replace(
        memory, arrived=max(facts.arrived, memory.arrived), busy_at=now if came else memory.busy_at
    )
    memory = _measure(facts, _look(facts, memory, now), now)
    up = max((_needed(facts, target, memory, now) for target in facts.targets), default=0)
    down = max((_enough(facts, target, memory) for target in facts.targets), default=0)
    memory = _note(memory, max(up, down), settings, now)

    desired = scale.desired
    if desired == 0:
        desired = max(1, up) if came else 0
    elif up > desired:
        desired = up
    elif now - memory.since >= settings.cool_down_seconds:
        desired = max(1, min(desired, max(count for _, count in memory.needs)))
    if settings.min_replicas == 0 and now - memory.busy_at >= settings.idle_seconds:
        desired = 0
    if facts.starved and settings.min_replicas == 0 and not facts.waiting:
        desired = 0
    desired = settings.clamp(desired)
    return _stored(scale, desired, memory.capacities), memory


def _look(facts: Facts, memory: Memory, now: float) -> Memory:
    """Notes since when requests queue, and since when so many replicas answer."""
    queued = {}
    ready = {}
    for target in facts.targets:
        if _waits_too_long(facts.settings, target, memory):
            queued[target.version] = memory.queued_since.get(target.version, now)
        before = memory.ready.get(target.version)
        ready[target.version] = before if before and before[0] == target.ready else (target.ready, now)
    return replace(memory, queued_since=queued, ready=ready)


def _service_seconds(target: Target, memory: Memory) -> float:
    """How long an answer takes without waiting, or a little more.

    The fastest answers tell, unless there was a queue from the first; and no batch takes longer than its
    requests do at the speed that was measured, or seen if none was.
    """
    guesses = [] if target.fastest_seconds is None else [target.fastest_seconds]
    seen = target.recent.answers_per_second / max(target.ready, 1)
    capacity = memory.capacities.get(target.version, seen)
    if capacity > 0:
        guesses.append(target.max_batch_size / capacity)
    return min(guesses, default=0.0)


def _allowed(settings: Autoscaling, target: Target, memory: Memory) -> float:
    """Requests that may be under way, by Little's law, when each waits as long as it may."""
    service = _service_seconds(target, memory)
    # What every replica computes at this moment does not wait. Where answers take long, so many are computed
    # at once that what the fastest of them took says little about the others.
    at_once = target.max_batch_size if service > settings.queue_wait_seconds else 1
    return max(
        target.recent.answers_per_second * (settings.queue_wait_seconds + service), target.ready * at_once + 1
    )


def _waits_too_long(settings: Autoscaling, target: Target, memory: Memory) -> bool:
    if not target.ready or not target.recent.counts.answered:
        return False
    refused = target.sudden.counts.overloaded > 0
    return refused or target.sudden.waiting > _allowed(settings, target, memory)


def _queued(target: Target, memory: Memory, now: float) -> bool:
    return now - memory.queued_since.get(target.version, now) >= _QUEUE_SECONDS


def _measure(facts: Facts, memory: Memory, now: float) -> Memory:
    """What one replica can do: measured while requests queue; at least what it was seen to do."""
    capacities = {}
    for target in facts.targets:
        known = memory.capacities.get(target.version)
        count, since = memory.ready[target.version]
        window = target.recent
        if count and now - since >= window.seconds:
            rate = window.answers_per_second / count
            if rate > 0 and (_queued(target, memory, now) or (known is not None and rate > known)):
                known = rate if known is None else max(rate, _WORSE * known)
        if known is not None:
            capacities[target.version] = known
    return replace(memory, capacities=capacities)


def _needed(facts: Facts, target: Target, memory: Memory, now: float) -> int:
    """Replicas that what comes now asks for."""
    settings = facts.settings
    least = 1 if target.sudden.waiting_for_replica and not target.ready else 0
    capacity = memory.capacities.get(target.version) or target.estimate
    if capacity is None:
        return least
    sudden, steady = target.sudden, target.steady
    came, answered = sudden.counts.arrived, sudden.counts.answered
    keeps_up = came - answered <= max(0.1 * came, _SIGMAS)
    queued = _queued(target, memory, now)
    count, since = memory.ready[target.version]
    settled = count >= facts.scale.desired and now - since >= SUDDEN_SECONDS
    need = 0
    busy = target.recent.answers_per_second >= _SATURATED * count * capacity
    if not keeps_up or queued or (settled and not busy):
        # Only what came for sure counts, even if chance brought more than there is as a rule.
        rate = max(
            _surely(steady.counts.arrived, 1.0) / steady.seconds, _surely(came, _SIGMAS) / sudden.seconds
        )
        piled = sudden.waiting - _allowed(settings, target, memory)
        if queued and piled > 0 and not (settled and keeps_up):
            rate += piled / DRAIN_SECONDS
        if not (queued and settled and keeps_up and busy):
            need = replicas_needed(rate, capacity, settings.queue_wait_seconds, settings.max_replicas)
    if queued and settled and keeps_up:
        # As many come as are answered, and yet they wait: callers who each wait for an answer before they
        # ask again. What they would ask for shows only when there is more to be had.
        seconds = settings.queue_wait_seconds + _service_seconds(target, memory)
        would = math.ceil(sudden.waiting / seconds / capacity)
        need = max(need, min(would, max(_GROWTH * count, count + 1)))
    return max(least, min(need, settings.max_replicas))


def _surely(count: int, sigmas: float) -> float:
    """What came at least, with chance taken off: counts of random arrivals vary by their square root."""
    return max(0.0, count - sigmas * math.sqrt(count))


def _enough(facts: Facts, target: Target, memory: Memory) -> int:
    """Replicas that must not be gone below; all but one there are while nobody knows what one can do."""
    capacity = memory.capacities.get(target.version)
    count = target.steady.counts.arrived
    if capacity is None:
        # Never was there a queue: one fewer may be enough too. If not, it is measured, and known then.
        return max(1, facts.scale.desired - 1) if count else 1
    rate = (count + math.sqrt(count)) * _DOWN_MARGIN / target.steady.seconds
    return replicas_needed(rate, capacity, facts.settings.queue_wait_seconds, facts.settings.max_replicas)


def _note(memory: Memory, need: int, settings: Autoscaling, now: float) -> Memory:
    """Keeps the most that was needed in this part of the cool-down, and forgets what is older than it."""
    part = int(now / (settings.cool_down_seconds / _COOL_DOWN_PARTS))
    needs = dict(memory.needs)
    needs[part] = max(need, needs.get(part, 0))
    kept = tuple(item for item in sorted(needs.items()) if item[0] >= part - _COOL_DOWN_PARTS)
    return replace(memory, needs=kept)


def _stored(scale: Scale, desired: int, capacities: Mapping[VersionKey, float]) -> Scale:
    """What is to be stored: a measurement that hardly moved is not worth a write."""
    old = dict(scale.capacities)
    moved = old.keys() != capacities.keys() or any(
        abs(rate - old[version]) > _NEWS * old[version] for version, rate in capacities.items()
    )
    if desired == scale.desired and not moved:
        return scale
    return Scale(desired, tuple(sorted(capacities.items())))
