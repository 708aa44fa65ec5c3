"""What happens in jobs, and how much of it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from penstock_scheduler.domain.job import EventKind

MAX_LOG_LINES = 20_000
"""Lines of a job's log that are kept, the first ones; at 4,000 characters each that is 80 MB at most."""

LIMITS: Mapping[EventKind, int] = {
    EventKind.PROGRESS: 1_000,
    EventKind.METRICS: 20_000,
    EventKind.CHECKPOINT: 1_000,
}
"""Of more events than these every second one is forgotten, but for the newest quarter."""

MAX_METRICS = 1_000
"""Metrics whose latest value is kept with a job; a program may name others at every step."""

MAX_CHECKPOINTS = 4_096
"""Checkpoints at the registry that are remembered with a job, the newest: agents delete what is older."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened in a job.

    Attributes:
        job: id of the job.
        task: number of the task.
        number: counts the events of the task, from 1.
        kind: what it is.
        time: when.
        document: the event as a serialized scheduler.v1.JobEvent.
        progress: of PROGRESS, the serialized scheduler.v1.JobProgress.
        metrics: of METRICS, the values.
        artifact: of CHECKPOINT, its name at the registry; empty if it was not sent there.
        sequence: counts the events of the job, in the order they were stored; 0 before.
    """

    job: str
    task: int
    number: int
    kind: EventKind
    time: datetime
    document: bytes = field(repr=False)
    progress: bytes = b""
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifact: str = ""
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """What is stored of new events, and what they change of the job.

    Attributes:
        events: those that are stored.
        cut: the line of the log in whose place it is said that further ones are not kept, if there is one.
        log_lines: lines of the log so far, those that were not kept included.
        progress: the latest one; empty if there is none.
        metrics: the latest value of each.
        artifacts: checkpoints at the registry.
    """

    events: tuple[JobEvent, ...]
    cut: JobEvent | None
    log_lines: int
    progress: bytes
    metrics: Mapping[str, float]
    artifacts: tuple[str, ...]


def following(events: Sequence[JobEvent], stored: int) -> list[JobEvent]:
    """Those events of a task that follow the last stored one without a gap, each once.

    What is behind a gap is sent again by its agent, which is told the last stored number.
    """
    found: list[JobEvent] = []
    for event in sorted(events, key=lambda event: event.number):
        if event.number == stored + 1:
            found.append(event)
            stored += 1
    return found


def keep(events: Sequence[JobEvent], log_lines: int) -> Kept:
    """Decides what is stored of new events of a job.

    Args:
        events: in their order.
        log_lines: lines of its log so far.
    """
    kept: list[JobEvent] = []
    cut: JobEvent | None = None
    progress = b""
    metrics: dict[str, float] = {}
    artifacts: list[str] = []
    for event in events:
        if event.kind is EventKind.LOG:
            log_lines += 1
            if log_lines > MAX_LOG_LINES + 1:
                continue
            if log_lines == MAX_LOG_LINES + 1:
                cut = event
        kept.append(event)
        progress = event.progress or progress
        metrics.update(event.metrics)
        if event.artifact:
            artifacts.append(event.artifact)
    return Kept(tuple(kept), cut, log_lines, progress, metrics, tuple(artifacts))


def latest_metrics(known: Mapping[str, float], fresh: Mapping[str, float]) -> dict[str, float]:
    """The latest value of each metric, of those that came first if there are too many."""
    found = dict(known)
    for name, value in fresh.items():
        if name in found or len(found) < MAX_METRICS:
            found[name] = value
    return found


def newest_checkpoints(known: Sequence[str], fresh: Sequence[str]) -> list[str]:
    """Names of checkpoints, each once, of the newest if there are too many."""
    return list(dict.fromkeys((*known, *fresh)))[-MAX_CHECKPOINTS:]
