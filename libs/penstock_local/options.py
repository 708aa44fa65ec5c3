"""What `penstock up` may be told."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock_kit.errors import InvalidArgument


def default_data_dir() -> Path:
    """$PENSTOCK_DATA_DIR, else ~/.penstock."""
    return Path(os.environ.get("PENSTOCK_DATA_DIR") or Path.home() / ".penstock")


@dataclass(frozen=True)
class MeshOptions:
    """How a mesh on one machine is made.

    Attributes:
        data_dir: Everything it keeps.
        host: Where the gateway listens.
        port: Where the gateway listens; 0 takes a free port.
        gateways: Gateway processes; they share the port.
        workers: Worker agents, each a node.
        schedulers: Scheduler processes; one of them leads.
        database_url: A PostgreSQL to use instead of an embedded one.
        redis_url: A Redis to use instead of an embedded one.
        durable: False for tests: the embedded servers flush nothing to disk.
        ready_seconds: How long the start may take.
        env: Added to the environment of every service.
    """

    data_dir: Path = field(default_factory=default_data_dir)
    host: str = "127.0.0.1"
    port: int = 8080
    gateways: int = 1
    workers: int = 1
    schedulers: int = 1
    database_url: str = field(default_factory=lambda: os.environ.get("PENSTOCK_DATABASE_URL", ""))
    redis_url: str = field(default_factory=lambda: os.environ.get("PENSTOCK_REDIS_URL", ""))
    durable: bool = True
    ready_seconds: float = 120.0
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", Path(self.data_dir).expanduser().absolute())
        if not 0 <= self.port <= 65535:
            raise InvalidArgument(
                f"--port {self.port} is not a port; choose one from 1 to 65535, or 0 for a free one."
            )
        counts = {
            "--gateways": self.gateways,
            "--workers": self.workers,
            "--schedulers": self.schedulers,
        }
        for flag, count in counts.items():
            if not 1 <= count <= 64:
                raise InvalidArgument(f"{flag} {count} is out of range; choose 1 to 64.")
