"""What an owner asks of autoscaling, and what of it is stored."""

from __future__ import annotations

from dataclasses import dataclass

from penstock_scheduler.domain.version import VersionKey

DEFAULT_QUEUE_WAIT_SECONDS = 0.1
DEFAULT_IDLE_SECONDS = 300.0
DEFAULT_COOL_DOWN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """Lets the number of replicas of each target follow the load; see scheduler/v1/deployment.proto.

    Attributes:
        min_replicas: at least so many; 0 ends all of them after `idle_seconds`.
        max_replicas: at most so many.
        queue_wait_seconds: how long a request may wait in the queue, most of the time.
        idle_seconds: how long nothing must have come before the last replica ends.
        cool_down_seconds: how long fewer replicas must have been enough before any ends.
    """

    min_replicas: int = 1
    max_replicas: int = 0
    queue_wait_seconds: float = 0.0
    idle_seconds: float = 0.0
    cool_down_seconds: float = 0.0

    def clamp(self, replicas: int) -> int:
        """The nearest number that is allowed."""
        return max(self.min_replicas, min(replicas, self.max_replicas))


@dataclass(frozen=True, slots=True)
class Scale:
    """What survives a change of the leader.

    Attributes:
        desired: replicas of each target that the load asks for.
        capacities: answers per second that one replica of a version was measured to give when it had as much
            to do as it could, sorted; versions that never had are not among them.
    """

    desired: int
    capacities: tuple[tuple[VersionKey, float], ...] = ()
