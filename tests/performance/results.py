"""What a run measured: kept raw as JSON, read back for tables and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CLOSED, OPEN = "closed", "open"


@dataclass(frozen=True)
class Record:
    """One measured point.

    Attributes:
        workload: Key of the workload.
        server: Name of the server.
        door: Which way in.
        mode: closed (level = requests kept open) or open (level = requests sent per second).
        level: See mode.
        round: Which start of the server; the first is 1.
        rate: Right answers per second.
        p50: Median latency in milliseconds.
        p99: 99th percentile in milliseconds.
        errors: Requests that failed.
        cpu_per_1k: CPU-seconds of the whole server tree per 1,000 answers.
        pss_mib: Memory of the tree under this load, MiB.
        failure: Why there is no figure; empty if there is one.
    """

    workload: str
    server: str
    door: str
    mode: str
    level: float
    round: int
    rate: float = float("nan")
    p50: float = float("nan")
    p99: float = float("nan")
    errors: int = 0
    cpu_per_1k: float = float("nan")
    pss_mib: float = float("nan")
    failure: str = ""


@dataclass(frozen=True)
class Start:
    """One start of a server: seconds to its first right answer, and memory (PSS, MiB) before any load."""

    workload: str
    server: str
    round: int
    seconds: float
    idle_mib: float


@dataclass
class Results:
    """All of one run.

    Attributes:
        machine: On what, and which commit.
        options: What was asked for.
        titles: Names of the servers for people.
        records: The points.
        starts: The starts.
        ideal: Rows per second of torch called directly, by batch size; one per round.
        absent: Servers that could not be installed or started, and why.
        experiments: What the overload and the scaling experiment gave, by name.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    ideal: list[dict[int, float]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    experiments: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write all of it; a run that is cut short leaves what it had."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        raw["records"] = [Record(**record) for record in raw["records"]]
        raw["starts"] = [Start(**start) for start in raw["starts"]]
        raw["ideal"] = [{int(rows): rate for rows, rate in ideal.items()} for ideal in raw["ideal"]]
        return cls(**raw)

    def series(self, workload: str, mode: str) -> dict[tuple[str, str], dict[float, Record]]:
        """By (server, door), in the order measured: the mean over the rounds at each level."""
        groups: dict[tuple[str, str], dict[float, list[Record]]] = {}
        for record in self.records:
            if record.workload == workload and record.mode == mode:
                levels = groups.setdefault((record.server, record.door), {})
                levels.setdefault(record.level, []).append(record)
        return {
            key: {level: mean(records) for level, records in sorted(levels.items())}
            for key, levels in groups.items()
        }

    def direct(self, rows: int) -> float:
        """Rows per second of torch called directly with a batch of this size; NaN if not measured."""
        return (
            statistics.fmean(found) if (found := [i[rows] for i in self.ideal if rows in i]) else float("nan")
        )


def mean(records: Iterable[Record]) -> Record:
    """One record for several rounds; one that failed in every round stays failed."""
    records = list(records)
    good = [record for record in records if not record.failure]
    if not good:
        return records[0]
    numbers = {
        name: statistics.fmean(getattr(record, name) for record in good)
        for name in ("rate", "p50", "p99", "cpu_per_1k", "pss_mib")
    }
    errors = sum(record.errors for record in good)
    return Record(**{**asdict(good[0]), **numbers, "errors": errors, "round": 0})
