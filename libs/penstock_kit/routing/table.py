"""The routing table: who answers under which name.

Pure: the choice among weighted targets depends on a fraction that the caller draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock_kit.errors import InvalidArgument, NotFound, Reason, Unavailable
from penstock_kit.routing.model import Description


@dataclass(frozen=True, slots=True)
class Target:
    """One version behind a deployment.

    Attributes:
        model: models/{model}.
        version: Its number.
        weight: Its part of the sum over the route; with 0 it is reached only by number or alias.
        queue: Where its requests go.
        ready_replicas: How many would answer now.
        description: What it takes and gives.
        aliases: Names that point at the version now.
        digest: Tree digest of the version.
        mirror_percent: Percent of the route's requests of which it gets a copy, besides what it answers.
        mirror_tolerance: How far numbers of its copies' answers may differ, relative to the larger.
    """

    model: str
    version: int
    weight: int
    queue: str
    ready_replicas: int
    description: Description
    aliases: frozenset[str] = frozenset()
    digest: str = ""
    mirror_percent: int = 0
    mirror_tolerance: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether a replica would answer now."""
        return self.ready_replicas > 0


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How equal requests to one deployment are answered.

    Attributes:
        keep: Whether answers are kept and given to equal requests.
        ttl_seconds: How long an answer is kept.
        max_bytes: Bytes of answers that one gateway process keeps at most.
        coalesce: Whether a request waits for an equal one that is being computed.
    """

    keep: bool = False
    ttl_seconds: float = 60.0
    max_bytes: int = 64 << 20
    coalesce: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One deployment.

    Attributes:
        deployment: The name callers use.
        targets: Versions that can be reached.
        max_queue_depth: Unanswered requests at one gateway at most.
        message: Why nothing would answer, if so.
        may_wait: Whether its replicas come back by themselves, or are brought back by a request (from
            zero), so that a request may wait for them within its deadline.
        cache: How equal requests are answered; None where each is computed.
        failed: Whether nothing answers although it was tried again and again: who waits is told.
    """

    deployment: str
    targets: tuple[Target, ...]
    max_queue_depth: int
    message: str = ""
    may_wait: bool = False
    cache: CachePolicy | None = None
    failed: bool = False

    @property
    def ready(self) -> bool:
        """Whether a request without a selector would be answered now."""
        return any(target.ready for target in self.targets if target.weight > 0)

    def select(self, selector: str, fraction: float) -> Target:
        """Return the target that a request goes to.

        Args:
            selector: A version number, an alias (with or without "@"), or nothing for a choice by weight.
            fraction: From 0 up to but without 1; where in the sum of the weights the request falls.

        By weight, targets that would answer now come before those that would not.

        Raises:
            NotFound: No target has that version or alias.
        """
        return self.named(selector) if selector else self.weighted(fraction)

    def named(self, selector: str) -> Target:
        """Return the target with that version number or alias.

        Raises:
            NotFound: There is none.
            InvalidArgument: The selector is no name at all.
        """
        alias = selector.removeprefix("@")
        if alias.isascii() and alias.isdigit() and alias == selector:
            number = int(alias) if len(alias) < 10 else -1
            for target in self.targets:
                if target.version == number:
                    return target
            versions = ", ".join(str(v) for v in sorted({t.version for t in self.targets})) or "none"
            raise NotFound(
                f"Deployment {self.deployment} does not serve version {selector}; it serves {versions}.",
                reason=Reason.VERSION_NOT_FOUND,
                metadata={"deployment": self.deployment, "version": selector},
            )
        if not alias:
            raise InvalidArgument("An alias must follow '@'.")
        for target in self.targets:
            if alias in target.aliases:
                return target
        known = ", ".join(sorted(set().union(*(t.aliases for t in self.targets)))) or "none"
        raise NotFound(
            f"No version that deployment {self.deployment} serves has the alias {alias[:64]!r}; "
            f"aliases there: {known}.",
            reason=Reason.ALIAS_NOT_FOUND,
            metadata={"deployment": self.deployment, "alias": alias[:64]},
        )

    def weighted(self, fraction: float) -> Target:
        """Return the target that a fraction of the traffic falls on.

        Raises:
            Unavailable: The route has no target at all.
        """
        candidates = [t for t in self.targets if t.weight > 0 and t.ready]
        if not candidates:
            candidates = [t for t in self.targets if t.weight > 0] or list(self.targets)
        if not candidates:
            raise not_ready(self)
        point = fraction * sum(max(t.weight, 1) for t in candidates)
        for target in candidates:
            point -= max(target.weight, 1)
            if point < 0:
                return target
        return candidates[-1]


@dataclass(frozen=True, slots=True)
class Table:
    """All routes at one moment.

    Attributes:
        generation: Grows with every change; 0 before the first table came.
        routes: By deployment.
    """

    generation: int = 0
    routes: Mapping[str, Route] = field(default_factory=dict)

    def find(self, name: str) -> Route:
        """Return the route of a deployment.

        Raises:
            InvalidArgument: The name is empty.
            NotFound: There is no such deployment.
            Unavailable: No table came yet, so nobody can say.
        """
        route = self.routes.get(name)
        if route is not None:
            return route
        if not name:
            raise InvalidArgument("The model name is missing.")
        if self.generation == 0:
            raise Unavailable(
                "There is no routing table yet; the scheduler has not answered. Retry.",
                retry_after_seconds=1,
            )
        raise NotFound(
            f"No deployment is offered under the name {name[:128]!r}. "
            "List them with `penstock deployments list`, or deploy the model first.",
            reason=Reason.DEPLOYMENT_NOT_FOUND,
            metadata={"deployment": name[:128]},
        )

    def queues(self) -> frozenset[str]:
        """Return the names of all queues that requests may go to."""
        return frozenset(t.queue for route in self.routes.values() for t in route.targets)


def split_name(name: str, selector: str) -> tuple[str, str]:
    """Return deployment and selector out of a model name, which may be "name@alias", and a version.

    Raises:
        InvalidArgument: Both the name and the version select, and differ.
    """
    if "@" not in name:
        return name, selector
    name, _, alias = name.partition("@")
    if not alias:
        raise InvalidArgument("An alias must follow '@' in the model name.")
    if selector and selector.removeprefix("@") != alias:
        raise InvalidArgument(
            f"The model name selects {alias[:64]!r}, the version field {selector[:64]!r}; give one of them."
        )
    return name, f"@{alias}"


def not_ready(route: Route) -> Unavailable:
    """Return the error of a deployment that nothing would answer for."""
    why = route.message or "no replica has become ready yet"
    return Unavailable(
        f"Deployment {route.deployment} is not ready: {why}",
        reason=Reason.NOT_READY,
        metadata={"deployment": route.deployment},
        retry_after_seconds=1,
    )
