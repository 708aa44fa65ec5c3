"""What gateways report, from protos to domain objects."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.scheduler.v1 import routing_service_pb2 as pb
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_scheduler.domain.traffic import LATENCY_BUCKETS, NO_COUNTS, Counts, Seen, TrafficKey
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.traffic import MAX_TARGETS

MAX_GATEWAY_NAME = 256
_COUNTS = (
    "arrived",
    "succeeded",
    "failed",
    "overloaded",
    "agreed",
    "disagreed",
    "latency_microseconds",
)


def traffic_from_message(message: pb.ReportTrafficRequest) -> tuple[str, float | None, Sequence[Seen]]:
    """Name of the process, seconds that it has run if it says so, and what it has counted.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    gateway = message.gateway
    if not gateway or len(gateway) > MAX_GATEWAY_NAME or not gateway.isprintable():
        raise InvalidArgument(
            f"A gateway reports under a name of 1 to {MAX_GATEWAY_NAME} printable characters.",
            metadata={"field": "gateway"},
        )
    if len(message.targets) > MAX_TARGETS:
        raise InvalidArgument(
            f"One report speaks of {MAX_TARGETS} versions at most, not {len(message.targets)}.",
            metadata={"field": "targets"},
        )
    uptime = message.uptime
    uptime_seconds = uptime.seconds + uptime.nanos / 1e9 if message.HasField("uptime") else None
    if uptime_seconds is not None and uptime_seconds < 0:
        raise InvalidArgument(
            f"uptime is {uptime_seconds:g} s; it cannot be negative.", metadata={"field": "uptime"}
        )
    seen = {}
    for target in message.targets:
        one = _seen(target)
        if one.key in seen:
            raise InvalidArgument(
                f"{one.key.version} of deployment {one.key.deployment} is reported twice.",
                metadata={"field": "targets"},
            )
        seen[one.key] = one
    return gateway, uptime_seconds, tuple(seen.values())


def _seen(target: pb.TargetTraffic) -> Seen:
    deployment = names.check_id(target.deployment, "deployment")
    model = names.parse_model(target.model)
    if target.version < 1:
        raise InvalidArgument(
            f"{target.model} has no version {target.version}; versions are numbered from 1.",
            metadata={"field": "targets.version"},
        )
    for field in (*_COUNTS, "waiting", "waiting_for_replica"):
        if getattr(target, field) < 0:
            raise InvalidArgument(
                f"{field} of deployment {deployment} is {getattr(target, field)}; counts cannot be negative.",
                metadata={"field": f"targets.{field}"},
            )
    if len(target.latencies) not in (0, LATENCY_BUCKETS) or any(count < 0 for count in target.latencies):
        raise InvalidArgument(
            f"latencies of deployment {deployment} must be {LATENCY_BUCKETS} counts, none negative, "
            "or be left out.",
            metadata={"field": "targets.latencies"},
        )
    counts = Counts(
        arrived=target.arrived,
        succeeded=target.succeeded,
        failed=target.failed,
        overloaded=target.overloaded,
        agreed=target.agreed,
        disagreed=target.disagreed,
        latency_microseconds=target.latency_microseconds,
        latencies=tuple(target.latencies) or NO_COUNTS.latencies,
    )
    key = TrafficKey(deployment, VersionKey(model, target.version))
    return Seen(key, counts, target.waiting, target.waiting_for_replica)
