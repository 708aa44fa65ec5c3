"""Puts the gateway together: the only module that makes adapters."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
import uuid

from prometheus_client import CollectorRegistry

from penstock.registry.v1 import artifact_service_pb2, registry_service_pb2
from penstock.scheduler.v1 import job_service_pb2, project_service_pb2, scheduler_service_pb2
from penstock_gateway.adapters.channels import Service
from penstock_gateway.adapters.services import RegistryClient, SchedulerClient, TrafficClient
from penstock_gateway.adapters.statistics import StatisticsReader
from penstock_gateway.api.grpc import gateway, health, oip, passthrough, reflection
from penstock_gateway.api.listener import open_listener
from penstock_gateway.api.metrics import GatewayCollector
from penstock_gateway.api.rest.service import RestService
from penstock_gateway.api.router import Router
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.http.server import HttpServer
from penstock_gateway.hotpath.infer import InferHandler
from penstock_gateway.settings import GatewaySettings
from penstock_gateway.usecases.catalog import Catalog
from penstock_gateway.usecases.publish import CacheReport
from penstock_gateway.usecases.repository import Repository
from penstock_gateway.usecases.traffic import TrafficReport
from penstock_gateway.usecases.watch import QueueWatch
from penstock_kit.lifecycle import TaskSet
from penstock_kit.queue.sender import RequestSender
from penstock_kit.routing.watch import RouteWatcher
from penstock_kit.telemetry import (
    MetricsServer,
    Readings,
    configure_tracing,
    shutdown_tracing,
)

log = logging.getLogger(__name__)

SERVICE = "penstock-gateway"
# Services that are passed through. Those between scheduler, workers and gateways are not for callers.
OF_REGISTRY = (
    registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"],
    artifact_service_pb2.DESCRIPTOR.services_by_name["ArtifactService"],
)
OF_SCHEDULER = (
    scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"],
    job_service_pb2.DESCRIPTOR.services_by_name["JobService"],
    project_service_pb2.DESCRIPTOR.services_by_name["ProjectService"],
)
MANAGED = OF_REGISTRY + OF_SCHEDULER
# What open requests hold lives for milliseconds and is freed by its reference counts. By default the
# collector looks at it after each 700 objects, which are a few dozen open requests.
GC_OBJECTS = 20_000
# Callers who are told to go elsewhere still send what they have begun.
_FAREWELL_SECONDS = 0.5
_LAST_SECONDS = 1.0
# A gateway that shares its port listens when it can serve; if that takes longer, it listens to say why.
_ABLE_SECONDS = 10.0
_LOOK_SECONDS = 0.02
STREAMS = frozenset(
    {
        *(
            f"/{service.full_name}/{method.name}"
            for service in MANAGED
            for method in service.methods
            if method.client_streaming or method.server_streaming
        ),
        f"/{oip.SERVICE}/ModelStreamInfer",
        f"/{health.SERVICE}/Watch",
        f"/{reflection.V1}/ServerReflectionInfo",
        f"/{reflection.V1ALPHA}/ServerReflectionInfo",
    }
)


class Gateway:
    """All parts of one gateway process.

    Args:
        settings: What it was told.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._drain_seconds = settings.gateway_drain_seconds
        self._shares = settings.gateway_share_port
        self.name = settings.gateway_name or f"gateway-{uuid.uuid4().hex[:12]}"
        limit, timeout = settings.max_message_bytes, settings.gateway_default_timeout_seconds
        self._tasks = TaskSet()
        self._sender = RequestSender(settings.redis_url, self.name)
        self._statistics = StatisticsReader(
            settings.redis_url, self.name, lambda: self._dispatcher.cache.tallies()
        )
        self._scheduler = Service("scheduler", settings.scheduler_address, limit)
        self._registry = Service("registry", settings.registry_address, limit)
        self._dispatcher = Dispatcher(
            self._sender,
            default_timeout=timeout,
            traced=bool(settings.otlp_endpoint),
            cache_bytes=settings.gateway_cache_bytes,
        )
        self._watcher = RouteWatcher(self._scheduler.channel, self.name, self._dispatcher.update)
        self._traffic = TrafficReport(
            self.name, self._dispatcher, TrafficClient(self._scheduler.channel), self._watcher.align
        )
        self._queues = QueueWatch(lambda: self._dispatcher.waitlists, self._statistics)
        # /metrics on the shared port is answered by any of the gateways that share it; this, by one.
        numbers = CollectorRegistry()
        self._readings = Readings(GatewayCollector(self._dispatcher).collect, registry=numbers)
        self._metrics = MetricsServer(settings.metrics_listen, data_dir=settings.data_dir, registry=numbers)
        catalog = Catalog(
            lambda: self._dispatcher.table, RegistryClient(self._registry.channel), self._statistics
        )
        repository = Repository(
            lambda: self._dispatcher.table,
            lambda: self._dispatcher.changed,
            RegistryClient(self._registry.channel),
            SchedulerClient(self._scheduler.channel),
        )
        carried = (oip.SERVICE, gateway.SERVICE, health.SERVICE, *(s.full_name for s in MANAGED))
        methods = {
            **oip.OipService(catalog, repository, self._dispatcher).handlers(),
            **gateway.GatewayService(self.name, self._dispatcher, self._dependencies).handlers(),
            **health.HealthService(self._dispatcher, frozenset(carried)).handlers(),
            **reflection.ReflectionService(carried).handlers(),
        }
        for services, behind in ((OF_REGISTRY, self._registry), (OF_SCHEDULER, self._scheduler)):
            for service in services:
                methods |= passthrough.handlers(service, behind.raw)
        self.router = Router(
            InferHandler(self._dispatcher, limit=limit, default_timeout=timeout),
            methods,
            STREAMS,
            RestService(
                self.name, catalog, repository, self._dispatcher, limit=limit, default_timeout=timeout
            ),
            limit=limit,
            default_timeout=timeout,
            stream_timeout=settings.gateway_stream_timeout_seconds,
        )
        self._server = HttpServer(
            self.router.serve, self.router.plan, max_body_bytes=settings.gateway_max_body_bytes
        )
        self._listener = open_listener(settings)

    @property
    def address(self) -> str:
        """Where it listens: host:port."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Begin; the parts behind may be away, which health then says."""
        await self._sender.start()
        await self._readings.start()
        await self._metrics.start()
        self._tasks.run_forever("routes", self._watcher.run)
        self._tasks.run_forever("registry health", self._registry.look)
        self._tasks.run_forever("depths of queues", self._queues.run)
        self._tasks.run_forever("counters of the cache", CacheReport(self._statistics).run)
        self._tasks.run_forever("report of traffic", self._traffic.run)
        if self._shares:
            await self._until_able()
        await self._server.start(self._listener)

    async def _until_able(self) -> None:
        """Wait until inferences can be queued: others answer on this port as long as this one does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABLE_SECONDS):
                while self._dispatcher.problem:  # noqa: ASYNC110 - it ends for many reasons, once in a life
                    await asyncio.sleep(_LOOK_SECONDS)

    async def drain(self) -> None:
        """Take no new connections, let open calls end, as long as the settings allow.

        Callers are first asked to go elsewhere, and those who call meanwhile are still served: refused,
        they would try again over the same connection until their retry policy gives up.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        self._server.refuse_new()
        await asyncio.sleep(min(_FAREWELL_SECONDS, self._drain_seconds / 2))
        self._dispatcher.draining = True
        while self._dispatcher.in_flight and loop.time() < end:  # noqa: ASYNC110 - each tick of calls ends some
            await asyncio.sleep(_LOOK_SECONDS)
        await self._server.stop(max(min(end - loop.time(), _LAST_SECONDS), 0))

    async def stop(self) -> None:
        """End in reverse."""
        await self._server.stop(0)
        await self._tasks.stop()
        self._dispatcher.mirror.stop()
        await self._registry.close()
        await self._scheduler.close()
        await self._statistics.stop()
        await self._metrics.stop()
        await self._readings.stop()
        await self._sender.stop()

    def _dependencies(self) -> list[tuple[str, str]]:
        return [
            ("redis", "" if self._sender.connected else "cannot be reached"),
            ("scheduler", self._watcher.problem),
            ("registry", self._registry.problem),
        ]


async def serve(settings: GatewaySettings, stopping: asyncio.Event) -> None:
    """Run one gateway until it is told to stop.

    Raises:
        Unavailable: The port is taken.
    """
    began = time.monotonic()
    configure_tracing(SERVICE, settings.otlp_endpoint)
    gateway = Gateway(settings)
    try:
        await gateway.start()
        # What is loaded stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_OBJECTS, 10, 10)
        log.info(
            "listening",
            extra={
                "address": gateway.address,
                "gateway": gateway.name,
                "seconds": round(time.monotonic() - began, 3),
            },
        )
        await stopping.wait()
        await gateway.drain()
    finally:
        await gateway.stop()
        shutdown_tracing()
