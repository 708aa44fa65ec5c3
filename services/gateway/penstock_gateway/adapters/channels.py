"""Channels to the services behind the gateway."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2

from penstock_kit.errors import PenstockError
from penstock_kit.rpc import FailoverChannel, addresses_of, open_channel
from penstock_kit.rpc.channel import KEEPALIVE_MILLISECONDS, KEEPALIVE_TIMEOUT_MILLISECONDS

_LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 2.0


class Service:
    """One service: a channel for our own calls, and one for calls that are passed through.

    Args:
        name: For people.
        address: host:port or unix:/path, or several with commas between: one that answers is used.
        limit: Bytes of one message at most.

    Attributes:
        channel: Raises errors of the tree, and retries.
        raw: Gives statuses as they come, and retries nothing: that is the caller's to do.
        problem: Why it did not answer last time; empty if it did.
    """

    def __init__(self, name: str, address: str, limit: int) -> None:
        self.name = name
        self.problem = f"the {name} has not answered yet"
        self.channel = open_channel(address, max_message_bytes=limit)
        raws = [_raw(each, limit) for each in addresses_of(address)]
        self.raw = raws[0] if len(raws) == 1 else FailoverChannel(raws)
        self._check = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    async def look(self) -> None:
        """Ask for its health now and then, for ever."""
        while True:
            self.problem = await self._ask()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _ask(self) -> str:
        try:
            answer = await self._check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
        except PenstockError as error:
            return error.message
        serving = answer.status == health_pb2.HealthCheckResponse.SERVING
        return "" if serving else f"the {self.name} says that it is not serving"

    async def close(self) -> None:
        """Close both channels."""
        await self.raw.close()
        await self.channel.close()


def _raw(address: str, limit: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ],
    )
