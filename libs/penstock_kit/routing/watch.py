"""Keeps the routing table fresh by the scheduler's watch stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from penstock.common.v1 import tensor_pb2
from penstock.scheduler.v1 import deployment_pb2, routing_service_pb2, routing_service_pb2_grpc
from penstock_kit.errors import PenstockError, Unavailable
from penstock_kit.routing.model import Description, Tensor
from penstock_kit.routing.table import CachePolicy, Route, Table, Target
from penstock_kit.rpc import FailoverChannel

log = logging.getLogger(__name__)

# A scheduler that restarts is found again within a second.
FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 1.0
_DATATYPE_PREFIX = len("DATA_TYPE_")
# What the scheduler does for a deployment that gives 0.
_DEFAULT_DEPTH = 4096
_ANSWERING = frozenset(
    {
        deployment_pb2.DEPLOYMENT_STATE_READY,
        deployment_pb2.DEPLOYMENT_STATE_UPDATING,
        deployment_pb2.DEPLOYMENT_STATE_DEGRADED,
    }
)


class RouteWatcher:
    """Follows the scheduler's routes and hands each table on.

    The last table stays in force while the scheduler is away. Of several schedulers any one's routes will do,
    but those of one that is cut off from its database would stay as they are: see `align`.

    Args:
        channel: To the scheduler, or to several.
        gateway: Name of this process.
        use: Takes each new table.
    """

    def __init__(self, channel: grpc.aio.Channel, gateway: str, use: Callable[[Table], None]) -> None:
        self._channel = channel
        self._stub = routing_service_pb2_grpc.RoutingServiceStub(channel)
        self._address = 0
        self._bound: asyncio.Timeout | None = None
        self._gateway = gateway
        self._use = use
        self._answered: set[str] = set()
        self._heard = False
        self.connected = False
        self.problem = "the scheduler has not answered yet"

    async def run(self) -> None:
        """Follow the routes for ever."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                await self.follow()
            except PenstockError as error:
                if pause in (FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS):
                    log.warning("routes: %s", error)
            pause = FIRST_PAUSE_SECONDS if self._heard else min(pause * 2, LAST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    def align(self) -> None:
        """Watch the scheduler that the channel uses now, if the watch is at another one.

        To be called when that one has shown that it leads.
        """
        if self._bound is not None and self._address != _address_of(self._channel):
            self._bound.reschedule(asyncio.get_running_loop().time())

    async def follow(self) -> None:
        """Follow one stream to its end.

        Raises:
            PenstockError: The scheduler cannot be reached, or ended the stream.
        """
        self._heard = False
        request = routing_service_pb2.WatchRoutesRequest(gateway=self._gateway)
        self._address = _address_of(self._channel)
        try:
            async with asyncio.timeout(None) as self._bound:
                async for answer in self._stub.WatchRoutes(request):
                    self._heard = self.connected = True
                    self.problem = ""
                    self._use(self._table(answer))
            raise Unavailable("The scheduler ended the watch of its routes.")
        except TimeoutError:
            log.info("another scheduler leads; its routes are watched from now on")
        except PenstockError as error:
            self.problem = error.message
            raise
        finally:
            self._bound = None
            self.connected = False

    def _table(self, answer: routing_service_pb2.WatchRoutesResponse) -> Table:
        routes = {route.deployment: self._route(route) for route in answer.routes}
        self._answered &= {t.queue for route in routes.values() for t in route.targets}
        return Table(max(answer.generation, 1), routes)

    def _route(self, route: routing_service_pb2.Route) -> Route:
        targets = tuple(to_target(target) for target in route.targets)
        self._answered |= {t.queue for t in targets if t.ready}
        if route.state == deployment_pb2.DEPLOYMENT_STATE_UNSPECIFIED:
            # A scheduler that does not tell: what this process saw is the next best.
            may_wait = any(t.queue in self._answered for t in targets)
        else:
            may_wait = route.state in _ANSWERING
        if route.scales_from_zero and route.state != deployment_pb2.DEPLOYMENT_STATE_FAILED:
            may_wait = True  # the request itself is what brings a replica
        return Route(
            deployment=route.deployment,
            targets=targets,
            max_queue_depth=route.max_queue_depth or _DEFAULT_DEPTH,
            message=route.message,
            may_wait=may_wait,
            cache=to_policy(route.cache),
            failed=route.state == deployment_pb2.DEPLOYMENT_STATE_FAILED,
        )


def _address_of(channel: grpc.aio.Channel) -> int:
    """Return which of a channel's addresses is in use."""
    return channel.current if isinstance(channel, FailoverChannel) else 0


def to_policy(cache: deployment_pb2.ResponseCache) -> CachePolicy | None:
    """Return how equal requests are answered; None where each is computed."""
    if not cache.enabled and not cache.coalesce:
        return None
    return CachePolicy(cache.enabled, cache.ttl.ToNanoseconds() / 1e9, cache.max_bytes, cache.coalesce)


def to_target(target: routing_service_pb2.RouteTarget) -> Target:
    """Return a target of the routing table."""
    manifest = target.manifest
    return Target(
        model=target.model,
        version=target.version,
        weight=target.weight,
        queue=target.queue,
        ready_replicas=target.ready_replicas,
        aliases=frozenset(target.aliases),
        digest=target.digest,
        mirror_percent=min(max(target.mirror_percent, 0), 100),
        mirror_tolerance=max(target.mirror_tolerance, 0.0),
        description=Description(
            runtime=manifest.runtime,
            format=manifest.format,
            inputs=tuple(to_tensor(spec) for spec in manifest.signature.inputs),
            outputs=tuple(to_tensor(spec) for spec in manifest.signature.outputs),
            max_batch_size=target.batching.max_batch_size,
            max_delay_microseconds=target.batching.max_delay_microseconds,
            gpus=manifest.resources.gpus,
            parameters=dict(manifest.parameters),
            text=manifest.description,
        ),
    )


def to_tensor(spec: tensor_pb2.TensorSpec) -> Tensor:
    """Return a tensor's name, datatype and shape."""
    return Tensor(
        name=spec.name,
        datatype=tensor_pb2.DataType.Name(spec.data_type)[_DATATYPE_PREFIX:],
        shape=tuple(spec.shape),
        optional=spec.optional,
        labels=tuple(spec.labels),
    )
