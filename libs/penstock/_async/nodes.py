"""Nodes, and the replicas that they carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from google.protobuf import field_mask_pb2

from penstock._async import io
from penstock._async.transfer import AsyncTransfers
from penstock.errors import DeadlineExceeded
from penstock.names import resource, short
from penstock.scheduler.v1 import node_pb2, replica_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as scheduler
from penstock.transport import Attempts

_LOOK_SECONDS = 0.2

NodeCallback = Callable[[node_pb2.Node, int], None]


class AsyncNodes(AsyncTransfers):
    """What carries the deployments."""

    async def get_node(self, name: str) -> node_pb2.Node:
        """Return a node with its devices and what of it is given out."""
        return await self._unary(
            self._scheduler.GetNode, scheduler.GetNodeRequest(name=resource("nodes", name))
        )

    async def list_nodes(self, *, limit: int | None = None) -> list[node_pb2.Node]:
        """Return all nodes."""
        return await self._list(
            self._scheduler.ListNodes, scheduler.ListNodesRequest(), lambda page: page.nodes, limit
        )

    async def list_replicas(
        self,
        *,
        deployment: str = "",
        node: str = "",
        show_stopped: bool = False,
        limit: int | None = None,
    ) -> list[replica_pb2.Replica]:
        """Return replicas: all, or those of one deployment or on one node."""
        request = scheduler.ListReplicasRequest(
            deployment=resource("deployments", deployment) if deployment else "",
            node=resource("nodes", node) if node else "",
            show_stopped=show_stopped,
        )
        return await self._list(self._scheduler.ListReplicas, request, lambda page: page.replicas, limit)

    async def list_allocations(
        self, *, node: str = "", limit: int | None = None
    ) -> list[node_pb2.Allocation]:
        """Return what is given out: everywhere, or on one node."""
        request = scheduler.ListAllocationsRequest(node=resource("nodes", node) if node else "")
        return await self._list(
            self._scheduler.ListAllocations, request, lambda page: page.allocations, limit
        )

    async def update_node(
        self,
        name: str,
        *,
        cordoned: bool | None = None,
        draining: bool | None = None,
        taints: Mapping[str, str] | None = None,
    ) -> node_pb2.Node:
        """Change what operators say of a node; what is None stays as it is.

        Args:
            name: Name of the node.
            cordoned: Nothing new is placed on it.
            draining: What runs on it moves elsewhere, each new replica ready before the old one ends. It is
                cordoned then, too.
            taints: Values by key, instead of those it has: only replicas that bear all of them are placed on
                it. What runs there stays.

        Raises:
            NotFound: There is none of that name.
        """
        given = {"cordoned": cordoned, "draining": draining, "taints": taints}
        node = node_pb2.Node(
            name=resource("nodes", name),
            cordoned=bool(cordoned),
            draining=bool(draining),
            taints=[node_pb2.Taint(key=key, value=value) for key, value in (taints or {}).items()],
        )
        paths = [path for path, value in given.items() if value is not None]
        if not paths:
            return await self.get_node(name)
        request = scheduler.UpdateNodeRequest(node=node, update_mask=field_mask_pb2.FieldMask(paths=paths))
        return await self._unary(self._scheduler.UpdateNode, request)

    async def wait_until_drained(
        self, name: str, *, timeout: float = 300.0, on_look: NodeCallback | None = None
    ) -> node_pb2.Node:
        """Wait until nothing runs on a node that is being drained.

        Args:
            name: Name of the node.
            timeout: Seconds to wait.
            on_look: Told of the node, and how many replicas and tasks are left on it, again and again.

        Raises:
            DeadlineExceeded: Something still runs there; the words say what it waits for.
            NotFound: There is none of that name.
        """
        attempts = Attempts(timeout, timeout)
        node, left = node_pb2.Node(name=resource("nodes", name)), -1
        while True:
            try:
                attempts.left()
            except DeadlineExceeded as error:
                raise DeadlineExceeded(
                    f"{short(node.name)} is not empty after {timeout:g} s; {max(left, 0)} replicas and "
                    f"tasks are left. {node.message}".rstrip()
                ) from error
            node = await self.get_node(name)
            left = len(await self.list_allocations(node=name))
            if on_look is not None:
                on_look(node, left)
            if not left:
                return node
            await io.sleep(_LOOK_SECONDS)
