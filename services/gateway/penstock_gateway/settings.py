"""What the gateway is told at start."""

from __future__ import annotations

import ipaddress
from typing import Self

from pydantic import Field, model_validator

from penstock_kit.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Settings of one gateway process; each is an environment variable PENSTOCK_GATEWAY_…."""

    gateway_listen: str = Field(
        "127.0.0.1:8080", description="host:port of the one door; port 0 takes a free one"
    )
    gateway_share_port: bool = Field(
        False, description="Share the port with other gateway processes of this user (SO_REUSEPORT)"
    )
    gateway_name: str = Field("", description="Name of this process; empty makes one up")
    gateway_default_timeout_seconds: float = Field(
        60.0, gt=0, le=3600, description="Deadline of calls that give none"
    )
    gateway_stream_timeout_seconds: float = Field(
        24 * 3600.0,
        gt=0,
        description="Deadline of streams (watches, uploads, many inferences) that give none",
    )
    gateway_drain_seconds: float = Field(
        10.0, ge=0, le=600, description="Time for open calls to end after SIGTERM"
    )
    gateway_max_body_bytes: int = Field(
        1 << 30,
        gt=0,
        description="Bytes of unfinished request bodies held at most, over all connections; "
        "and as many of answers that their callers do not read",
    )

    gateway_cache_bytes: int = Field(
        256 << 20,
        ge=0,
        le=1 << 40,
        description="Bytes of answers kept for equal requests, over all deployments; 0 keeps none",
    )

    @property
    def host(self) -> str:
        """Address to listen on."""
        return self.gateway_listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port to listen on."""
        return int(self.gateway_listen.rpartition(":")[2])

    @model_validator(mode="after")
    def _loopback_only(self) -> Self:
        host, _, port = self.gateway_listen.rpartition(":")
        if not port.isdigit() or int(port) > 65535 or not host:
            raise ValueError(f"PENSTOCK_GATEWAY_LISTEN: {self.gateway_listen!r} is not host:port")
        name = host.strip("[]")
        try:
            loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            raise ValueError(
                f"PENSTOCK_GATEWAY_LISTEN needs an IP address or localhost, not {name!r}"
            ) from None
        if not loopback:
            raise ValueError(
                "PENSTOCK_GATEWAY_LISTEN: the gateway has no API keys yet, so that anyone who reaches "
                f"{name} could change all: it listens on loopback only (127.0.0.1, ::1); put a proxy with "
                "authentication in front of it"
            )
        return self
