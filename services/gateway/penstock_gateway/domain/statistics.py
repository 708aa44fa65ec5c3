"""Counters of replicas and of the cache, summed to what a caller asks for. Durations in nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Batch:
    """Calls of the model with one number of rows."""

    count: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0


@dataclass(slots=True)
class CacheCounters:
    """What gateways answered of one version without its replicas.

    Attributes:
        hits: Requests given a kept answer.
        hit_ns: Looking those up.
        joined: Requests given the answer to an equal one that was being computed.
        misses: Requests that had to be computed although answers are kept.
        miss_ns: Looking those up, and keeping their answers.
        last_hit_ms: Unix time in milliseconds of the last request that was not computed.
    """

    hits: int = 0
    hit_ns: int = 0
    joined: int = 0
    misses: int = 0
    miss_ns: int = 0
    last_hit_ms: int = 0

    def add(self, other: CacheCounters) -> None:
        """Add another one's; of the last request the latest."""
        self.hits += other.hits
        self.hit_ns += other.hit_ns
        self.joined += other.joined
        self.misses += other.misses
        self.miss_ns += other.miss_ns
        self.last_hit_ms = max(self.last_hit_ms, other.last_hit_ms)


@dataclass(frozen=True, slots=True)
class Batching:
    """How one replica makes batches now; see BatchingPolicy in the queue's protos.

    Attributes:
        curve: Rows of a call, and how long it takes.
    """

    max_rows: int
    objective_ns: int
    average_rows: float
    average_wait_ns: int
    saturated: bool
    curve: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Counters:
    """What replicas did since each started, and the cache beside them; see the queue's protos."""

    success_count: int = 0
    failure_count: int = 0
    execution_count: int = 0
    inference_count: int = 0
    success_ns: int = 0
    failure_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0
    last_inference_ms: int = 0
    batches: dict[int, Batch] = field(default_factory=dict)
    cache: CacheCounters = field(default_factory=CacheCounters)
    batching: list[Batching] = field(default_factory=list)
    """One for each replica that chooses."""


_SUMS = (
    "success_count",
    "failure_count",
    "execution_count",
    "inference_count",
    "success_ns",
    "failure_ns",
    "queue_ns",
    "input_ns",
    "compute_ns",
    "output_ns",
)


def total(parts: Iterable[Counters]) -> Counters:
    """Return the sum over replicas; of the last inference the latest."""
    out = Counters()
    for part in parts:
        for name in _SUMS:
            setattr(out, name, getattr(out, name) + getattr(part, name))
        out.last_inference_ms = max(out.last_inference_ms, part.last_inference_ms)
        out.cache.add(part.cache)
        out.batching += part.batching
        for rows, batch in part.batches.items():
            into = out.batches.setdefault(rows, Batch())
            into.count += batch.count
            into.input_ns += batch.input_ns
            into.compute_ns += batch.compute_ns
            into.output_ns += batch.output_ns
    return out
