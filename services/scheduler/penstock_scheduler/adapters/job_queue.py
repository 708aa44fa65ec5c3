"""The queue of jobs in Redis."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from penstock_kit.errors import PenstockError
from penstock_kit.queue.keys import JOB_QUEUE, JOB_QUEUE_LENGTH
from penstock_scheduler.adapters.redis import Redis

log = logging.getLogger(__name__)

PUT_SECONDS = 0.5
AWAY_SECONDS = 5.0
WAIT_SECONDS = 2
MARGIN_SECONDS = 3.0
TAKE = 1000

# One command, so that the list is never longer than its bound.
_PUT = b"redis.call('RPUSH', KEYS[1], ARGV[1]) redis.call('LTRIM', KEYS[1], -tonumber(ARGV[2]), -1)"


class RedisJobQueue:
    """Implements `JobQueue`.

    Args:
        putting: for those who put jobs in.
        taking: a connection of its own for the one who takes them out: waiting holds it up.
        clock: seconds; tests give another.
    """

    def __init__(self, putting: Redis, taking: Redis, clock: Callable[[], float] = time.monotonic) -> None:
        self._putting = putting
        self._taking = taking
        self._clock = clock
        self._away_until = float("-inf")

    async def put(self, job_id: str) -> None:
        """See `JobQueue.put`."""
        if self._clock() < self._away_until:
            return
        try:
            command = (b"EVAL", _PUT, 1, JOB_QUEUE, job_id, JOB_QUEUE_LENGTH)
            await self._putting.ask(*command, timeout=PUT_SECONDS)
        except PenstockError as error:
            # Callers do not wait for it each time.
            self._away_until = self._clock() + AWAY_SECONDS
            log.warning("job %s is found at the next look at the database: %s", job_id, error)

    async def take(self) -> Sequence[str]:
        """See `JobQueue.take`."""
        first = await self._taking.ask(
            b"BLPOP", JOB_QUEUE, WAIT_SECONDS, timeout=WAIT_SECONDS + MARGIN_SECONDS
        )
        if first is None:
            return ()
        more = await self._taking.ask(b"LPOP", JOB_QUEUE, TAKE) or []
        return [each.decode(errors="replace") for each in (first[1], *more)]
