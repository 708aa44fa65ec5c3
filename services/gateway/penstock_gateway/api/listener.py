"""The socket of the one door."""

from __future__ import annotations

import ipaddress
import os
import socket

from penstock_gateway.settings import GatewaySettings
from penstock_kit.errors import Unavailable


def open_listener(settings: GatewaySettings) -> socket.socket:
    """Return a bound socket that does not listen yet.

    Raises:
        Unavailable: Somebody listens there already, or the port may not be used.
    """
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    version = ipaddress.ip_address(host).version
    listener = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Off unless several gateways are meant to share the port: a second mesh must not take half the calls.
    if settings.gateway_share_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, settings.port))
    except OSError as error:
        listener.close()
        raise Unavailable(
            f"Cannot listen on {settings.gateway_listen}: {os.strerror(error.errno or 0)}. "
            "Set PENSTOCK_GATEWAY_LISTEN to another port, or stop what uses this one."
        ) from error
    return listener
