# Made from _async/deployments.py by libs/make_sync.py; edit that and run it again.
"""Deployments: what is offered under a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import grpc
from google.protobuf import field_mask_pb2

from penstock._sync import io
from penstock._sync.nodes import Nodes
from penstock.common.v1 import resources_pb2
from penstock.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
)
from penstock.names import parse_version, resource, short
from penstock.scheduler.v1 import deployment_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as scheduler
from penstock.traffic import describe_state, parse_traffic
from penstock.transport import Attempts, new_request_id, translate

# google.protobuf.Duration ends at some 10,000 years.
_MAX_DURATION_SECONDS = 3e11
_MAX_INT32 = 2**31 - 1

DeploymentCallback = Callable[[deployment_pb2.Deployment], None]


class Deployments(Nodes):
    """What is offered under a name."""

    def deploy(
        self,
        name: str,
        model: str | None = None,
        *,
        traffic: Mapping[str | int, int] | None = None,
        targets: Sequence[deployment_pb2.Target] | None = None,
        replicas: int | None = None,
        resources: resources_pb2.Resources | None = None,
        batching: resources_pb2.Batching | None = None,
        labels: Mapping[str, str] | None = None,
        max_queue_depth: int | None = None,
        node_selector: Mapping[str, str] | None = None,
        tolerations: Mapping[str, str] | None = None,
        cache: bool | None = None,
        cache_ttl: float | None = None,
        cache_bytes: int | None = None,
        coalesce: bool | None = None,
        autoscaling: Mapping[str, float] | None = None,
        rollout_policy: deployment_pb2.RolloutPolicy | None = None,
        project: str | None = None,
        request_id: str | None = None,
    ) -> deployment_pb2.Deployment:
        """Offer versions of a model under a name, or change what is offered there; return at once.

        Args:
            name: Name of the deployment; callers use it as the model name.
            model: What to serve: ``digits:3``, ``digits@champion`` (followed when it moves) or ``digits``
                (the version that is newest now). Without one, the model of the deployment's own name.
            traffic: Versions of that model with their percentages: {1: 90, 2: 10} or {"champion": 100}.
            targets: The same in full, for targets of several models; instead of `model` and `traffic`.
            replicas: Replicas per target.
            resources: What one replica needs, where the manifest's wish is not to be followed.
            batching: How requests are joined, where the manifest's wish is not to be followed.
            labels: Free key-value pairs.
            project: Whose quota its replicas count against; another one replaces nothing.
            max_queue_depth: Unanswered requests at one gateway at most.
            node_selector: Labels that a node must have, with these values; {} lifts what was asked before.
            tolerations: Taints of nodes that its replicas bear, by key; any value of it where that is empty.
            cache: Keep answers and give them to equal requests; for models whose answer depends on their
                input alone.
            cache_ttl: Seconds that an answer is kept.
            cache_bytes: Bytes of answers that one gateway process keeps at most.
            coalesce: Let a request wait for the answer to an equal one that is being computed.
            autoscaling: Let the number of replicas follow the load: min_replicas (1; 0 lets the last one
                end), max_replicas, and in seconds queue_wait_objective, idle and cool_down; what is left out
                stays as it is. {} keeps the number at `replicas` again.
            rollout_policy: How new versions take over from now on; see `penstock.rollouts.rollout_policy`.
            request_id: A key (a UUID) that makes a repetition safe.

        Raises:
            InvalidArgument: A number is negative, absurd, or contradicts another.
            NotFound: There is no such model, version or alias.
        """
        if targets is None:
            targets = self._targets(model or short(name), traffic)
        elif model is not None or traffic is not None:
            raise InvalidArgument("Give either targets, or model and traffic.")
        wanted = deployment_pb2.Deployment(
            name=resource("deployments", name),
            targets=targets,
            replicas=replicas or 0,
            resources=resources,
            batching=batching,
            labels=labels or {},
            max_queue_depth=max_queue_depth or 0,
            node_selector=node_selector or {},
            tolerations=[
                deployment_pb2.Toleration(key=key, value=value) for key, value in (tolerations or {}).items()
            ],
            cache=_cache(cache, cache_ttl, cache_bytes, coalesce),
            rollout_policy=rollout_policy,
            autoscaling=_autoscaling(autoscaling),
            project=resource("projects", project) if project else "",
        )
        given = {
            "targets": targets,
            "replicas": replicas,
            "resources": resources,
            "batching": batching,
            "labels": labels,
            "max_queue_depth": max_queue_depth,
            "node_selector": node_selector,
            "tolerations": tolerations,
            "cache.enabled": cache,
            "cache.ttl": cache_ttl,
            "cache.max_bytes": cache_bytes,
            "cache.coalesce": coalesce,
            "rollout_policy": rollout_policy,
            "project": project,
            "autoscaling": autoscaling if autoscaling == {} else None,
            **{f"autoscaling.{part}": value for part, value in (autoscaling or {}).items()},
        }
        key = request_id or new_request_id()
        try:
            create = scheduler.CreateDeploymentRequest(deployment=wanted, request_id=key)
            return self._unary(self._scheduler.CreateDeployment, create)
        except AlreadyExists:
            paths = [path for path, value in given.items() if value is not None]
            return self._update(wanted, paths, key)

    def set_traffic(self, name: str, traffic: Mapping[str | int, int]) -> deployment_pb2.Deployment:
        """Give the versions of a deployment's model these percentages: {1: 90, 2: 10}.

        Raises:
            InvalidArgument: They do not sum to 100, or the deployment serves several models.
        """
        current = self.get_deployment(name)
        models = {target.model for target in current.targets}
        if len(models) != 1:
            raise InvalidArgument(
                f"{short(name)} serves {len(models)} models ({', '.join(sorted(map(short, models)))}); "
                "give its targets in full with deploy."
            )
        targets = self._targets(short(models.pop()), traffic)
        wanted = deployment_pb2.Deployment(name=current.name, targets=targets)
        return self._update(wanted, ["targets"], new_request_id())

    def scale(self, name: str, replicas: int) -> deployment_pb2.Deployment:
        """Change the number of replicas per target."""
        wanted = deployment_pb2.Deployment(name=resource("deployments", name), replicas=replicas)
        return self._update(wanted, ["replicas"], new_request_id())

    def set_cache(
        self,
        name: str,
        enabled: bool | None = None,
        *,
        ttl: float | None = None,
        max_bytes: int | None = None,
        coalesce: bool | None = None,
    ) -> deployment_pb2.Deployment:
        """Change how equal requests to a deployment are answered; what is None stays as it is.

        Args:
            name: Name of the deployment.
            enabled: Keep answers and give them to equal requests; for models whose answer depends on their
                input alone.
            ttl: Seconds that an answer is kept.
            max_bytes: Bytes of answers that one gateway process keeps at most.
            coalesce: Let a request wait for the answer to an equal one that is being computed.
        """
        given = {"enabled": enabled, "ttl": ttl, "max_bytes": max_bytes, "coalesce": coalesce}
        paths = [f"cache.{part}" for part, value in given.items() if value is not None]
        if not paths:
            raise InvalidArgument("Say what of the cache to change.")
        wanted = deployment_pb2.Deployment(
            name=resource("deployments", name), cache=_cache(enabled, ttl, max_bytes, coalesce)
        )
        return self._update(wanted, paths, new_request_id())

    def rollback(self, name: str, revision: int = 0) -> deployment_pb2.Deployment:
        """Go back to an earlier revision; 0 is the one before the present."""
        request = scheduler.RollbackDeploymentRequest(name=resource("deployments", name), revision=revision)
        return self._unary(self._scheduler.RollbackDeployment, request, retry=False)

    def undeploy(self, name: str) -> None:
        """Stop offering a deployment; its replicas finish what is queued."""
        self._delete(
            self._scheduler.DeleteDeployment,
            scheduler.DeleteDeploymentRequest(name=resource("deployments", name)),
        )

    def get_deployment(self, name: str) -> deployment_pb2.Deployment:
        """Return a deployment.

        Raises:
            NotFound: There is none of that name.
        """
        request = scheduler.GetDeploymentRequest(name=resource("deployments", name))
        return self._unary(self._scheduler.GetDeployment, request)

    def list_deployments(
        self, *, uses: str = "", limit: int | None = None
    ) -> list[deployment_pb2.Deployment]:
        """Return all deployments, or those that use ``models/{model}`` (or a version or alias of it)."""
        request = scheduler.ListDeploymentsRequest(uses=uses)
        return self._list(self._scheduler.ListDeployments, request, lambda page: page.deployments, limit)

    def list_deployment_revisions(
        self, name: str, *, limit: int | None = None
    ) -> list[deployment_pb2.DeploymentRevision]:
        """Return what was asked for over time, newest first."""
        request = scheduler.ListDeploymentRevisionsRequest(parent=resource("deployments", name))
        return self._list(
            self._scheduler.ListDeploymentRevisions, request, lambda page: page.revisions, limit
        )

    def wait_for_deployment(
        self,
        name: str,
        *,
        revision: int = 0,
        timeout: float = 120.0,
        on_change: DeploymentCallback | None = None,
    ) -> deployment_pb2.Deployment:
        """Wait until every target of a deployment has all its replicas ready.

        Args:
            name: Name of the deployment.
            revision: The revision that must have been taken up (that of a deployment just returned).
            timeout: Seconds to wait.
            on_change: Told of the deployment at once and at every change.

        Raises:
            FailedPrecondition: It FAILED; the words are the scheduler's.
            DeadlineExceeded: It is not ready yet; the words say where it stands.
            NotFound: It was deleted.
        """
        attempts = Attempts(timeout, timeout)
        request = scheduler.WatchDeploymentRequest(name=resource("deployments", name))
        last: deployment_pb2.Deployment | None = None
        while True:
            pause = 0.1
            try:
                for seen in self._scheduler.WatchDeployment(request, timeout=attempts.left()):
                    last = seen
                    if on_change is not None:
                        on_change(seen)
                    if seen.revision < revision:
                        continue
                    if seen.state == deployment_pb2.DEPLOYMENT_STATE_READY:
                        return seen
                    if seen.state == deployment_pb2.DEPLOYMENT_STATE_FAILED:
                        raise FailedPrecondition(
                            f"{short(name)} failed: {seen.message}",
                            reason=Reason.LOAD_FAILED,
                            metadata={"deployment": short(name)},
                        )
                    if seen.state == deployment_pb2.DEPLOYMENT_STATE_DELETING:
                        raise NotFound(f"{short(name)} is being deleted.", reason=Reason.DEPLOYMENT_NOT_FOUND)
            except (grpc.RpcError, DeadlineExceeded) as error:
                failure = translate(error, self.endpoint) if isinstance(error, grpc.RpcError) else error
                if isinstance(failure, DeadlineExceeded):
                    raise DeadlineExceeded(
                        f"{short(name)} is not ready after {timeout:g} s: {describe_state(last)}"
                    ) from error
                pause = attempts.pause_after(failure)
            io.sleep(pause)

    def _targets(
        self, model: str, traffic: Mapping[str | int, int] | None
    ) -> Sequence[deployment_pb2.Target]:
        if traffic is not None:
            return parse_traffic(model, traffic)
        ref = parse_version(model)
        if ref.alias:
            return [deployment_pb2.Target(model=resource("models", ref.model), alias=ref.alias, weight=100)]
        number = ref.number or (self.get_version(ref)).number
        return [deployment_pb2.Target(model=resource("models", ref.model), version=number, weight=100)]

    def _update(
        self, wanted: deployment_pb2.Deployment, paths: Sequence[str], request_id: str
    ) -> deployment_pb2.Deployment:
        request = scheduler.UpdateDeploymentRequest(
            deployment=wanted, update_mask=field_mask_pb2.FieldMask(paths=paths), request_id=request_id
        )
        return self._unary(self._scheduler.UpdateDeployment, request)


def _autoscaling(parts: Mapping[str, float] | None) -> deployment_pb2.Autoscaling | None:
    if not parts:
        return None
    # Only who says so lets the last replica end.
    message = deployment_pb2.Autoscaling(min_replicas=1)
    for part, value in parts.items():
        if part in ("min_replicas", "max_replicas"):
            if not -_MAX_INT32 <= value <= _MAX_INT32:
                raise InvalidArgument(f"A deployment cannot have {value:g} replicas.")
            setattr(message, part, int(value))
        elif part in ("queue_wait_objective", "idle", "cool_down"):
            if not abs(value) < _MAX_DURATION_SECONDS:
                raise InvalidArgument(f"{part} cannot be {value:g} s.")
            getattr(message, part).FromNanoseconds(round(value * 1e9))
        else:
            known = ", ".join(field.name for field in message.DESCRIPTOR.fields)
            raise InvalidArgument(f"autoscaling has no {part}; it has {known}.")
    return message


def _cache(
    enabled: bool | None, ttl: float | None, max_bytes: int | None, coalesce: bool | None
) -> deployment_pb2.ResponseCache | None:
    if enabled is None and ttl is None and max_bytes is None and coalesce is None:
        return None
    message = deployment_pb2.ResponseCache(
        enabled=bool(enabled), max_bytes=max_bytes or 0, coalesce=bool(coalesce)
    )
    if ttl is not None:
        if not abs(ttl) < _MAX_DURATION_SECONDS:
            raise InvalidArgument(f"A cache cannot keep answers for {ttl:g} s.")
        message.ttl.FromNanoseconds(round(ttl * 1e9))
    return message
