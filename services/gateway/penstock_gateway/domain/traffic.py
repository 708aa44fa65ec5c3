"""What came of the requests for each version behind a deployment, as the scheduler is told it.

Autoscaling and rollouts are decided by these counts, hence the care about whose doing an error is:

    succeeded    a result
    failed       the model or its replica is to blame: an error of theirs, a death, or no answer within the
                 deadline although hardly anything was ahead of the request (a model that hangs)
    overloaded   want of capacity: refused at the door, or late with a queue, or no replica, ahead of it
    neither      the caller's own errors, cancellations, and a gateway or deployment that is going

What is answered without computing (a kept answer, or an equal request under way) is not counted at all: it
puts no load on a replica, and says nothing new about the version.
"""

from __future__ import annotations

from bisect import bisect_right

from penstock_kit.errors import Code, DeadlineExceeded, PenstockError, Reason

# Bucket i of the latencies has those from 2^(i/4) to 2^((i+1)/4) times 100 µs; routing_service.proto says so.
LATENCY_BUCKETS = 64
LATENCY_BOUNDS = tuple(1e-4 * 2 ** (i / 4) for i in range(1, LATENCY_BUCKETS))

_BLAMED = frozenset({Code.UNKNOWN, Code.FAILED_PRECONDITION, Code.UNAVAILABLE, Code.INTERNAL, Code.DATA_LOSS})
# Who cancels with less left than this part of what it has waited was late.
_LATE_PART = 0.1
_LATE = DeadlineExceeded()
# Said by a gateway or a replica that ends, or of a deployment that has nobody to ask: nobody computed.
_NOBODY_COMPUTED = frozenset({Reason.NOT_READY, Reason.SHUTTING_DOWN})


class Tally:
    """What one gateway process has counted of one version behind a deployment since it began.

    Args:
        deployment: The name that callers use.
        model: models/{model}.
        version: Its number.

    Attributes:
        ready: Whether a replica would answer now.
        arrived: Requests that came for it, refused ones included, mirrored ones not.
        succeeded: Answered with a result.
        failed: Answered with an error that the model or its replica is to blame for, or too late.
        overloaded: Refused, or late, for want of capacity.
        latencies: Answers by how long they took, of succeeded and failed.
        seconds: Sum of how long they took.
        agreed: Mirrored answers that agree with those returned.
        disagreed: Mirrored answers that differ, errors included.
    """

    __slots__ = (
        "agreed",
        "arrived",
        "deployment",
        "disagreed",
        "failed",
        "latencies",
        "model",
        "overloaded",
        "ready",
        "seconds",
        "succeeded",
        "version",
    )

    def __init__(self, deployment: str = "", model: str = "", version: int = 0) -> None:
        self.deployment = deployment
        self.model = model
        self.version = version
        self.ready = False
        self.arrived = self.succeeded = self.failed = self.overloaded = 0
        self.latencies = [0] * LATENCY_BUCKETS
        self.seconds = 0.0
        self.agreed = self.disagreed = 0

    def succeed(self, took: float) -> None:
        """Count a result.

        Args:
            took: Seconds from the request's coming.
        """
        self.succeeded += 1
        self.seconds += took
        self.latencies[bisect_right(LATENCY_BOUNDS, took)] += 1

    def err(self, error: BaseException, took: float, left: float, reckoned: float = 0.0) -> None:
        """Count an error, if it says anything about the version.

        Args:
            error: What the caller is told.
            took: Seconds from the request's coming.
            left: Seconds to its deadline.
            reckoned: Seconds that those ahead of it were expected to take when it came.
        """
        if not isinstance(error, PenstockError):
            # Cancelled. gRPC's clients cancel when their time is over, a moment before it is over here.
            if left > took * _LATE_PART:
                return
            error = _LATE
        code = error.code
        if code is Code.DEADLINE_EXCEEDED:
            if reckoned or not self.ready:
                self.overloaded += 1
                return
        elif code is Code.RESOURCE_EXHAUSTED:
            self.overloaded += error.reason is Reason.OVERLOADED
            return
        elif code not in _BLAMED or error.reason in _NOBODY_COMPUTED:
            return
        self.failed += 1
        self.seconds += took
        self.latencies[bisect_right(LATENCY_BOUNDS, took)] += 1


class _Nobody(Tally):
    """For requests that are answered without computing."""

    __slots__ = ()

    def succeed(self, took: float) -> None:
        """Nothing was computed."""

    def err(self, error: BaseException, took: float, left: float, reckoned: float = 0.0) -> None:
        """The one that was computed counts."""


NOBODY = _Nobody()
Key = tuple[str, str, int]


class Tallies:
    """The tallies of all versions that requests can reach, and of those that they could reach lately.

    A version that comes back, as after a rollback, goes on counting where it was.

    Args:
        limit: Versions remembered at most beyond those in the table; who was gone for longest is forgotten,
            and begins at zero if it comes back.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._here: dict[Key, Tally] = {}
        self._gone: dict[Key, Tally] = {}

    def __len__(self) -> int:
        return len(self._here) + len(self._gone)

    @property
    def here(self) -> list[Tally]:
        """Of versions in the routing table."""
        return list(self._here.values())

    @property
    def gone(self) -> list[Tally]:
        """Of versions that have left it, the longest gone first."""
        return list(self._gone.values())

    def follow(self, ready: dict[Key, bool]) -> None:
        """Take which versions can be reached now, and whether a replica of each would answer."""
        for key in [key for key in self._here if key not in ready]:
            tally = self._gone[key] = self._here.pop(key)
            tally.ready = False
        for key, is_ready in ready.items():
            if key not in self._here:
                self._here[key] = self._gone.pop(key) if key in self._gone else Tally(*key)
            self._here[key].ready = is_ready
        while len(self._gone) > self._limit:
            del self._gone[next(iter(self._gone))]

    def of(self, key: Key) -> Tally:
        """Return the tally of a version that can be reached.

        Raises:
            KeyError: It cannot.
        """
        return self._here[key]
