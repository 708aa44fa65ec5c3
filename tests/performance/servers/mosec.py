"""Mosec: Rust in front, one Python process behind, raw bytes over HTTP."""

from __future__ import annotations

from pathlib import Path

from performance.doors import Door, raw_door
from performance.environments import REQUIREMENTS
from performance.servers.base import Peer
from performance.workloads import Workload


class Mosec(Peer):
    """One worker process; two for W1, where they answer more than one that joins at few callers."""

    name = "mosec"
    title = "Mosec 0.9.8"
    environment_name = "mosec"
    doors = ("wrk",)

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Its own command line says the port."""
        script = str(REQUIREMENTS / "mosec_app.py")
        return [
            self.python,
            script,
            "--address",
            "127.0.0.1",
            "--port",
            str(ports[0]),
            "--log-level",
            "warning",
        ]

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """Raw fp32 to /inference."""
        return (raw_door(f"127.0.0.1:{ports[0]}", workload, "/inference"),)


class MosecJoining(Mosec):
    """Mosec that joins echoes too: more at 64 callers, a millisecond later for the first."""

    name = "mosec-joining"
    title = "Mosec 0.9.8, joining"
    workloads = ("w1",)

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """Joined, within 1 ms."""
        return {"BENCH_JOIN": "1"}
