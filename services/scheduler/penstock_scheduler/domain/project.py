"""Projects: whose deployments and jobs share a quota, and how large a share of the cluster each may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from penstock_kit.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from penstock_scheduler.domain.resources import Resources, human_bytes

DEFAULT_PROJECT = "default"
"""Always there; takes what names no other."""
QUOTA_FULL = "The quota has no room: "
"""How the message of what waits for its quota begins; no room on nodes would help it."""
MAX_DESCRIPTION = 1000
# A share is a quotient of weights: beyond this the smaller one would get nothing at all.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6
LARGEST_QUOTA = 2**53
_WHOLE = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Holding(NamedTuple):
    """What something holds of the cluster: thousandths of cores, bytes of memory, thousandths of GPUs."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    gpu_millis: int = 0

    def plus(self, other: Holding) -> Holding:
        """Both together."""
        return Holding(
            self.cpu_millis + other.cpu_millis,
            self.memory_bytes + other.memory_bytes,
            self.gpu_millis + other.gpu_millis,
        )

    def minus(self, other: Holding) -> Holding:
        """What is left without the other; negative where the other is more."""
        return Holding(
            self.cpu_millis - other.cpu_millis,
            self.memory_bytes - other.memory_bytes,
            self.gpu_millis - other.gpu_millis,
        )

    def times(self, count: int) -> Holding:
        """So many of it."""
        return Holding(self.cpu_millis * count, self.memory_bytes * count, self.gpu_millis * count)

    def within(self, room: Holding) -> bool:
        """Whether there is room for all of it; nothing needs no room, even where there is less than none."""
        return all(need <= 0 or need <= free for need, free in zip(self, room, strict=True))

    def share_of(self, total: Holding) -> float:
        """The largest part of any resource that it is: its dominant share."""
        return max(
            (held / whole if whole > 0 else float(held > 0)) for held, whole in zip(self, total, strict=True)
        )


NOTHING = Holding()
UNBOUNDED = 2**62
"""Room where a quota bounds nothing; sums with it stay within 64 bits."""


@dataclass(frozen=True, slots=True)
class Project:
    """A project as the planner sees it.

    Attributes:
        name: the id in `projects/{id}`.
        quota: what its replicas and tasks may hold together; what is 0 is unbounded.
        weight: its share beside other projects when all want more than there is.
        description: what it is for, for people.
        revision: counts the changes, from 1.
    """

    name: str
    quota: Holding = NOTHING
    weight: float = 1.0
    description: str = ""
    revision: int = 1
    create_time: datetime = _EPOCH
    update_time: datetime = _EPOCH
    uid: int = 0

    @property
    def etag(self) -> str:
        """Changes with every update."""
        return f"{self.uid}-{self.revision}"

    @property
    def bounds(self) -> Holding:
        """What it may hold, with a number also where there is no bound."""
        return Holding(*(bound or UNBOUNDED for bound in self.quota))


def gpu_millis(resources: Resources, sizes: Iterable[int]) -> int:
    """Thousandths of GPUs that something holds: one held alone counts whole, a part as it is, rounded.

    The database counts in the same way (0007_projects).

    Args:
        resources: what it holds.
        sizes: bytes of each of its GPUs.
    """
    if resources.exclusive:
        return _WHOLE * resources.gpus
    return sum(_part(resources.gpu_bytes(size), size) for size in sizes)


def _part(count: int, size: int) -> int:
    if size <= 0:
        return _WHOLE
    return min(_WHOLE, max(1, (2 * _WHOLE * count + size) // (2 * size)))


def charge(resources: Resources, sizes: Iterable[int]) -> Holding:
    """What a replica or task counts towards the quota of its project.

    Args:
        resources: what it holds.
        sizes: bytes of each of its GPUs.
    """
    millis = gpu_millis(resources, sizes) if resources.gpus else 0
    return Holding(resources.cpu_millis, resources.memory_bytes, millis)


@dataclass(frozen=True, slots=True)
class _Column:
    """One resource beside its bound, and how it is written."""

    of: str
    write: Callable[[int], str]
    held: int
    bound: int
    needs: int


def _columns(held: Holding, quota: Holding, needs: Holding) -> Iterable[_Column]:
    yield _Column("cores", _thousandths, held.cpu_millis, quota.cpu_millis, needs.cpu_millis)
    yield _Column("of memory", human_bytes, held.memory_bytes, quota.memory_bytes, needs.memory_bytes)
    yield _Column("GPUs", _thousandths, held.gpu_millis, quota.gpu_millis, needs.gpu_millis)


def _thousandths(millis: int) -> str:
    return f"{millis / _WHOLE:g}"


def quota_words(project: str, held: Holding, quota: Holding, needs: Holding) -> str:
    """Says what is in the way: `project x holds 3.5 of 4 cores (this needs 1)`; empty if nothing is.

    Args:
        project: its name.
        held: what it holds.
        quota: what it may hold; 0 for unbounded.
        needs: what is wanted beside that.
    """
    parts = [
        f"{each.write(each.held)} of {each.write(each.bound)} {each.of} (this needs {each.write(each.needs)})"
        for each in _columns(held, quota, needs)
        if each.needs > 0 and each.bound and each.held + each.needs > each.bound
    ]
    return f"project {project} holds {' and '.join(parts)}" if parts else ""


def held_words(held: Holding, quota: Holding) -> str:
    """Says what is held beyond a quota: `4 cores, more than 2`; empty if nothing is."""
    return " and ".join(
        f"{each.write(each.held)} {each.of}, more than {each.write(each.bound)}"
        for each in _columns(held, quota, NOTHING)
        if each.bound and each.held > each.bound
    )


# -- what callers ask for ---------------------------------------------------------------------------


def quota_of(resources: Resources) -> Holding:
    """The quota that resources mean.

    Raises:
        InvalidArgument: a number is negative or absurd, or bounds what cannot be bounded.
    """
    for field in ("gpu_memory_bytes", "disk_bytes"):
        if getattr(resources, field):
            raise InvalidArgument(
                f"A quota cannot bound {field}; it bounds cpu_millis, memory_bytes and gpus (with "
                "gpu_memory_millis for a part of one).",
                metadata={"field": f"quota.{field}"},
            )
    for field in ("cpu_millis", "memory_bytes", "gpus", "gpu_memory_millis"):
        value = getattr(resources, field)
        if not 0 <= value <= LARGEST_QUOTA:
            raise InvalidArgument(
                f"quota.{field} is {value}; use 0 (unbounded) to {LARGEST_QUOTA}.",
                metadata={"field": f"quota.{field}"},
            )
    millis = _WHOLE * resources.gpus + resources.gpu_memory_millis
    return Holding(resources.cpu_millis, resources.memory_bytes, millis)


def resources_of(holding: Holding) -> Resources:
    """The inverse of `quota_of`."""
    whole, millis = divmod(holding.gpu_millis, _WHOLE)
    return Resources(holding.cpu_millis, holding.memory_bytes, whole, gpu_memory_millis=millis)


def check_weight(weight: float) -> float:
    """Returns the weight, 1 for 0.

    Raises:
        InvalidArgument: negative, no number, or absurd.
    """
    if weight == 0:
        return 1.0
    if not math.isfinite(weight) or not LEAST_WEIGHT <= weight <= LARGEST_WEIGHT:
        raise InvalidArgument(
            f"weight is {weight:g}; use {LEAST_WEIGHT:g} to {LARGEST_WEIGHT:g}, or 0 for 1.",
            metadata={"field": "weight"},
        )
    return weight


def check_description(text: str) -> str:
    """Returns the description.

    Raises:
        InvalidArgument: it is too long, or has a NUL, which Postgres cannot store.
    """
    if len(text) > MAX_DESCRIPTION or "\0" in text:
        raise InvalidArgument(
            f"description has {len(text)} characters; use at most {MAX_DESCRIPTION}, and no NUL.",
            metadata={"field": "description"},
        )
    return text


def check_quota(project: Project, held: Holding) -> None:
    """Lets pass a project whose quota is not below what it holds.

    Raises:
        FailedPrecondition: it is; reason QUOTA_BELOW_USE.
    """
    words = held_words(held, project.quota)
    if words:
        raise FailedPrecondition(
            f"Project {project.name} holds {words}. End some of it first, or allow it: what runs stays then, "
            "and nothing new is placed until enough has ended.",
            reason=Reason.QUOTA_BELOW_USE,
            metadata={"project": project.name},
        )


def check_move(deployment: str, project: Project, held: Holding, moves: Holding) -> None:
    """Lets pass a deployment that moves into a project whose quota has room for what it holds.

    Raises:
        FailedPrecondition: it has not; reason QUOTA_BELOW_USE.
    """
    words = quota_words(project.name, held, project.quota, moves)
    if words:
        raise FailedPrecondition(
            f"Deployment {deployment} cannot move: {words}. Ask for fewer replicas, or for a larger quota.",
            reason=Reason.QUOTA_BELOW_USE,
            metadata={"project": project.name, "deployment": deployment},
        )


def unknown_project(name: str) -> NotFound:
    """There is no such project."""
    return NotFound(
        f"There is no project {name}; list them with `penstock projects`, or create it.",
        reason=Reason.RESOURCE_NOT_FOUND,
        metadata={"project": name},
    )


def known(projects: Mapping[str, Project], name: str) -> Project:
    """A project by name; one without bounds where nobody knows it."""
    return projects.get(name) or Project(name)
