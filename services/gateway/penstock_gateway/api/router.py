"""From a path to what serves it."""

from __future__ import annotations

from collections.abc import Mapping

from penstock_gateway.api.grpc.methods import unknown
from penstock_gateway.api.rest.service import RestService
from penstock_gateway.hotpath.grpc_framing import Handler, error_headers, refuse, serve
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.ports import Plan, Receive, Scope, Send
from penstock_gateway.hotpath.infer import InferHandler

INFER = "/inference.GRPCInferenceService/ModelInfer"
_GRPC = b"application/grpc"


class Router:
    """What the server asks about each call.

    Args:
        infer: Serves ModelInfer.
        methods: Serve all other gRPC methods, by path.
        streams: Which of them may last as long as the caller wants.
        rest: Serves HTTP.
        limit: Bytes of one message at most.
        default_timeout: Seconds for a call that gives no deadline.
        stream_timeout: The same for streams.
    """

    def __init__(
        self,
        infer: InferHandler,
        methods: Mapping[str, Handler],
        streams: frozenset[str],
        rest: RestService,
        *,
        limit: int,
        default_timeout: float,
        stream_timeout: float,
    ) -> None:
        self._infer = infer
        self._methods = methods
        self._rest = rest
        self._limit = limit
        self._timeouts = {path: stream_timeout if path in streams else default_timeout for path in methods}

    def plan(self, head: Head) -> Plan | None:
        """Return how calls with a head are served without a task; None if `serve` must."""
        if head.version != "2":
            return self._rest.plan(head)
        if head.path == INFER:
            return self._infer.plan(head)
        return None if _is_grpc(head.headers) else self._rest.plan(head)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call as ASGI."""
        if scope["http_version"] == "2" and _is_grpc(scope["headers"]):
            await self._call(scope["path"], scope, receive, send)
        else:
            await self._rest.serve(scope, receive, send)

    async def _call(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._methods.get(path)
        if handler is None:
            await refuse(send, error_headers(unknown(path)))
            return
        timeout = self._timeouts[path]
        await serve(handler, scope, receive, send, limit=self._limit, default_timeout=timeout)


def _is_grpc(headers: list[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name == b"content-type":
            return value.startswith(_GRPC) and value[len(_GRPC) :][:1] in (b"", b"+", b";")
    return False
