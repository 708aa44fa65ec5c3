"""The stream in Redis that agents write events of jobs into."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from datetime import UTC

from google.protobuf.message import DecodeError

from penstock.scheduler.v1 import job_pb2
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.queue.keys import JOB_EVENT_FIELD, JOB_EVENTS
from penstock_scheduler.adapters.redis import Redis
from penstock_scheduler.domain.job import EventKind
from penstock_scheduler.domain.job_events import JobEvent
from penstock_scheduler.usecases.job_events import Entry

log = logging.getLogger(__name__)

MAX_LINE = 4000
MAX_EVENT_BYTES = 64 * 1024
_KINDS = {
    "progress": EventKind.PROGRESS,
    "metrics": EventKind.METRICS,
    "log": EventKind.LOG,
    "checkpoint": EventKind.CHECKPOINT,
}


class RedisEventStream:
    """Implements `EventStream`.

    Args:
        redis: where the stream is.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def read(self, count: int) -> Sequence[Entry]:
        """See `EventStream.read`."""
        found = await self._redis.ask(b"XRANGE", JOB_EVENTS, b"-", b"+", b"COUNT", count)
        entries = []
        for id_, fields in found:
            values = dict(zip(fields[::2], fields[1::2], strict=False))
            entries.append(Entry(id_, event_from_bytes(values.get(JOB_EVENT_FIELD, b""))))
        return entries

    async def drop(self, ids: Sequence[bytes]) -> None:
        """See `EventStream.drop`."""
        await self._redis.ask(b"XDEL", JOB_EVENTS, *ids)


def event_from_bytes(data: bytes) -> JobEvent | None:
    """An event as its agent wrote it; None if nobody can make sense of it, and then it is said."""
    try:
        message = job_pb2.JobEvent.FromString(data)
        job, task = names.parse_task(message.task)
        if message.number < 1:
            raise ValueError("it has no number")
        moment = message.time.ToDatetime(tzinfo=UTC)
    except (DecodeError, InvalidArgument, ValueError, OverflowError) as error:
        log.warning("an event of a job is unreadable: %s", error)
        return None
    message.ClearField("sequence")
    kind = _KINDS.get(message.WhichOneof("event") or "")
    if kind is None or len(data) > MAX_EVENT_BYTES:
        # Passed over it would be sent again and again, and nothing after it stored.
        message.log.text = f"Something that happened is not kept: it is described in {len(data)} bytes."
        kind = EventKind.LOG
    if kind is EventKind.LOG:
        # Postgres takes no NUL in texts, and programs print anything.
        message.log.text = message.log.text[:MAX_LINE].replace("\0", "\N{REPLACEMENT CHARACTER}")
    return JobEvent(
        job=job,
        task=task,
        number=message.number,
        kind=kind,
        time=moment,
        document=message.SerializeToString(),
        progress=message.progress.SerializeToString() if kind is EventKind.PROGRESS else b"",
        # JSON has no infinity; the event itself keeps the value.
        metrics={name: value for name, value in message.metrics.values.items() if math.isfinite(value)},
        artifact=message.checkpoint.artifact,
    )
