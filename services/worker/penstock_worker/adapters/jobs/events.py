"""Sends the events of tasks to Redis, from where the scheduler that leads takes them.

One bounded stream for all (`penstock_kit.queue.keys.JOB_EVENTS`): each entry's field `e` is a serialized
JobEvent. Redis may forget and the stream is trimmed, so what the scheduler does not say to have stored is
sent again; it stores what comes twice once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import hiredis

from penstock_kit.errors import DeadlineExceeded
from penstock_kit.lifecycle import TaskSet
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Backoff, Connection
from penstock_kit.queue.keys import JOB_EVENT_FIELD, JOB_EVENTS, JOB_EVENTS_LENGTH
from penstock_kit.queue.resp import ConnectionLost
from penstock_kit.threads import in_thread
from penstock_worker.adapters.jobs.spool import EventSpool

log = logging.getLogger(__name__)

BATCH_BYTES = 256 * 1024
PAUSE_SECONDS = 0.1
"""Between two sends: what happens in between goes together."""
RESEND_SECONDS = 10.0
LAST_RESEND_SECONDS = 60.0
SPOOL_SUFFIX = ".spool"


class _Resend:
    """When events of a spool that were sent and are not stored are sent again."""

    def __init__(self) -> None:
        self._stored = -1
        self._since = 0.0
        self._seconds = RESEND_SECONDS

    def due(self, spool: EventSpool, now: float) -> bool:
        if spool.stored != self._stored or spool.all_stored:
            self._stored, self._since, self._seconds = spool.stored, now, RESEND_SECONDS
            return False
        if now - self._since < self._seconds:
            return False
        self._since = now
        self._seconds = min(2 * self._seconds, LAST_RESEND_SECONDS)
        return True


def _spools_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*/events/*{SPOOL_SUFFIX}"))


class EventSender:
    """See the module.

    Args:
        redis_url: Where Redis is.
    """

    def __init__(self, redis_url: str) -> None:
        self._address = Address.parse(redis_url)
        self._spools: dict[EventSpool, _Resend] = {}
        self._tasks = TaskSet()
        self._wake = asyncio.Event()
        self._connection: Connection | None = None

    async def start(self) -> None:
        """Begin."""
        self._tasks.run_forever("send events of jobs", self._run)

    async def stop(self) -> None:
        """End; what was not sent is in the spools."""
        await self._tasks.stop()
        self._drop()
        for spool in self._spools:
            spool.close()
        self._spools.clear()

    def add(self, spool: EventSpool) -> None:
        """Send what is in a spool, and what will be, until `remove`."""
        self._spools[spool] = _Resend()
        self._wake.set()

    def remove(self, spool: EventSpool) -> None:
        """Send nothing more of a spool."""
        self._spools.pop(spool, None)

    def kick(self) -> None:
        """There is something to send."""
        self._wake.set()

    async def send_leftovers(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Send, once, what tasks of an agent before this one have left; then remove it.

        Args:
            folder: Where the directories of jobs are.
            wanted: Whether a task may go on here: then its spool does, too, and its numbers.
        """
        for path in await in_thread(_spools_in, folder):
            task = f"jobs/{path.parents[2].name}/tasks/{path.name.removesuffix(SPOOL_SUFFIX)}"
            if wanted(task):
                continue
            try:
                spool = EventSpool(path, task)
            except OSError as error:
                log.warning("events are lost", extra={"task": task, "error": str(error)})
                continue
            try:
                while await self._send(spool):
                    pass
            finally:
                spool.close()
            if not wanted(task):
                path.unlink(missing_ok=True)

    async def _run(self) -> None:
        backoff = Backoff(first_seconds=0.1, last_seconds=2.0)
        while True:
            self._wake.clear()
            try:
                for spool, resend in list(self._spools.items()):
                    if resend.due(spool, time.monotonic()):
                        spool.rewind()
                    while spool in self._spools and await self._send(spool):
                        pass
            except (ConnectionLost, hiredis.ReplyError, DeadlineExceeded):
                self._drop()
                for spool in self._spools:
                    spool.rewind()
                await asyncio.sleep(backoff.pause())
                continue
            backoff.reset()
            await asyncio.sleep(PAUSE_SECONDS)
            try:
                async with asyncio.timeout(RESEND_SECONDS / 4):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _send(self, spool: EventSpool) -> int:
        """Send a batch; return how many events it had."""
        batch = spool.unsent(BATCH_BYTES)
        if batch:
            if self._connection is None or self._connection.closed:
                self._connection = await Connection.connect(self._address, "worker-events")
            await self._connection.pipeline(
                [
                    (b"XADD", JOB_EVENTS, b"MAXLEN", b"~", JOB_EVENTS_LENGTH, b"*", JOB_EVENT_FIELD, event)
                    for event in batch
                ]
            )
        return len(batch)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
