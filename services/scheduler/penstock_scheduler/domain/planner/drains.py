"""How replicas leave a node that is being drained: the new one is ready before the old one ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock_scheduler.domain.replica import Replica, ReplicaState

_PLACED = (ReplicaState.STARTING, ReplicaState.READY)
# Which of those that leave go first: one that does not answer is missed least.
_FIRST = {ReplicaState.BACKOFF: 0, ReplicaState.STARTING: 1, ReplicaState.READY: 2}


def dispensable(count: int, staying: Iterable[Replica], leaving: Iterable[Replica]) -> list[Replica]:
    """Picks those that may end now.

    As many of them stay as are missing elsewhere among the READY. One that keeps crashing is not waited
    for: it goes as soon as its successors have a place.

    Args:
        count: replicas that are asked for.
        staying: those of the group that are wanted, on other nodes or still without one.
        leaving: those of the group that are wanted, on nodes that are being drained.
    """
    states = [replica.state for replica in staying]
    needed = max(0, count - states.count(ReplicaState.READY))
    succeeded = sum(state in _PLACED for state in states) >= count
    order = sorted(leaving, key=lambda r: (_FIRST.get(r.state, 0), r.create_time, r.id))
    may_go = len(order) - needed
    return [
        replica
        for place, replica in enumerate(order)
        if place < may_go or (succeeded and replica.state is ReplicaState.BACKOFF)
    ]


def waits_for(here: Sequence[Replica], heirs: Sequence[Replica]) -> str:
    """Says what keeps a node from being empty, for people; empty if nothing does but replicas that end.

    Args:
        here: wanted replicas on the node.
        heirs: replicas of the same groups elsewhere, or without a node, that do not answer yet.
    """
    if not here:
        return ""
    words = f"{len(here)} replica{'s' * (len(here) > 1)} here until others answer in their place."
    stuck = [replica for replica in heirs if replica.message]
    if stuck:
        first = min(stuck, key=lambda r: (r.state is not ReplicaState.PENDING, r.id))
        words += f" replicas/{first.id}: {first.message}"
    return words


def waits_for_jobs(jobs: Iterable[str]) -> str:
    """Says which jobs still hold a part of a node, for people; empty if none does."""
    names = sorted(set(jobs))
    return f"jobs/{names[0]} writes a checkpoint and ends here." if names else ""
