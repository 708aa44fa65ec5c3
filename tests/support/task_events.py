"""Reads the stream of events of jobs as the scheduler does."""

from __future__ import annotations

from collections.abc import Callable

from penstock.scheduler.v1 import job_pb2
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.keys import JOB_EVENT_FIELD, JOB_EVENTS
from support.waiting import eventually


class Events:
    """The events in Redis, each once and in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def of(self, task: str) -> list[job_pb2.JobEvent]:
        """Those of a task."""
        entries = await self._connection.command("XRANGE", JOB_EVENTS, "-", "+")
        found: dict[int, job_pb2.JobEvent] = {}
        for _, (field, data) in entries:
            assert field == JOB_EVENT_FIELD
            event = job_pb2.JobEvent.FromString(data)
            if event.task == task:
                found[event.number] = event
        return [found[number] for number in sorted(found)]

    async def lines(self, task: str) -> list[str]:
        """The lines of its log."""
        return [event.log.text for event in await self.of(task) if event.HasField("log")]

    async def until(self, task: str, condition: Callable[[list[job_pb2.JobEvent]], object]) -> None:
        """Wait for events."""

        async def holds() -> object:
            return condition(await self.of(task))

        await eventually(holds)
