"""The gateway's own state over gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from penstock.gateway.v1 import gateway_service_pb2 as gateway
from penstock_gateway.api.about import RELEASE
from penstock_gateway.api.grpc.methods import method
from penstock_gateway.domain.admission import Backlog
from penstock_gateway.hotpath.bounds import PRIORITIES
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.grpc_framing import Call, Handler

SERVICE = "penstock.gateway.v1.GatewayService"

Dependencies = Callable[[], list[tuple[str, str]]]


class GatewayService:
    """Serves GetGateway.

    Args:
        name: Of this process.
        dispatcher: Knows routes and open calls.
        dependencies: Gives the name of each dependency and what is wrong with it ("" if nothing).
    """

    def __init__(self, name: str, dispatcher: Dispatcher, dependencies: Dependencies) -> None:
        self._name = name
        self._dispatcher = dispatcher
        self._dependencies = dependencies
        self._began = time.monotonic()

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by path."""
        return {f"/{SERVICE}/GetGateway": method(gateway.GetGatewayRequest, self._get)}

    async def _get(self, request: gateway.GetGatewayRequest, call: Call) -> gateway.Gateway:
        return self.view()

    def view(self) -> gateway.Gateway:
        """Return what this process knows."""
        table = self._dispatcher.table
        out = gateway.Gateway(
            name=self._name,
            release=RELEASE,
            route_generation=table.generation,
            calls_in_flight=self._dispatcher.in_flight,
        )
        out.uptime.FromNanoseconds(int((time.monotonic() - self._began) * 1e9))
        for name, problem in self._dependencies():
            out.dependencies.add(name=name, ready=not problem, message=problem)
        for name in sorted(table.routes):
            lane = self._dispatcher.lanes[name]
            summary = out.routes.add(
                deployment=name,
                ready=lane.route.ready,
                calls_in_flight=lane.in_flight,
                calls_refused=sum(lane.refused.values()),
            )
            for version, priority, backlog in queues_of(self._dispatcher, name):
                queue = summary.queues.add(
                    version=version,
                    priority=priority,
                    ahead=backlog.waiting + backlog.others,
                    answers_per_second=backlog.answers_per_second,
                )
                queue.expected_wait.FromNanoseconds(int(backlog.expected_wait * 1e9))
        return out


def queues_of(dispatcher: Dispatcher, deployment: str) -> Iterator[tuple[int, str, Backlog]]:
    """Give version, priority and backlog of each queue of a deployment."""
    for target in dispatcher.table.routes[deployment].targets:
        for priority, backlog in zip(PRIORITIES, dispatcher.waitlists[target.queue].backlogs, strict=True):
            yield target.version, priority, backlog
