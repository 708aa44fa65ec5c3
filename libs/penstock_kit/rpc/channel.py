"""Channels to other services."""

from __future__ import annotations

import json

import grpc

from penstock_kit.rpc.failover import FailoverChannel, addresses_of
from penstock_kit.rpc.interceptors import client_interceptors

DEFAULT_TIMEOUT_SECONDS = 10.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# A peer that is stopped or cut off without a FIN is noticed within 7 s, also on quiet streams: what hangs on
# a scheduler finds the next one before a silent node is given up. One that is merely late by less is kept.
KEEPALIVE_MILLISECONDS = 4_000
KEEPALIVE_TIMEOUT_MILLISECONDS = 3_000

# gRFC A6: at most 5 attempts; UNAVAILABLE means that the server did not take the call up, or that a
# retry is safe because every mutation of ours carries a request_id or is idempotent.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def open_channel(
    target: str,
    *,
    default_timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """Return a channel; it connects at its first call and reconnects by itself.

    Args:
        target: "host:port" or "unix:/path". Of several, with commas between, it uses one that answers; see
            `penstock_kit.rpc.failover`.
        default_timeout_seconds: Deadline of unary calls that give none.
        max_message_bytes: Largest message taken or sent.

    Calls raise `penstock_kit.errors.PenstockError`, carry the principal and trace of the call being
    served, and are retried on UNAVAILABLE within their deadline.

    Raises:
        InvalidArgument: `target` names no address.
    """
    addresses = addresses_of(target)
    if len(addresses) == 1:
        return _open(addresses[0], default_timeout_seconds, max_message_bytes, retries=True)
    return FailoverChannel(
        [_open(address, None, max_message_bytes, retries=False) for address in addresses],
        retry_seconds=default_timeout_seconds or DEFAULT_TIMEOUT_SECONDS,
    )


def _open(
    target: str, default_timeout_seconds: float | None, max_message_bytes: int, *, retries: bool
) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        target,
        options=[
            *([("grpc.service_config", json.dumps(_SERVICE_CONFIG))] if retries else []),
            ("grpc.enable_retries", int(retries)),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
            # What ends a connection whose peer answers no ping: grpc 1.85 waits a minute without it, whatever
            # the time-out of keepalive.
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # A service that restarts is found again quickly.
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # Two channels of one process must not share a broken connection's back-off.
            ("grpc.use_local_subchannel_pool", 1),
            # Never through an HTTP proxy: these are neighbours.
            ("grpc.enable_http_proxy", 0),
        ],
        interceptors=client_interceptors(target, default_timeout_seconds),
    )
