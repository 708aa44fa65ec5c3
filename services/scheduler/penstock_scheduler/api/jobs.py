"""JobService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from penstock.scheduler.v1 import job_pb2, job_service_pb2_grpc
from penstock.scheduler.v1 import job_service_pb2 as pb
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.rpc import principal
from penstock_scheduler.api.job_messages import asked_from_message, event_to_message, job_to_message
from penstock_scheduler.api.paging import decode_token, encode_token, page_size
from penstock_scheduler.api.requests import fingerprint, request_id
from penstock_scheduler.domain.job import EventKind, JobState
from penstock_scheduler.usecases.job_events import JobEvents
from penstock_scheduler.usecases.job_ports import JobRequest
from penstock_scheduler.usecases.jobs import Jobs

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_EVENTS_PAGE = 1000
MAX_EVENTS_PAGE = 10_000
MAX_PAGE_BYTES = 4 * 1024 * 1024
"""A page ends here, however many items were asked for: lines of logs and reports of jobs may be long."""
_STATES = {state.value: state for state in JobState}


class JobServicer(job_service_pb2_grpc.JobServiceServicer):
    """Jobs, and what happens in them."""

    def __init__(self, jobs: Jobs, events: JobEvents) -> None:
        self._jobs = jobs
        self._events = events

    async def CreateJob(self, request: pb.CreateJobRequest, context: Context) -> job_pb2.Job:
        """See job_service.proto."""
        asked = asked_from_message(request.job, principal())
        key = JobRequest(request_id(request.request_id), fingerprint(request))
        return job_to_message(await self._jobs.create(asked, key))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> job_pb2.Job:
        """See job_service.proto."""
        return job_to_message(await self._jobs.get(names.parse_job(request.name)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """See job_service.proto."""
        size = page_size(request.page_size)
        project = request.project.removeprefix("projects/")
        if project:
            names.check_id(project, "project")
        states = []
        for number in request.states:
            if number not in _STATES:
                raise InvalidArgument("states names a state that no job has.", metadata={"field": "states"})
            states.append(_STATES[number])
        after = _position(decode_token(request.page_token))
        found = await self._jobs.page(after, size + 1, project, states)
        page: list[job_pb2.Job] = []
        room = MAX_PAGE_BYTES
        for view in found[:size]:
            message = job_to_message(view)
            room -= message.ByteSize()
            if page and room < 0:
                break
            page.append(message)
        token = ""
        if len(found) > len(page):
            last = found[len(page) - 1].job
            token = encode_token(f"{last.create_time.isoformat()}|{last.id}")
        return pb.ListJobsResponse(jobs=page, next_page_token=token)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> job_pb2.Job:
        """See job_service.proto."""
        view = await self._jobs.cancel(names.parse_job(request.name), actor=principal())
        return job_to_message(view)

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Context) -> Empty:
        """See job_service.proto."""
        await self._jobs.delete(names.parse_job(request.name))
        return Empty()

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[job_pb2.Job]:
        """See job_service.proto."""
        async for view in self._jobs.watch(names.parse_job(request.name)):
            yield job_to_message(view)

    async def ListJobEvents(
        self, request: pb.ListJobEventsRequest, context: Context
    ) -> pb.ListJobEventsResponse:
        """See job_service.proto."""
        size = page_size(request.page_size, DEFAULT_EVENTS_PAGE, MAX_EVENTS_PAGE)
        job = names.parse_job(request.parent)
        found = await self._events.page(job, request.after, size + 1, _kinds(request.kinds))
        page: list[job_pb2.JobEvent] = []
        room = MAX_PAGE_BYTES
        for event in found[:size]:
            room -= len(event.document)
            if page and room < 0:
                break
            page.append(event_to_message(event))
        return pb.ListJobEventsResponse(events=page, more=len(found) > len(page))

    async def WatchJobEvents(
        self, request: pb.WatchJobEventsRequest, context: Context
    ) -> AsyncIterator[job_pb2.JobEvent]:
        """See job_service.proto."""
        job = names.parse_job(request.name)
        async for event in self._events.watch(job, request.after, _kinds(request.kinds)):
            yield event_to_message(event)


def _kinds(numbers: Iterable[int]) -> frozenset[EventKind]:
    """Raises InvalidArgument for a kind that does not exist."""
    try:
        return frozenset(EventKind(number) for number in numbers if number)
    except ValueError:
        raise InvalidArgument("kinds names a kind that no event has.", metadata={"field": "kinds"}) from None


def _position(key: str) -> tuple[datetime, str] | None:
    """Where the page before ended; None for the first.

    Raises:
        InvalidArgument: the token is of another list.
    """
    if not key:
        return None
    moment, _, job = key.partition("|")
    try:
        return datetime.fromisoformat(moment).astimezone(UTC), job
    except (ValueError, OverflowError):
        raise InvalidArgument("page_token is of another list; leave it empty to begin anew.") from None
