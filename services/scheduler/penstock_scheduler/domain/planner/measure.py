"""What replicas were seen to use, where that corrects what is assumed of their version."""

from __future__ import annotations

from collections.abc import Iterable

from penstock_scheduler.domain.planner.snapshot import Snapshot
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.version import VersionKey

NEWS = 1.1
"""A measurement is news if it is so many times what was known: a settled cluster writes nothing."""


def measured(snapshot: Snapshot, replicas: Iterable[Replica]) -> tuple[tuple[VersionKey, int], ...]:
    """The most memory that READY replicas use, by version, where it is news.

    Only grows: what a replica has for itself falls when another one beside it shares its weights, and the
    largest request comes rarely.
    """
    reported = {
        id_: seen
        for report in snapshot.reports.values()
        for id_, seen in report.replicas.items()
        if seen.memory_bytes and seen.state is ReplicaState.READY
    }
    if not reported:
        return ()
    most: dict[VersionKey, int] = {}
    for replica in replicas:
        seen = reported.get(replica.id)
        if seen is not None and replica.state is ReplicaState.READY:
            most[replica.version] = max(most.get(replica.version, 0), seen.memory_bytes)
    return tuple(
        (key, count)
        for key, count in sorted(most.items())
        if count > NEWS * snapshot.versions[key].measured_memory_bytes
    )
