"""Which scheduler leads, and whether what the database says of replicas is what runs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import psycopg

from support.mesh_process import Mesh

_LEADS = "penstock_scheduler_leading "


def schedulers(mesh: Mesh) -> list[str]:
    """The names of the schedulers."""
    return [unit.name for unit in mesh.record.units if unit.name.startswith("scheduler")]


def leaders(mesh: Mesh, among: list[str] | None = None) -> list[str]:
    """Which of them say that they lead; one that does not answer within half a second says nothing."""
    return [name for name in among or schedulers(mesh) if _leads(mesh.unit(name).metrics)]


def leader(mesh: Mesh) -> str:
    """The one that leads."""
    mesh.wait(lambda: len(leaders(mesh)) == 1, "one scheduler leads")
    return leaders(mesh)[0]


def seconds_until_another_leads(mesh: Mesh, old: str, limit: float = 30.0) -> float:
    """How long it takes until another one than `old` leads."""
    began = time.monotonic()
    others = [name for name in schedulers(mesh) if name != old]
    mesh.wait(lambda: leaders(mesh, others), f"another scheduler than {old} leads", limit)
    return time.monotonic() - began


def _leads(metrics: str) -> bool:
    if not metrics:
        return False
    try:
        answer = httpx.get(metrics, timeout=0.5, trust_env=False)
    except httpx.HTTPError:
        return False
    return any(line.startswith(_LEADS) and float(line[len(_LEADS) :]) for line in answer.text.splitlines())


@dataclass(frozen=True)
class Books:
    """What the database says of replicas, beside what runs.

    Attributes:
        placed: Replicas that have a node, by the beginning of their id.
        allocated: Allocations, by the replica that holds them.
        running: Processes of replicas, by the replica.
        overdrawn: Nodes whose allocations do not add up to what they are said to hold.
        epoch: How often the lead has changed hands.
    """

    placed: Counter[str]
    allocated: Counter[str]
    running: Counter[str]
    overdrawn: tuple[str, ...]
    epoch: int

    @property
    def balanced(self) -> bool:
        """Whether each placed replica has one allocation and one process, and nothing else has any."""
        once = all(count == 1 for counts in (self.placed, self.running) for count in counts.values())
        return once and self.placed == self.allocated == self.running and not self.overdrawn


def books(mesh: Mesh) -> Books:
    """Compare; the database is asked in one transaction."""
    dsn = "postgresql://" + mesh.unit("postgres").health.target.partition("://")[2]
    with psycopg.connect(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        placed = connection.execute(
            "SELECT id FROM scheduler.replicas WHERE state <> 'STOPPED' AND node IS NOT NULL"
        ).fetchall()
        allocated = connection.execute("SELECT replica FROM scheduler.allocations").fetchall()
        overdrawn = connection.execute(
            "SELECT n.name FROM scheduler.nodes n LEFT JOIN scheduler.allocations a ON a.node = n.name"
            " GROUP BY n.name, n.memory_bytes_allocated, n.memory_bytes"
            " HAVING coalesce(sum(a.memory_bytes), 0) <> n.memory_bytes_allocated"
            " OR n.memory_bytes_allocated > n.memory_bytes"
        ).fetchall()
        (epoch,) = connection.execute("SELECT epoch FROM scheduler.leader").fetchone() or (0,)
    return Books(
        Counter(_shown(row[0]) for row in placed),
        Counter(_shown(row[0]) for row in allocated),
        Counter(_processes(mesh)),
        tuple(row[0] for row in overdrawn),
        int(epoch),
    )


def _shown(replica: str) -> str:
    """As much of a replica's id as the kernel keeps of a process's name (15 bytes, with ps: before it)."""
    return replica[:12]


def _processes(mesh: Mesh) -> list[str]:
    """The replicas that run, each as its process is called; another mesh on this machine is not ours."""
    found = []
    for process in psutil.Process(mesh.process.pid).children(recursive=True):
        try:
            name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        except OSError:
            continue
        if name.startswith("ps:"):
            found.append(name.removeprefix("ps:"))
    return found
