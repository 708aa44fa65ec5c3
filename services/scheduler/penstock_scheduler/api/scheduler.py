"""SchedulerService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from penstock.scheduler.v1 import deployment_pb2, node_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.rpc import principal
from penstock_scheduler.api import convert, node_messages
from penstock_scheduler.api.paging import decode_number, decode_token, encode_token, page_size
from penstock_scheduler.api.requests import fingerprint, request_id
from penstock_scheduler.api.rollouts import RolloutServicer
from penstock_scheduler.usecases.deployments import Changes, Deployments
from penstock_scheduler.usecases.inspect import Inspect
from penstock_scheduler.usecases.nodes import Nodes
from penstock_scheduler.usecases.reconcile import Reconciler
from penstock_scheduler.usecases.rollouts import Rollouts
from penstock_scheduler.usecases.watch import watch_deployment

Context = grpc.aio.ServicerContext[Any, Any]

_CHANGEABLE = (
    "targets",
    "replicas",
    "resources",
    "batching",
    "labels",
    "max_queue_depth",
    "cache",
    "rollout_policy",
    "autoscaling",
    "node_selector",
    "tolerations",
    "project",
)
_CHANGEABLE_PARTS = tuple(
    f"{whole}.{part.name}"
    for whole, kind in (("cache", deployment_pb2.ResponseCache), ("autoscaling", deployment_pb2.Autoscaling))
    for part in kind.DESCRIPTOR.fields
)


class SchedulerServicer(RolloutServicer):
    """Deployments, and what carries them."""

    def __init__(
        self,
        deployments: Deployments,
        rollouts: Rollouts,
        nodes: Nodes,
        inspect: Inspect,
        reconciler: Reconciler,
    ) -> None:
        super().__init__(rollouts)
        self._deployments = deployments
        self._nodes = nodes
        self._inspect = inspect
        self._reconciler = reconciler

    async def CreateDeployment(
        self, request: pb.CreateDeploymentRequest, context: Context
    ) -> deployment_pb2.Deployment:
        """See scheduler_service.proto."""
        name = names.parse_deployment(request.deployment.name)
        view = await self._deployments.create(
            name,
            convert.asked_from_message(request.deployment),
            actor=principal(),
            request_id=request_id(request.request_id),
            fingerprint=fingerprint(request),
        )
        return convert.deployment_to_message(view)

    async def GetDeployment(
        self, request: pb.GetDeploymentRequest, context: Context
    ) -> deployment_pb2.Deployment:
        """See scheduler_service.proto."""
        view = await self._deployments.get(names.parse_deployment(request.name))
        return convert.deployment_to_message(view)

    async def ListDeployments(
        self, request: pb.ListDeploymentsRequest, context: Context
    ) -> pb.ListDeploymentsResponse:
        """See scheduler_service.proto."""
        size = page_size(request.page_size)
        uses = convert.uses_from_text(request.uses)
        found = await self._deployments.page(decode_token(request.page_token), size + 1, uses)
        page = found[:size]
        return pb.ListDeploymentsResponse(
            deployments=[convert.deployment_to_message(view) for view in page],
            next_page_token=encode_token(page[-1].deployment.name) if len(found) > size else "",
        )

    async def UpdateDeployment(
        self, request: pb.UpdateDeploymentRequest, context: Context
    ) -> deployment_pb2.Deployment:
        """See scheduler_service.proto."""
        name = names.parse_deployment(request.deployment.name)
        changes = Changes(
            asked=convert.asked_from_message(request.deployment),
            fields=_fields(request),
            etag=request.deployment.etag,
        )
        view = await self._deployments.update(
            name,
            changes,
            actor=principal(),
            request_id=request_id(request.request_id),
            fingerprint=fingerprint(request),
        )
        return convert.deployment_to_message(view)

    async def RollbackDeployment(
        self, request: pb.RollbackDeploymentRequest, context: Context
    ) -> deployment_pb2.Deployment:
        """See scheduler_service.proto."""
        name = names.parse_deployment(request.name)
        if request.revision < 0:
            raise InvalidArgument(f"revision is {request.revision}; revisions are numbered from 1.")
        view = await self._deployments.rollback(name, request.revision, actor=principal())
        return convert.deployment_to_message(view)

    async def DeleteDeployment(self, request: pb.DeleteDeploymentRequest, context: Context) -> Empty:
        """See scheduler_service.proto."""
        await self._deployments.delete(names.parse_deployment(request.name), actor=principal())
        return Empty()

    async def WatchDeployment(
        self, request: pb.WatchDeploymentRequest, context: Context
    ) -> AsyncIterator[deployment_pb2.Deployment]:
        """See scheduler_service.proto."""
        name = names.parse_deployment(request.name)
        sent: deployment_pb2.Deployment | None = None
        async for view in watch_deployment(name, self._deployments, self._reconciler.deployments):
            message = convert.deployment_to_message(view)
            # What a rollout counts changes each second, and is not part of it.
            if message != sent:
                sent = message
                yield message

    async def ListDeploymentRevisions(
        self, request: pb.ListDeploymentRevisionsRequest, context: Context
    ) -> pb.ListDeploymentRevisionsResponse:
        """See scheduler_service.proto."""
        size = page_size(request.page_size)
        before = decode_number(decode_token(request.page_token))
        found = await self._deployments.revisions(names.parse_deployment(request.parent), before, size + 1)
        page = found[:size]
        return pb.ListDeploymentRevisionsResponse(
            revisions=[convert.revision_to_message(revision) for revision in page],
            next_page_token=encode_token(str(page[-1].number)) if len(found) > size else "",
        )

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> node_pb2.Node:
        """See scheduler_service.proto."""
        return node_messages.node_to_message(await self._nodes.get(names.parse_node(request.name)))

    async def UpdateNode(self, request: pb.UpdateNodeRequest, context: Context) -> node_pb2.Node:
        """See scheduler_service.proto."""
        name, says, fields = node_messages.update_from_message(request)
        return node_messages.node_to_message(await self._nodes.update(name, says, fields, actor=principal()))

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        """See scheduler_service.proto."""
        size = page_size(request.page_size)
        found = await self._inspect.nodes(decode_token(request.page_token), size + 1)
        page = found[:size]
        return pb.ListNodesResponse(
            nodes=[node_messages.node_to_message(view) for view in page],
            next_page_token=encode_token(page[-1].node.name) if len(found) > size else "",
        )

    async def ListReplicas(
        self, request: pb.ListReplicasRequest, context: Context
    ) -> pb.ListReplicasResponse:
        """See scheduler_service.proto."""
        size = page_size(request.page_size)
        found = await self._inspect.replicas(
            decode_token(request.page_token),
            size + 1,
            deployment=names.parse_deployment(request.deployment) if request.deployment else "",
            node=names.parse_node(request.node) if request.node else "",
            stopped=request.show_stopped,
        )
        page = found[:size]
        return pb.ListReplicasResponse(
            replicas=[convert.replica_to_message(replica) for replica in page],
            next_page_token=encode_token(page[-1].id) if len(found) > size else "",
        )

    async def ListAllocations(
        self, request: pb.ListAllocationsRequest, context: Context
    ) -> pb.ListAllocationsResponse:
        """See scheduler_service.proto."""
        size = page_size(request.page_size)
        found = await self._inspect.allocations(
            decode_token(request.page_token),
            size + 1,
            node=names.parse_node(request.node) if request.node else "",
        )
        page = found[:size]
        return pb.ListAllocationsResponse(
            allocations=[convert.allocation_to_message(view) for view in page],
            next_page_token=encode_token(page[-1].key) if len(found) > size else "",
        )


def _fields(request: pb.UpdateDeploymentRequest) -> frozenset[str]:
    """The fields that an update names; without a mask, those that are set."""
    paths = list(request.update_mask.paths)
    if not paths:
        given = {field.name for field, _ in request.deployment.ListFields()}
        return frozenset(given.intersection(_CHANGEABLE))
    if paths == ["*"]:
        return frozenset(_CHANGEABLE)
    for path in paths:
        if path not in _CHANGEABLE and path not in _CHANGEABLE_PARTS:
            raise InvalidArgument(
                f"update_mask names {path!r}; use {', '.join(_CHANGEABLE + _CHANGEABLE_PARTS)}.",
                metadata={"field": "update_mask"},
            )
    return frozenset(paths)
