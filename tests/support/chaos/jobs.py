"""What the events of a job say about what it did twice."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.scheduler.v1 import job_pb2


def repeated(events: Iterable[job_pb2.JobEvent]) -> list[tuple[int, int]]:
    """For each time that it went back: the step of the last checkpoint, and where it went on."""
    found, done, last = [], 0, 0
    for event in events:
        if event.HasField("checkpoint") and not event.checkpoint.artifact:
            # Those with an artifact say that a part of one is in the registry, too.
            last = max(last, event.checkpoint.step)
        elif event.HasField("progress") and event.progress.total:
            if event.progress.done < done:
                found.append((last, event.progress.done))
            done = event.progress.done
    return found
