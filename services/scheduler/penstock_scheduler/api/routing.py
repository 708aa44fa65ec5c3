"""RoutingService: the table that gateways work by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from penstock.scheduler.v1 import routing_service_pb2 as pb
from penstock.scheduler.v1 import routing_service_pb2_grpc
from penstock_scheduler.api import convert
from penstock_scheduler.api.reports import traffic_from_message
from penstock_scheduler.usecases.reconcile import Reconciler
from penstock_scheduler.usecases.traffic import Traffic


class RoutingServicer(routing_service_pb2_grpc.RoutingServiceServicer):
    """Tells gateways where requests go, and hears from them what came."""

    def __init__(self, reconciler: Reconciler, traffic: Traffic) -> None:
        self._traffic = traffic
        self._routes = reconciler.routes
        self._made: tuple[int, pb.WatchRoutesResponse] = (0, pb.WatchRoutesResponse())

    async def WatchRoutes(
        self, request: pb.WatchRoutesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchRoutesResponse]:
        """See routing_service.proto."""
        generation = 0
        while True:
            generation, routes = await self._routes.newer(generation)
            if self._made[0] != generation:
                # One table for all gateways: it may have manifests of hundreds of versions in it.
                self._made = (generation, convert.routes_to_message(generation, routes))
            yield self._made[1]

    async def ReportTraffic(
        self, request: pb.ReportTrafficRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReportTrafficResponse:
        """See routing_service.proto."""
        gateway, uptime_seconds, seen = traffic_from_message(request)
        self._traffic.report(gateway, uptime_seconds, seen)
        return pb.ReportTrafficResponse()
