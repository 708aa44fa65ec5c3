"""Puts the gateway together: the only module that makes adapters.

`application` is what an ASGI server runs. Everything is made when the server says that it starts
(ASGI's lifespan), inside the process and on the event loop that serve.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry

from penstock.registry.v1 import registry_service_pb2
from penstock.scheduler.v1 import scheduler_service_pb2
from penstock_gateway.adapters.channels import Service
from penstock_gateway.adapters.routes import RouteWatcher
from penstock_gateway.adapters.services import RegistryClient, SchedulerClient
from penstock_gateway.adapters.statistics import StatisticsReader
from penstock_gateway.api.grpc import gateway, health, oip, passthrough, reflection
from penstock_gateway.api.metrics import GatewayCollector
from penstock_gateway.api.rest.service import RestService
from penstock_gateway.api.router import Router
from penstock_gateway.api.server.control import Control
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.grpc_framing import Receive, Scope, Send
from penstock_gateway.hotpath.infer import InferHandler
from penstock_gateway.settings import GatewaySettings
from penstock_gateway.usecases.catalog import Catalog
from penstock_gateway.usecases.repository import Repository
from penstock_kit.lifecycle import TaskSet
from penstock_kit.queue.sender import RequestSender
from penstock_kit.telemetry import (
    MetricsServer,
    Readings,
    configure_logging,
    configure_tracing,
    shutdown_tracing,
)

log = logging.getLogger(__name__)

SERVICE = "penstock-gateway"
# Services that are passed through. Those between scheduler, workers and gateways are not for callers.
REGISTRY = registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"]
SCHEDULER = scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"]
MANAGED = (REGISTRY, SCHEDULER)
# What open requests hold lives for milliseconds and is freed by its reference counts. By default the
# collector looks at it after each 700 objects, which are a few dozen open requests.
GC_OBJECTS = 20_000
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
        server: What carries it: envoy or hypercorn.
    """

    def __init__(self, settings: GatewaySettings, server: str) -> None:
        self.name = settings.gateway_name or f"gateway-{uuid.uuid4().hex[:12]}"
        limit, timeout = settings.max_message_bytes, settings.gateway_default_timeout_seconds
        self._tasks = TaskSet()
        self._sender = RequestSender(settings.redis_url, self.name)
        self._statistics = StatisticsReader(settings.redis_url)
        self._scheduler = Service("scheduler", settings.scheduler_address, limit)
        self._registry = Service("registry", settings.registry_address, limit)
        self._dispatcher = Dispatcher(
            self._sender, default_timeout=timeout, traced=bool(settings.otlp_endpoint)
        )
        self._watcher = RouteWatcher(self._scheduler.channel, self.name, self._dispatcher.update)
        self._control = Control.from_environment(self._dispatcher, settings.gateway_drain_seconds)
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
            **gateway.GatewayService(self.name, server, self._dispatcher, self._dependencies).handlers(),
            **health.HealthService(self._dispatcher, frozenset(carried)).handlers(),
            **reflection.ReflectionService(carried).handlers(),
            **passthrough.handlers(REGISTRY, self._registry.raw),
            **passthrough.handlers(SCHEDULER, self._scheduler.raw),
        }
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

    async def start(self) -> None:
        """Begin; the parts behind may be away, which health then says."""
        await self._sender.start()
        await self._readings.start()
        await self._metrics.start()
        self._tasks.run_forever("routes", self._watcher.run)
        self._tasks.run_forever("registry health", self._registry.look)
        if self._control is not None:
            await self._control.start()

    async def stop(self) -> None:
        """End in reverse."""
        if self._control is not None:
            await self._control.stop()
        await self._tasks.stop()
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


class Application:
    """The ASGI application: made at import, filled at start."""

    # Says to servers that look before they call that this is ASGI 3: __call__ gives an awaitable.
    _asgi_single_callable = True

    def __init__(self) -> None:
        self._gateway: Gateway | None = None
        self._serve: Any = self._not_started

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Serve one request, or the life of the server."""
        if scope["type"] == "http":
            return self._serve(scope, receive, send)
        return self._lifespan(scope, receive, send)

    async def _not_started(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("The ASGI server did not announce its start (lifespan).")

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            raise RuntimeError(f"ASGI {scope['type']} is not served here.")
        while True:
            event = await receive()
            kind = event["type"]
            if kind == "lifespan.startup":
                try:
                    await self._start()
                except Exception as error:
                    log.exception("the gateway cannot start")
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
            elif kind == "lifespan.shutdown":
                await self._stop()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _start(self) -> None:
        began = time.monotonic()
        settings = GatewaySettings.load()
        configure_logging(SERVICE, level=settings.log_level, style=settings.log_format)
        configure_tracing(SERVICE, settings.otlp_endpoint)
        server = os.environ.get("PENSTOCK_GATEWAY_CARRIER", "asgi")
        self._gateway = Gateway(settings, server)
        await self._gateway.start()
        self._serve = self._gateway.router
        # What is loaded stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_OBJECTS, 10, 10)
        log.info(
            "gateway",
            extra={"gateway": self._gateway.name, "server": server, "seconds": time.monotonic() - began},
        )

    async def _stop(self) -> None:
        if self._gateway is not None:
            await self._gateway.stop()
        shutdown_tracing()


application = Application()
