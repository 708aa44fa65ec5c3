"""Registry and scheduler as the use cases need them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc

from penstock.registry.v1 import registry_service_pb2, registry_service_pb2_grpc
from penstock.scheduler.v1 import (
    deployment_pb2,
    routing_service_pb2,
    routing_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
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
        self._stub = routing_service_pb2_grpc.RoutingServiceStub(channel)

    async def report(self, gateway: str, uptime_seconds: float, targets: Sequence[Reported]) -> None:
        """Tell what a gateway process has counted.

        Raises:
            PenstockError: No scheduler took it.
        """
        request = routing_service_pb2.ReportTrafficRequest(
            gateway=gateway, targets=[to_traffic(one) for one in targets]
        )
        request.uptime.FromNanoseconds(int(uptime_seconds * 1e9))
        await self._stub.ReportTraffic(request, timeout=_REPORT_SECONDS)


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
