"""gRPC between services: servers and channels with limits, deadlines, health and one error tree."""

from penstock_kit.rpc.channel import open_channel
from penstock_kit.rpc.context import PRINCIPAL_KEY, TRACEPARENT_KEY, principal
from penstock_kit.rpc.failover import FailoverChannel, addresses_of
from penstock_kit.rpc.server import RpcServer

__all__ = [
    "PRINCIPAL_KEY",
    "TRACEPARENT_KEY",
    "FailoverChannel",
    "RpcServer",
    "addresses_of",
    "open_channel",
    "principal",
]
