"""Rules for what callers ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from penstock_kit.errors import FailedPrecondition, InvalidArgument, Reason
from penstock_scheduler.domain.autoscaling.settings import (
    DEFAULT_COOL_DOWN_SECONDS,
    DEFAULT_IDLE_SECONDS,
    DEFAULT_QUEUE_WAIT_SECONDS,
    Autoscaling,
)
from penstock_scheduler.domain.deployment import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_CACHE_SECONDS,
    MAX_REPLICAS,
    MAX_TARGETS,
    ResponseCache,
    Target,
)
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import Version

ALL_TRAFFIC = 100
MAX_BATCH_SIZE = 65536
MAX_DELAY_MICROSECONDS = 10_000_000
MAX_OBJECTIVE_MICROSECONDS = 3_600_000_000
MAX_LABELS = 64
MAX_AUTOSCALING_SECONDS = 30 * 24 * 3600.0
MAX_LABEL_LENGTH = 256
MAX_QUEUE_DEPTH = 1_000_000
LARGEST_AMOUNT = 2**53
# Below a millisecond nothing would be found again; a month is as good as for ever.
MIN_CACHE_SECONDS, MAX_CACHE_SECONDS = 0.001, 30 * 24 * 3600.0
# Below a kibibyte not one answer fits; no gateway has a tebibyte.
MIN_CACHE_BYTES, MAX_CACHE_BYTES = 1024, 2**40


@dataclass(frozen=True, slots=True)
class TargetAsked:
    """A target as asked for: a version's number or an alias, and a weight."""

    model: str
    weight: int
    version: int = 0
    alias: str = ""

    @property
    def selector(self) -> str:
        """What the registry resolves."""
        return self.alias or str(self.version)

    def __str__(self) -> str:
        return f"models/{self.model}{'@' + self.alias if self.alias else f'/versions/{self.version}'}"


def check_targets(targets: Sequence[TargetAsked]) -> tuple[TargetAsked, ...]:
    """Returns the targets with their weights filled in.

    Raises:
        InvalidArgument: none or too many, a weight out of range, a sum other than 100, or twice the same.
    """
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise InvalidArgument(
            f"A deployment has 1 to {MAX_TARGETS} targets, not {len(targets)}.", metadata={"field": "targets"}
        )
    for target in targets:
        if not 0 <= target.weight <= ALL_TRAFFIC:
            raise InvalidArgument(
                f"The weight of {target} is {target.weight}; use 0 to {ALL_TRAFFIC}.",
                metadata={"field": "targets.weight"},
            )
    if len(targets) == 1 and targets[0].weight == 0:
        targets = (replace(targets[0], weight=ALL_TRAFFIC),)
    total = sum(target.weight for target in targets)
    if total != ALL_TRAFFIC:
        raise InvalidArgument(
            f"The weights of the targets sum to {total}; they must sum to {ALL_TRAFFIC}.",
            metadata={"field": "targets.weight"},
        )
    _refuse_twins(str(target) for target in targets)
    return tuple(targets)


def check_resolved(targets: Sequence[Target]) -> None:
    """Lets pass targets that mean different versions.

    Raises:
        InvalidArgument: two of them mean the same one.
    """
    _refuse_twins(str(target.version) for target in targets)


def _refuse_twins(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InvalidArgument(
                f"{name} is a target {count} times; name it once, with the whole of its weight.",
                metadata={"field": "targets"},
            )


def check_replicas(replicas: int) -> int:
    """Returns the number of replicas, 1 for 0.

    Raises:
        InvalidArgument: negative or too many.
    """
    return _between("replicas", replicas, 0, MAX_REPLICAS) or 1


def check_queue_depth(depth: int, default: int) -> int:
    """Returns the depth of the queue, the default for 0.

    Raises:
        InvalidArgument: negative or too deep.
    """
    return _between("max_queue_depth", depth, 0, MAX_QUEUE_DEPTH) or default


def check_cache(cache: ResponseCache) -> ResponseCache:
    """Returns the setting of the response cache, with the defaults for 0.

    Raises:
        InvalidArgument: a time or size is negative or absurd.
    """
    seconds, size = cache.ttl_seconds, cache.max_bytes
    if seconds and not MIN_CACHE_SECONDS <= seconds <= MAX_CACHE_SECONDS:
        raise InvalidArgument(
            f"cache.ttl is {seconds:g} s; use {MIN_CACHE_SECONDS:g} to {MAX_CACHE_SECONDS:.0f} s (30 days), "
            f"or 0 for {DEFAULT_CACHE_SECONDS:g} s.",
            metadata={"field": "cache.ttl"},
        )
    if size:
        _between("cache.max_bytes", size, MIN_CACHE_BYTES, MAX_CACHE_BYTES)
    return replace(cache, ttl_seconds=seconds or DEFAULT_CACHE_SECONDS, max_bytes=size or DEFAULT_CACHE_BYTES)


def check_autoscaling(asked: Autoscaling) -> Autoscaling:
    """Returns the autoscaling, with the defaults for 0.

    Raises:
        InvalidArgument: no most is given, the least is more than the most, or a time is negative or absurd.
    """
    if asked.max_replicas == 0:
        raise InvalidArgument(
            f"autoscaling.max_replicas is 0; say how many replicas there may be, 1 to {MAX_REPLICAS}.",
            metadata={"field": "autoscaling.max_replicas"},
        )
    _between("autoscaling.max_replicas", asked.max_replicas, 1, MAX_REPLICAS)
    _between("autoscaling.min_replicas", asked.min_replicas, 0, MAX_REPLICAS)
    if asked.min_replicas > asked.max_replicas:
        raise InvalidArgument(
            f"autoscaling.min_replicas is {asked.min_replicas}, more than its max_replicas, "
            f"{asked.max_replicas}.",
            metadata={"field": "autoscaling.min_replicas"},
        )
    return replace(
        asked,
        queue_wait_seconds=_seconds(
            "autoscaling.queue_wait_objective", asked.queue_wait_seconds, 0.001, DEFAULT_QUEUE_WAIT_SECONDS
        ),
        idle_seconds=_seconds("autoscaling.idle", asked.idle_seconds, 1.0, DEFAULT_IDLE_SECONDS),
        cool_down_seconds=_seconds(
            "autoscaling.cool_down", asked.cool_down_seconds, 1.0, DEFAULT_COOL_DOWN_SECONDS
        ),
    )


def _seconds(field: str, value: float, least: float, default: float) -> float:
    if value and not least <= value <= MAX_AUTOSCALING_SECONDS:
        raise InvalidArgument(
            f"{field} is {value:g} s; use {least:g} to {MAX_AUTOSCALING_SECONDS:.0f} s (30 days), "
            f"or 0 for {default:g} s.",
            metadata={"field": field},
        )
    return value or default


def check_resources(resources: Resources) -> Resources:
    """Returns the resources.

    Raises:
        InvalidArgument: a number is negative or absurd, or GPU memory is given in two ways.
    """
    _between("resources.cpu_millis", resources.cpu_millis, 0, LARGEST_AMOUNT)
    _between("resources.memory_bytes", resources.memory_bytes, 0, LARGEST_AMOUNT)
    _between("resources.gpus", resources.gpus, 0, 1024)
    _between("resources.gpu_memory_bytes", resources.gpu_memory_bytes, 0, LARGEST_AMOUNT)
    _between("resources.gpu_memory_millis", resources.gpu_memory_millis, 0, 1000)
    _between("resources.disk_bytes", resources.disk_bytes, 0, LARGEST_AMOUNT)
    if resources.gpu_memory_bytes and resources.gpu_memory_millis:
        raise InvalidArgument(
            "resources.gpu_memory_bytes and gpu_memory_millis both say how much memory of each GPU; "
            "give one of them.",
            metadata={"field": "resources.gpu_memory_millis"},
        )
    return resources


def check_batching(batching: Batching) -> Batching:
    """Returns the batching.

    Raises:
        InvalidArgument: a number is negative or absurd.
    """
    _between("batching.max_batch_size", batching.max_batch_size, 0, MAX_BATCH_SIZE)
    _between("batching.max_delay_microseconds", batching.max_delay_microseconds, 0, MAX_DELAY_MICROSECONDS)
    _between(
        "batching.latency_objective_microseconds",
        batching.latency_objective_microseconds,
        0,
        MAX_OBJECTIVE_MICROSECONDS,
    )
    return batching


def check_labels(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Returns the labels, sorted.

    Raises:
        InvalidArgument: too many, a key is empty, one is too long, or has a NUL, which Postgres cannot store.
    """
    _between("the number of labels", len(labels), 0, MAX_LABELS)
    for key, value in labels.items():
        _between(f"the length of label key {key[:80]!r}", len(key), 1, MAX_LABEL_LENGTH)
        _between(f"the length of the value of label {key[:80]!r}", len(value), 0, MAX_LABEL_LENGTH)
        if "\0" in key or "\0" in value:
            raise InvalidArgument(f"label {key[:80]!r} has a NUL in it.", metadata={"field": "labels"})
    return tuple(sorted(labels.items()))


def check_cacheable(cache: ResponseCache, versions: Iterable[Version]) -> None:
    """Returns if answers of these versions may be kept, where that is asked for.

    Raises:
        FailedPrecondition: one is an ensemble, whose answer depends on more than its version.
    """
    for version in versions if cache.enabled else ():
        if version.steps:
            raise FailedPrecondition(
                f"Answers of {version.key} cannot be kept: it is an ensemble, whose answers change with the "
                "models that its steps call. Keep those of its steps, or let equal requests wait for one "
                "answer (coalesce).",
                reason=Reason.INVALID_REQUEST,
                metadata={"version": str(version.key)},
            )


def _between(what: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise InvalidArgument(f"{what} is {value}; use {least} to {most}.", metadata={"field": what})
    return value
