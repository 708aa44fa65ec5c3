"""What is offered: readiness, descriptions, counters, the index."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from penstock_gateway.domain.statistics import Counters, total
from penstock_gateway.usecases.ports import Registry, Statistics
from penstock_kit.errors import InvalidArgument, NotFound, PenstockError
from penstock_kit.routing.table import Route, Table, Target, split_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """A deployment and the version of it that a caller asked for.

    Attributes:
        name: As the caller wrote it.
        route: The deployment.
        target: The version asked for; the first that answers if none was.
        versions: All that can be reached, ascending.
    """

    name: str
    route: Route
    target: Target
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository index: state is READY or UNAVAILABLE, as Triton says it."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class VersionCounters:
    """Counters of one version behind a deployment."""

    name: str
    version: int
    counters: Counters


class Catalog:
    """Answers questions about what is offered, out of the routing table.

    Args:
        table: Gives the routing table of the moment.
        registry: Knows models that are not deployed.
        statistics: Knows what replicas did.
    """

    def __init__(self, table: Callable[[], Table], registry: Registry, statistics: Statistics) -> None:
        self._table = table
        self._registry = registry
        self._statistics = statistics

    def offer(self, name: str, selector: str = "") -> Offer:
        """Return what a name (which may be "name@alias") and a version, if given, stand for.

        Raises:
            InvalidArgument: The name is empty or selects twice.
            NotFound: No such deployment, version or alias.
            Unavailable: No routing table has come yet.
        """
        deployment, selector = split_name(name, selector)
        route = self._table().find(deployment)
        target = route.select(selector, 0.0)
        versions = tuple(sorted({t.version for t in route.targets}))
        return Offer(name, route, target, versions)

    def ready(self, name: str, selector: str = "") -> bool:
        """Return whether a replica would answer a request now.

        Raises:
            InvalidArgument: The name is empty or selects twice.
            NotFound: No such deployment, version or alias.
            Unavailable: No routing table has come yet.
        """
        return self.offer(name, selector).target.ready

    def names(self) -> list[str]:
        """Return the names of all deployments."""
        return sorted(self._table().routes)

    async def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """Return every version behind every deployment, and the models that are not deployed.

        Raises:
            Unavailable: The registry cannot be reached (not asked for what is ready only).
        """
        entries = []
        routes = self._table().routes
        for name in sorted(routes):
            route = routes[name]
            for target in sorted(route.targets, key=lambda t: t.version):
                state = "READY" if target.ready else "UNAVAILABLE"
                reason = "" if target.ready else route.message or "no replica is ready"
                entries.append(IndexEntry(name, str(target.version), state, reason))
        if ready_only:
            return [entry for entry in entries if entry.state == "READY"]
        for name, version in await self._registry.models():
            if name not in routes:
                entries.append(
                    IndexEntry(name, str(version) if version else "", "UNAVAILABLE", "not deployed")
                )
        return entries

    async def statistics(self, name: str = "", selector: str = "") -> list[VersionCounters]:
        """Return counters of one version, of all versions of a deployment, or of all deployments.

        Raises:
            InvalidArgument: A version without a name.
            NotFound: No such deployment, version or alias.
            Unavailable: Redis cannot be reached.
        """
        if not name:
            if selector:
                raise InvalidArgument("A version without a model name says nothing; give both.")
            chosen = [(n, t) for n, route in sorted(self._table().routes.items()) for t in route.targets]
        else:
            deployment, selector = split_name(name, selector)
            route = self._table().find(deployment)
            targets = (route.named(selector),) if selector else route.targets
            chosen = [(deployment, target) for target in targets]
        parts = await asyncio.gather(*(self._statistics.read(target.queue) for _, target in chosen))
        return [
            VersionCounters(name, target.version, total(part))
            for (name, target), part in zip(chosen, parts, strict=True)
        ]


def is_ready(catalog: Catalog, name: str, selector: str) -> bool:
    """Return whether a name would be answered now; False for what is not offered."""
    try:
        return catalog.ready(name, selector)
    except NotFound:
        return False
    except PenstockError as error:
        if isinstance(error, InvalidArgument):
            raise
        return False
