"""The gRPC server of every inner service."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock_kit.errors import Unavailable
from penstock_kit.rpc.channel import MAX_MESSAGE_BYTES
from penstock_kit.rpc.interceptors import ServerInterceptor

MAX_CONCURRENT_RPCS = 4096
_ADDRESS_IN_USE = "the address is in use or may not be used"


class RpcServer:
    """A grpc.aio server with health, reflection, limits and the error tree.

    Args:
        listen: "host:port" (port 0 takes a free one) or "unix:/path".
        max_message_bytes: Largest message taken or sent.

    A service is NOT_SERVING until `set_serving` says otherwise; the empty service name stands for
    the whole server and is SERVING while all services are.
    """

    def __init__(self, listen: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.listen = listen
        self.address = listen
        self._services: dict[str, bool] = {}
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[ServerInterceptor()],
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                # Clients of ours ping every 4 s; anything much faster is abuse.
                ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.ping_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Another process on the same port would take half the calls unseen.
                ("grpc.so_reuseport", 0),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(
        self, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: Any, service_name: str
    ) -> None:
        """Offer a service: its generated `add_…_to_server`, a servicer and its full name."""
        add_to_server(servicer, self._server)
        self._services[service_name] = False

    async def start(self) -> None:
        """Listen and take calls.

        Raises:
            Unavailable: The address cannot be bound.
        """
        reflection.enable_server_reflection(
            [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        await self._publish()
        path = self._socket_path()
        if path is not None and path.is_socket():
            # Left by a process that was killed: its successor owns the path now.
            path.unlink()
        try:
            port = self._server.add_insecure_port(self.listen)
        except RuntimeError as error:
            raise Unavailable(f"Cannot listen on {self.listen}: {_ADDRESS_IN_USE}.") from error
        if path is None:
            self.address = f"{self.listen.rpartition(':')[0]}:{port}"
        await self._server.start()

    async def set_serving(self, serving: bool, services: Iterable[str] = ()) -> None:
        """Say whether services (all, if none is named) answer now."""
        for name in services or list(self._services):
            self._services[name] = serving
        await self._publish()

    async def stop(self, grace: float = 5.0) -> None:
        """Say NOT_SERVING, let open calls end within `grace` seconds, then close."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        path = self._socket_path()
        if path is not None:
            path.unlink(missing_ok=True)

    def _socket_path(self) -> Path | None:
        scheme, _, rest = self.listen.partition(":")
        return Path(rest.removeprefix("//")) if scheme == "unix" else None

    async def _publish(self) -> None:
        states = {**self._services, "": all(self._services.values())}
        for name, serving in states.items():
            status = (
                health_pb2.HealthCheckResponse.SERVING
                if serving
                else health_pb2.HealthCheckResponse.NOT_SERVING
            )
            await self._health.set(name, status)
