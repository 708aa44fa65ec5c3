"""What callers do with deployments."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from penstock_kit.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from penstock_scheduler.domain.autoscaling.settings import Autoscaling
from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.deployment import (
    DEFAULT_QUEUE_DEPTH,
    NO_CACHE,
    Deployment,
    DeploymentState,
    ResponseCache,
    Revision,
    Spec,
    Target,
)
from penstock_scheduler.domain.node import NodeState
from penstock_scheduler.domain.planner.ensembles import callers_of
from penstock_scheduler.domain.planner.feasible import (
    Need,
    Placement,
    Rejection,
    Usage,
    check,
    closest,
)
from penstock_scheduler.domain.planner.snapshot import group_of
from penstock_scheduler.domain.project import DEFAULT_PROJECT, check_move, unknown_project
from penstock_scheduler.domain.resources import NO_RESOURCES, Batching, Defaults, Resources
from penstock_scheduler.domain.rollout import RolloutPolicy
from penstock_scheduler.domain.validate import (
    TargetAsked,
    check_autoscaling,
    check_cacheable,
    check_resolved,
    check_targets,
)
from penstock_scheduler.domain.version import Version, VersionKey
from penstock_scheduler.usecases.ports import DeploymentView, Registry, Uses, Wakeup, Work, Works

MAX_NODES_LOOKED_AT = 1000

Versions = Mapping[VersionKey, Version]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asks for; targets are not resolved yet."""

    targets: tuple[TargetAsked, ...]
    replicas: int = 1
    resources: Resources = NO_RESOURCES
    batching: Batching | None = None
    constraints: Constraints = NO_CONSTRAINTS
    labels: tuple[tuple[str, str], ...] = ()
    project: str = DEFAULT_PROJECT
    max_queue_depth: int = DEFAULT_QUEUE_DEPTH
    cache: ResponseCache = NO_CACHE
    rollout_policy: RolloutPolicy | None = None
    autoscaling: Autoscaling | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What a caller wants changed: those fields of `asked` that `fields` names."""

    asked: Asked
    fields: frozenset[str] = field(default_factory=frozenset)
    etag: str = ""


class Deployments:
    """Creates, changes and deletes deployments; the reconcile loop does the rest.

    Args:
        works: opens transactions.
        registry: asked which version a target means.
        wakeup: told of every change.
        defaults: needs of replicas where nobody stated them.
    """

    def __init__(self, works: Works, registry: Registry, wakeup: Wakeup, defaults: Defaults) -> None:
        self._works = works
        self._registry = registry
        self._wakeup = wakeup
        self._defaults = defaults

    async def create(
        self, name: str, asked: Asked, *, actor: str, request_id: str = "", fingerprint: str = ""
    ) -> DeploymentView:
        """Offers versions under a name.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: a model, version or alias does not exist.
            FailedPrecondition: a version is not READY, no node could ever hold a replica, or the
                request id was used for something else.
            Unavailable: the registry or the database cannot be reached.
        """
        if request_id:
            async with self._works() as work:
                earlier = await work.deployments.claim_request(request_id, fingerprint)
            if earlier is not None:
                return await self._seen(earlier)
        autoscaling = None if asked.autoscaling is None else check_autoscaling(asked.autoscaling)
        spec, versions = await self._resolve(asked)
        async with self._works() as work:
            if request_id:
                earlier = await work.deployments.claim_request(request_id, fingerprint)
                if earlier is not None:
                    return await self._seen(earlier)
            await self._check_placeable(work, spec, versions)
            check_cacheable(asked.cache, versions.values())
            await work.deployments.keep_versions(versions.values())
            present = await work.deployments.get(name)
            if present is not None and present.state is DeploymentState.DELETING:
                raise _being_deleted(name)
            now = datetime.now(UTC)
            made = await work.deployments.add(
                Deployment(
                    name=name,
                    asked=spec,
                    labels=asked.labels,
                    project=asked.project,
                    max_queue_depth=asked.max_queue_depth,
                    cache=asked.cache,
                    rollout_policy=asked.rollout_policy,
                    autoscaling=autoscaling,
                    message="Replicas are starting.",
                    create_time=now,
                    update_time=now,
                    updated_by=actor,
                )
            )
            await work.deployments.add_revision(made, "create")
            if request_id:
                await work.deployments.keep_request(request_id, fingerprint, made)
            await work.commit()
        self._wakeup.wake()
        return DeploymentView(made)

    async def get(self, name: str) -> DeploymentView:
        """One deployment.

        Raises:
            NotFound: there is none of that name.
        """
        async with self._works() as work:
            view = await work.deployments.view(name)
        if view is None:
            raise unknown_deployment(name)
        return view

    async def page(self, after: str, limit: int, uses: Uses | None) -> Sequence[DeploymentView]:
        """A page by name."""
        async with self._works() as work:
            return await work.deployments.views(after, limit, uses)

    async def update(
        self, name: str, changes: Changes, *, actor: str, request_id: str = "", fingerprint: str = ""
    ) -> DeploymentView:
        """Changes what is asked for. The earlier targets answer until the new ones do.

        Raises:
            NotFound: there is no such deployment, model, version or alias.
            Aborted: it changed since the caller read it (etag).
            FailedPrecondition: see `create`; or it is being deleted, or moves to a project whose quota has no
                room for it.
            Unavailable: the registry or the database cannot be reached.
        """
        asked = changes.asked
        if request_id:
            async with self._works() as work:
                earlier = await work.deployments.claim_request(request_id, fingerprint)
            if earlier is not None:
                return await self._seen(earlier)
        fresh: tuple[Spec, Versions] | None = None
        if "targets" in changes.fields:
            fresh = await self._resolve(asked)
        async with self._works() as work:
            if request_id:
                earlier = await work.deployments.claim_request(request_id, fingerprint)
                if earlier is not None:
                    return await self._seen(earlier)
            old = await self._lock_and_move(work, name, changes)
            spec = old.asked
            if fresh is not None:
                spec = replace(spec, targets=fresh[0].targets)
                await work.deployments.keep_versions(fresh[1].values())
            for key in ("replicas", "resources", "batching"):
                if key in changes.fields:
                    spec = replace(spec, **{key: getattr(asked, key)})
            for key in changes.fields.intersection(("node_selector", "tolerations")):
                constraints = replace(spec.constraints, **{key: getattr(asked.constraints, key)})
                spec = replace(spec, constraints=constraints)
            versions = await work.cluster.load_versions({t.version for t in spec.targets})
            await self._check_placeable(work, spec, versions)
            cache = _changed_cache(old.cache, changes)
            check_cacheable(cache, versions.values())
            changed = replace(
                old,
                labels=asked.labels if "labels" in changes.fields else old.labels,
                project=asked.project if "project" in changes.fields else old.project,
                max_queue_depth=(
                    asked.max_queue_depth if "max_queue_depth" in changes.fields else old.max_queue_depth
                ),
                cache=cache,
                rollout_policy=(
                    asked.rollout_policy if "rollout_policy" in changes.fields else old.rollout_policy
                ),
                autoscaling=_changed_autoscaling(old.autoscaling, changes),
                # Who says a number starts from it; the load decides what follows.
                scale=None if "replicas" in changes.fields else old.scale,
            )
            stored = await self._store(work, old, changed, spec, actor, "update")
            if request_id:
                await work.deployments.keep_request(request_id, fingerprint, stored)
            await work.commit()
        self._wakeup.wake()
        return await self.get(name)

    async def rollback(self, name: str, number: int, *, actor: str) -> DeploymentView:
        """Goes back to what was asked for at revision `number`; 0 means the one before the present.

        It goes past the rollout policy: who takes something back by hand has no time for steps.

        A target that follows an alias which has moved since is pinned to the version that the
        alias meant then: following it would undo the rollback at once.

        Raises:
            NotFound: there is no such deployment or revision.
            FailedPrecondition: it has only one revision; see also `create`.
            Unavailable: the registry or the database cannot be reached.
        """
        async with self._works() as work:
            old = await self._lock(work, name, "")
            target = number or old.revision - 1
            if target < 1:
                raise FailedPrecondition(
                    f"Deployment {name} has only one revision; there is nothing to go back to.",
                    reason=Reason.WRONG_STATE,
                    metadata={"deployment": name},
                )
            revision = await work.deployments.revision(old, target)
            if revision is None:
                raise NotFound(
                    f"Deployment {name} has no revision {target}; list them with "
                    f"`penstock deployments history {name}`.",
                    metadata={"deployment": name, "revision": str(target)},
                )
        spec, versions = await self._pin(revision)
        async with self._works() as work:
            present = await self._lock(work, name, old.etag)
            await work.deployments.keep_versions(versions)
            await self._check_placeable(work, spec, {v.key: v for v in versions})
            await self._store(work, present, present, spec, actor, f"rollback to {target}", at_once=True)
            await work.commit()
        self._wakeup.wake()
        return await self.get(name)

    async def delete(self, name: str, *, actor: str) -> None:
        """Stops offering it; its replicas finish what is queued. Deleting it twice is no error.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: a step of a deployed ensemble calls it; reason IN_USE.
        """
        async with self._works() as work:
            deployment = await work.deployments.get(name, lock=True)
            if deployment is None:
                raise unknown_deployment(name)
            if deployment.state is not DeploymentState.DELETING:
                stored = await work.cluster.load()
                caller = callers_of(name, stored.deployments.values(), stored.versions)
                if caller:
                    raise FailedPrecondition(
                        f"Deployment {name} cannot be deleted: {caller} calls it. Delete or change that "
                        "first.",
                        reason=Reason.IN_USE,
                        metadata={"deployment": name},
                    )
                now = datetime.now(UTC)
                ended = deployment.advance(DeploymentState.DELETING, now, "Its replicas finish their work.")
                await work.deployments.replace(replace(ended, updated_by=actor))
                await work.commit()
        self._wakeup.wake()

    async def revisions(self, name: str, before: int, limit: int) -> Sequence[Revision]:
        """What was asked for over time, newest first, below the number `before` (0: all).

        Raises:
            NotFound: there is no such deployment.
        """
        async with self._works() as work:
            deployment = await work.deployments.get(name)
            if deployment is None:
                raise unknown_deployment(name)
            return await work.deployments.revisions(deployment, before, limit)

    # -- parts ------------------------------------------------------------------------------------

    async def _seen(self, earlier: Deployment) -> DeploymentView:
        """What a repeated request gets: the deployment as it is now."""
        async with self._works() as work:
            view = await work.deployments.view(earlier.name)
        return view if view and view.deployment.uid == earlier.uid else DeploymentView(earlier)

    async def _resolve(self, asked: Asked) -> tuple[Spec, Versions]:
        targets = check_targets(asked.targets)
        versions = await asyncio.gather(*(self._registry.resolve(t.model, t.selector) for t in targets))
        resolved = tuple(
            Target(t.model, t.weight, v.key.number, t.alias) for t, v in zip(targets, versions, strict=True)
        )
        check_resolved(resolved)
        spec = Spec(resolved, asked.replicas, asked.resources, asked.batching, asked.constraints)
        return spec, {v.key: v for v in versions}

    async def _pin(self, revision: Revision) -> tuple[Spec, Collection[Version]]:
        """The spec of a revision, with aliases that point elsewhere now replaced by numbers."""
        versions: dict[VersionKey, Version] = {}
        targets = []
        for target in revision.spec.targets:
            version = await self._registry.resolve(target.model, str(target.resolved_version))
            versions[version.key] = version
            if target.alias:
                try:
                    now = await self._registry.resolve(target.model, target.alias)
                    moved = now.key != target.version
                except (NotFound, FailedPrecondition):
                    moved = True
                target = replace(target, alias="") if moved else target
            targets.append(target)
        check_resolved(targets)
        return replace(revision.spec, targets=tuple(targets)), tuple(versions.values())

    async def _lock(self, work: Work, name: str, etag: str) -> Deployment:
        deployment = await work.deployments.get(name, lock=True)
        if deployment is None:
            raise unknown_deployment(name)
        if deployment.state is DeploymentState.DELETING:
            raise _being_deleted(name)
        if etag and etag != deployment.etag:
            raise Aborted(
                f"Deployment {name} changed since it was read; read it again, then retry.",
                reason=Reason.CONFLICT,
                metadata={"deployment": name, "etag": deployment.etag},
            )
        return deployment

    async def _lock_and_move(self, work: Work, name: str, changes: Changes) -> Deployment:
        """Locks a deployment; if it is to move to another project, both projects too."""
        old = await self._lock(work, name, changes.etag)
        to = changes.asked.project
        if "project" in changes.fields and old.project != to:
            projects = await work.projects.lock({old.project, to})
            if to not in projects:
                raise unknown_project(to)
            moves = await work.projects.held_by(old.uid)
            check_move(name, projects[to], await work.projects.held(to), moves)
        return old

    async def _store(
        self,
        work: Work,
        old: Deployment,
        changed: Deployment,
        spec: Spec,
        actor: str,
        cause: str,
        *,
        at_once: bool = False,
    ) -> Deployment:
        """Stores a new revision; asking for what is asked for already makes none."""
        if changed == old and spec == old.asked:
            return old
        stored = changed.ask(spec, datetime.now(UTC), actor, at_once=at_once)
        await work.deployments.replace(stored)
        await work.deployments.add_revision(stored, cause)
        return stored

    async def _check_placeable(self, work: Work, spec: Spec, versions: Versions) -> None:
        """Refuses what no known node could hold even if it were empty."""
        nodes = [view.node for view in await work.cluster.nodes("", MAX_NODES_LOOKED_AT)]
        if not nodes or len(nodes) == MAX_NODES_LOOKED_AT:
            return  # nobody knows what nodes there will be, or there are more than were looked at
        empty = [
            Usage(replace(node, state=NodeState.READY, cordoned=False, draining=False)) for node in nodes
        ]
        for target in spec.targets:
            version = versions[target.version]
            resources = group_of(spec, version, self._defaults).resources
            if (resources.gpu_memory_bytes or resources.gpu_memory_millis) and not resources.gpus:
                raise InvalidArgument(
                    "Memory of GPUs is asked for, but no GPU; give resources.gpus too.",
                    metadata={"field": "resources.gpus"},
                )
            need = Need(version.runtime, resources, spec.constraints, version.digest)
            verdicts = [check(usage, need) for usage in empty]
            if any(isinstance(verdict, Placement) for verdict in verdicts):
                continue
            nearest = closest(v for v in verdicts if isinstance(v, Rejection))
            if nearest is not None:
                raise FailedPrecondition(
                    f"No node can ever hold a replica of {version.key}. The closest, nodes/{nearest.node}, "
                    f"lacks {nearest.lacks}. Ask for less, or add a node that has it.",
                    reason=Reason.UNPLACEABLE,
                    metadata={"node": nearest.node, "lacks": nearest.lacks, "version": str(version.key)},
                )


# Parts of the cache as an update mask names them, and as the domain does.
_CACHE_PARTS = {
    "cache.enabled": "enabled",
    "cache.ttl": "ttl_seconds",
    "cache.max_bytes": "max_bytes",
    "cache.coalesce": "coalesce",
}


def _changed_cache(old: ResponseCache, changes: Changes) -> ResponseCache:
    """The setting after an update, which may name the whole of it or parts."""
    asked = changes.asked.cache
    if "cache" in changes.fields:
        return asked
    named = {own: getattr(asked, own) for part, own in _CACHE_PARTS.items() if part in changes.fields}
    return replace(old, **named)


# Parts of the autoscaling likewise.
_AUTOSCALING_PARTS = {
    "autoscaling.min_replicas": "min_replicas",
    "autoscaling.max_replicas": "max_replicas",
    "autoscaling.queue_wait_objective": "queue_wait_seconds",
    "autoscaling.idle": "idle_seconds",
    "autoscaling.cool_down": "cool_down_seconds",
}


def _changed_autoscaling(old: Autoscaling | None, changes: Changes) -> Autoscaling | None:
    """The setting after an update, which may name the whole of it or parts; checked where it changes."""
    asked = changes.asked.autoscaling
    if "autoscaling" in changes.fields:
        return None if asked is None else check_autoscaling(asked)
    given = asked or Autoscaling(min_replicas=0)
    named = {own: getattr(given, own) for part, own in _AUTOSCALING_PARTS.items() if part in changes.fields}
    return check_autoscaling(replace(old or Autoscaling(), **named)) if named else old


def unknown_deployment(name: str) -> NotFound:
    """The error for a name that no deployment bears."""
    return NotFound(
        f"There is no deployment {name}; list them with `penstock deployments`, or deploy a model first.",
        reason=Reason.DEPLOYMENT_NOT_FOUND,
        metadata={"deployment": name},
    )


def _being_deleted(name: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"Deployment {name} is being deleted; wait until it is gone, then create it anew.",
        reason=Reason.WRONG_STATE,
        metadata={"deployment": name, "state": DeploymentState.DELETING.name},
    )
