"""What the use cases need of the world; adapters provide it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock_gateway.domain.statistics import Counters


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A deployment as the scheduler tells it.

    Attributes:
        ready: Every target has all its replicas.
        failed: It does not answer, and retrying has not helped.
        message: Why it stands where it stands.
        versions: Versions asked for.
    """

    ready: bool
    failed: bool
    message: str
    versions: tuple[int, ...]


class Scheduler(Protocol):
    """The scheduler's part in loading and unloading."""

    async def get(self, name: str) -> DeploymentView | None:
        """Return a deployment, or None if there is none of that name."""
        ...

    async def create(self, name: str, model: str, version: int) -> None:
        """Offer one version under a name."""
        ...

    async def update(self, name: str, model: str, version: int) -> None:
        """Let one version answer under a name that exists."""
        ...

    async def delete(self, name: str) -> None:
        """Stop offering a name."""
        ...

    def watch(self, name: str) -> AsyncIterator[DeploymentView]:
        """Follow a deployment until it is deleted."""
        ...


class Registry(Protocol):
    """The registry's part in loading and listing."""

    async def newest(self, model: str) -> int:
        """Return the number of the newest READY version of a model."""
        ...

    async def models(self) -> list[tuple[str, int]]:
        """Return name and newest version of all models; version 0 where there is none."""
        ...


class Statistics(Protocol):
    """Counters of replicas."""

    async def read(self, queue: str) -> list[Counters]:
        """Return the counters of a queue's replicas."""
        ...


class Queues(Statistics, Protocol):
    """What can be seen of queues from outside."""

    async def depths(self, queues: Sequence[str]) -> list[tuple[int, ...]]:
        """Return how many requests each queue holds, by priority, those being computed included."""
        ...
