"""Registry and scheduler as the use cases need them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc

from penstock.registry.v1 import registry_service_pb2, registry_service_pb2_grpc
from penstock.scheduler.v1 import (
    deployment_pb2,
    routing_service_pb2,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
from penstock_gateway.domain.traffic import Tally
from penstock_gateway.usecases.ports import DeploymentView
from penstock_gateway.usecases.traffic import Reported
from penstock_kit.errors import NotFound

_PAGE = 1000
# A scheduler that hangs must not keep the others from being told.
_REPORT_SECONDS = 1.0


class RegistryClient:
    """The registry over gRPC; see `usecases.ports.Registry`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = registry_service_pb2_grpc.RegistryServiceStub(channel)

    async def newest(self, model: str) -> int:
        """Return the number of the newest READY version of a model."""
        request = registry_service_pb2.ResolveVersionRequest(model=f"models/{model}")
        return (await self._stub.ResolveVersion(request)).number

    async def models(self) -> list[tuple[str, int]]:
        """Return name and newest version of all models."""
        found = []
        token = ""
        while True:
            request = registry_service_pb2.ListModelsRequest(page_size=_PAGE, page_token=token)
            page = await self._stub.ListModels(request)
            found += [(model.name.removeprefix("models/"), model.latest_version) for model in page.models]
            token = page.next_page_token
            if not token:
                return found


class SchedulerClient:
    """The scheduler over gRPC; see `usecases.ports.Scheduler`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = scheduler_service_pb2_grpc.SchedulerServiceStub(channel)

    async def get(self, name: str) -> DeploymentView | None:
        """Return a deployment, or None if there is none of that name."""
        request = scheduler_service_pb2.GetDeploymentRequest(name=f"deployments/{name}")
        try:
            return _view(await self._stub.GetDeployment(request))
        except NotFound:
            return None

    async def create(self, name: str, model: str, version: int) -> None:
        """Offer one version under a name."""
        await self._stub.CreateDeployment(
            scheduler_service_pb2.CreateDeploymentRequest(deployment=_deployment(name, model, version))
        )

    async def update(self, name: str, model: str, version: int) -> None:
        """Let one version answer under a name that exists."""
        request = scheduler_service_pb2.UpdateDeploymentRequest(deployment=_deployment(name, model, version))
        request.update_mask.paths.append("targets")
        await self._stub.UpdateDeployment(request)

    async def delete(self, name: str) -> None:
        """Stop offering a name."""
        request = scheduler_service_pb2.DeleteDeploymentRequest(name=f"deployments/{name}")
        await self._stub.DeleteDeployment(request)

    async def watch(self, name: str) -> AsyncIterator[DeploymentView]:
        """Follow a deployment until it is deleted."""
        request = scheduler_service_pb2.WatchDeploymentRequest(name=f"deployments/{name}")
        async for deployment in self._stub.WatchDeployment(request):
            yield _view(deployment)


class TrafficClient:
    """The scheduler that leads, over gRPC; see `usecases.traffic.TrafficSink`.

    Of several schedulers the others refuse a report as UNAVAILABLE, and the channel goes on to the next one
    and stays there: what else this process asks a scheduler goes to the one that leads, too.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._report = channel.unary_unary(
            "/penstock.scheduler.v1.RoutingService/ReportTraffic",
            request_serializer=bytes,
            response_deserializer=routing_service_pb2.ReportTrafficResponse.FromString,
        )
        self._written: dict[Tally, tuple[tuple[int, ...], bytes]] = {}

    async def report(self, gateway: str, uptime_seconds: float, targets: Sequence[Reported]) -> None:
        """Tell what a gateway process has counted.

        Raises:
            PenstockError: No scheduler took it.
        """
        request = routing_service_pb2.ReportTrafficRequest(gateway=gateway)
        request.uptime.FromNanoseconds(int(uptime_seconds * 1e9))
        parts = [request.SerializeToString(), *(self._part(one) for one in targets)]
        if len(self._written) > 2 * len(targets):
            self._written = {one.tally: self._written[one.tally] for one in targets}
        await self._report(b"".join(parts), timeout=_REPORT_SECONDS)

    def _part(self, one: Reported) -> bytes:
        """Return what is said of one version as a field of the request.

        Kept while nothing changes: to write a thousand anew takes 5 ms, in which nobody is served.
        """
        tally = one.tally
        state = (
            *(tally.arrived, tally.succeeded, tally.failed, tally.overloaded),
            *(tally.agreed, tally.disagreed, one.waiting, one.waiting_for_replica),
        )
        known = self._written.get(tally)
        if known is not None and known[0] == state:
            return known[1]
        # Serialized messages, one after another, are one message with the fields of all.
        part = routing_service_pb2.ReportTrafficRequest(targets=[to_traffic(one)]).SerializeToString()
        self._written[tally] = (state, part)
        return part


def to_traffic(one: Reported) -> routing_service_pb2.TargetTraffic:
    """Return what is said of one version."""
    tally = one.tally
    return routing_service_pb2.TargetTraffic(
        deployment=tally.deployment,
        model=tally.model,
        version=tally.version,
        arrived=tally.arrived,
        succeeded=tally.succeeded,
        failed=tally.failed,
        overloaded=tally.overloaded,
        waiting=one.waiting,
        waiting_for_replica=one.waiting_for_replica,
        latencies=tally.latencies,
        agreed=tally.agreed,
        disagreed=tally.disagreed,
        latency_microseconds=int(tally.seconds * 1e6),
    )


def _deployment(name: str, model: str, version: int) -> deployment_pb2.Deployment:
    target = deployment_pb2.Target(model=model, version=version, weight=100)
    return deployment_pb2.Deployment(name=f"deployments/{name}", targets=[target])


def _view(deployment: deployment_pb2.Deployment) -> DeploymentView:
    return DeploymentView(
        ready=deployment.state == deployment_pb2.DEPLOYMENT_STATE_READY,
        failed=deployment.state == deployment_pb2.DEPLOYMENT_STATE_FAILED,
        message=deployment.message,
        versions=tuple(target.resolved_version or target.version for target in deployment.targets),
    )
