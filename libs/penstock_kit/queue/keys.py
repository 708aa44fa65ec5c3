"""Every Redis key of the queue, and nothing else.

The prefix carries the version of the layout (``pk1``): a change of meaning takes a new prefix, so that
old and new processes never misread each other. The part in braces is the hash tag: all keys of one
queue, and all keys of one gateway, live in one slot of a Redis Cluster.

    pk1:epoch                          token that vanishes with the data
    pk1:{<queue>}:p0 | p1 | p2         streams of requests: high, normal, low priority
    pk1:{<queue>}:lease:<consumer>     exists while the replica process is alive
    pk1:{<queue>}:running:<consumer>   the suspect that the replica computes now
    pk1:{<queue>}:stats                hash: consumer → serialized ReplicaStatistics
    pk1:{<queue>}:cache                hash: gateway → serialized CacheStatistics
    pk1:{<queue>}:dead                 stream of dead letters, capped
    pk1:{<gateway>}:replies            list of packed replies
    pk1:{jobs}:events                  stream of what happens in jobs; each entry's field `e` is a
                                       serialized scheduler.v1.JobEvent
    pk1:{jobs}:queue                   list of the jobs that callers made or changed, oldest first, until
                                       the scheduler that leads has taken them
"""

import re

PREFIX = "pk1"
EPOCH = b"pk1:epoch"
GROUP = b"replicas"
JOB_EVENTS = b"pk1:{jobs}:events"
JOB_EVENT_FIELD = b"e"
JOB_EVENTS_LENGTH = 20_000
"""Entries that agents let the stream of events grow to, about; what is trimmed they send again."""
JOB_QUEUE = b"pk1:{jobs}:queue"
JOB_QUEUE_LENGTH = 10_000
"""Names that wait in the queue of jobs; the oldest give way, and are found in the database."""

PRIORITY_HIGH = 0
PRIORITY_NORMAL = 1
PRIORITY_LOW = 2
PRIORITIES = (PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW)

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")


def queue_name(deployment: str, version: int, digest: str) -> str:
    """Name the queue of one version of one deployment: ``<deployment>:<version>:<first 12 of digest>``.

    ``digest`` is the version's tree digest in hex, with or without a ``sha256:`` prefix.

    Raises:
        ValueError: a part is empty or has characters that a key must not have.
    """
    short = digest.rpartition(":")[2][:12]
    if not _PART.fullmatch(deployment) or version < 1 or not re.fullmatch(r"[0-9a-f]{1,12}", short):
        raise ValueError(f"No queue can be named after {deployment!r}, version {version}, digest {digest!r}.")
    return f"{deployment}:{version}:{short}"


def stream(queue: str, priority: int) -> bytes:
    """Stream of the requests of one priority."""
    if priority not in PRIORITIES:
        raise ValueError(f"Priority {priority} does not exist; use 0 (high), 1 (normal) or 2 (low).")
    return f"{PREFIX}:{{{queue}}}:p{priority}".encode()


def streams(queue: str) -> tuple[bytes, bytes, bytes]:
    """The three streams of a queue, highest priority first."""
    return stream(queue, 0), stream(queue, 1), stream(queue, 2)


def lease(queue: str, consumer: str) -> bytes:
    """Key that exists while the replica process ``consumer`` is alive."""
    return f"{PREFIX}:{{{queue}}}:lease:{consumer}".encode()


def running(queue: str, consumer: str) -> bytes:
    """Key that names the suspect which ``consumer`` computes now: ``<stream> <entry id>``."""
    return f"{PREFIX}:{{{queue}}}:running:{consumer}".encode()


def statistics(queue: str) -> bytes:
    """Hash of consumer → serialized ReplicaStatistics."""
    return f"{PREFIX}:{{{queue}}}:stats".encode()


def cache(queue: str) -> bytes:
    """Hash of gateway → serialized CacheStatistics."""
    return f"{PREFIX}:{{{queue}}}:cache".encode()


def dead(queue: str) -> bytes:
    """Stream of the requests that killed two replicas."""
    return f"{PREFIX}:{{{queue}}}:dead".encode()


def replies(gateway: str) -> bytes:
    """List of the replies for one gateway process."""
    return f"{PREFIX}:{{{gateway}}}:replies".encode()
