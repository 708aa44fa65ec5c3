"""HTTP requests from their path to their answer."""

from __future__ import annotations

import asyncio
import contextlib
import time

from penstock_gateway.api.metrics import Metrics
from penstock_gateway.api.rest.description import DOCS_PAGE, openapi
from penstock_gateway.api.rest.http import (
    HttpError,
    Request,
    Response,
    as_json,
    dumps,
    failure,
    send_response,
)
from penstock_gateway.api.rest.inference import Inference
from penstock_gateway.api.rest.plan import InferPlanner
from penstock_gateway.api.rest.routes import Route, Routes, oip_routes
from penstock_gateway.api.rest.v2 import Oip
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.grpc_framing import hide
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.ports import ClientGone, Plan, Receive, Scope, Send
from penstock_gateway.usecases.catalog import Catalog
from penstock_gateway.usecases.repository import Repository
from penstock_kit.errors import DeadlineExceeded, PenstockError

# Prometheus' text form.
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RestService:
    """All that is served over HTTP.

    Args:
        name: Of this process.
        catalog: What is offered.
        repository: Loads and unloads.
        dispatcher: Queues inferences.
        limit: Bytes of one body at most.
        default_timeout: Seconds for a request that gives no deadline.
    """

    def __init__(
        self,
        name: str,
        catalog: Catalog,
        repository: Repository,
        dispatcher: Dispatcher,
        *,
        limit: int,
        default_timeout: float,
    ) -> None:
        self._name = name
        self._limit = limit
        self._default_timeout = default_timeout
        self._metrics = Metrics(dispatcher)
        self._openapi = dumps(openapi())
        oip = Oip(catalog, repository, dispatcher)
        self._inference = Inference(dispatcher)
        self._planner = InferPlanner(dispatcher, limit=limit, default_timeout=default_timeout)
        self._routes = Routes(
            [
                *oip_routes(oip, self._inference),
                Route("/", ("GET",), self._docs),
                Route("/docs", ("GET",), self._docs),
                Route("/openapi.json", ("GET",), self._description),
                Route("/metrics", ("GET",), self._metrics_text),
                Route("/healthz", ("GET",), self._healthz),
                Route("/readyz", ("GET",), oip.ready),
            ]
        )

    def plan(self, head: Head) -> Plan | None:
        """Return how requests with a head are served without a task; None if `serve` must."""
        return self._planner.plan(head)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        headers: dict[bytes, bytes] = {}
        try:
            request = Request(scope, receive, self._limit, self._default_timeout)
            headers = request.headers
            handler, parameters = self._routes.find(request.method, request.path)
            async with asyncio.timeout(max(request.deadline - time.time(), 0)):
                response = await handler(request, **parameters)
        except (PenstockError, HttpError) as error:
            response = failure(error)
        except TimeoutError:
            response = failure(DeadlineExceeded())
        except Exception as error:  # noqa: BLE001 - the edge: nothing unknown may leak
            response = failure(hide(error, f"{scope['method']} {scope['path']}"))
        with contextlib.suppress(ClientGone):
            await send_response(response, headers, scope["method"], send)

    async def _docs(self, request: Request) -> Response:
        return Response(200, DOCS_PAGE, "text/html; charset=utf-8")

    async def _description(self, request: Request) -> Response:
        return Response(200, self._openapi)

    async def _metrics_text(self, request: Request) -> Response:
        return Response(200, self._metrics.text(), _METRICS_TYPE)

    async def _healthz(self, request: Request) -> Response:
        """GET /healthz: the process lives, and which one it is."""
        return as_json({"live": True, "gateway": self._name})
