# Made from _async/jobs.py by libs/make_sync.py; edit that and run it again.
"""Jobs: work that ends, such as training, conversion and compression."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import grpc

from penstock._sync import io
from penstock._sync.core import Core
from penstock.errors import DeadlineExceeded, FailedPrecondition, Reason
from penstock.jobs import describe_job, job_ended, new_job_name
from penstock.names import resource, short
from penstock.scheduler.v1 import job_pb2
from penstock.scheduler.v1 import job_service_pb2 as service
from penstock.transport import Attempts, new_request_id, translate

JobCallback = Callable[[job_pb2.Job], None]
EventCallback = Callable[[job_pb2.JobEvent], None]

OUTAGE_SECONDS = 600.0
"""Who watches waits so long for a mesh that does not answer: longer than any restart, not for ever."""
_HELD_SECONDS = 60.0


class Jobs(Core):
    """Work that ends."""

    def create_job(self, job: job_pb2.Job, *, request_id: str = "") -> job_pb2.Job:
        """Queue a job; return it with the numbers of what it refers to.

        Args:
            job: What is to be done, and with what: scheduler/v1/job.proto. Without a name it gets one.
            request_id: A key that makes a retry by another program safe, too; default is a fresh one.

        Raises:
            InvalidArgument: Something is wrong with it; the words name it, with what is right.
            NotFound: A dataset, version, deployment or project that it names does not exist.
            FailedPrecondition: No node could ever hold it.
            AlreadyExists: There is another job of that name.
        """
        request = service.CreateJobRequest(job=job, request_id=request_id or new_request_id())
        request.job.name = resource("jobs", job.name or new_job_name(job))
        return self._unary(self._jobs.CreateJob, request)

    def get_job(self, name: str) -> job_pb2.Job:
        """Return a job.

        Raises:
            NotFound: There is no such job.
        """
        return self._unary(self._jobs.GetJob, service.GetJobRequest(name=resource("jobs", name)))

    def list_jobs(
        self,
        *,
        project: str = "",
        states: Sequence[job_pb2.JobState.ValueType] = (),
        limit: int | None = None,
    ) -> list[job_pb2.Job]:
        """Return jobs, newest first; of one project and in some states only, if given."""
        request = service.ListJobsRequest(states=states)
        if project:
            request.project = resource("projects", project)
        return self._list(self._jobs.ListJobs, request, lambda page: page.jobs, limit)

    def cancel_job(self, name: str) -> job_pb2.Job:
        """End a job; it is CANCELLED within seconds.

        Raises:
            FailedPrecondition: It has succeeded or failed already, or is being finished.
            NotFound: There is no such job.
        """
        return self._unary(self._jobs.CancelJob, service.CancelJobRequest(name=resource("jobs", name)))

    def delete_job(self, name: str) -> None:
        """Remove a job that has ended, with its events and checkpoints; its results stay.

        Raises:
            FailedPrecondition: It has not ended.
            NotFound: There is no such job.
        """
        self._delete(self._jobs.DeleteJob, service.DeleteJobRequest(name=resource("jobs", name)))

    def watch_job(
        self, name: str, *, timeout: float = 86400.0, on_change: JobCallback | None = None
    ) -> job_pb2.Job:
        """Wait until a job has ended, however it ends; return it.

        Args:
            name: Name of the job.
            timeout: Seconds to wait.
            on_change: Told of the job at once and at every change.

        Raises:
            DeadlineExceeded: It has not ended yet; the words say where it stands.
            NotFound: There is no such job.
            Unavailable: Nothing has answered for ten minutes; what restarts is waited for.
        """
        attempts = Attempts(timeout, OUTAGE_SECONDS)
        last: job_pb2.Job | None = None
        while True:
            pause = 0.1
            try:
                request = service.WatchJobRequest(name=resource("jobs", name))
                for seen in self._jobs.WatchJob(request, timeout=attempts.left()):
                    attempts.answered()
                    last = seen
                    if on_change is not None:
                        on_change(seen)
                    if job_ended(seen):
                        return seen
            except (grpc.RpcError, DeadlineExceeded) as error:
                failure = translate(error, self.endpoint) if isinstance(error, grpc.RpcError) else error
                if isinstance(failure, DeadlineExceeded):
                    raise DeadlineExceeded(
                        f"The job {short(name)} has not ended after {timeout:g} s: {describe_job(last)}"
                    ) from error
                pause = attempts.pause_after(failure)
            io.sleep(pause)

    def wait_for_job(
        self, name: str, *, timeout: float = 86400.0, on_change: JobCallback | None = None
    ) -> job_pb2.Job:
        """Wait until a job has SUCCEEDED; return it.

        Args:
            name: Name of the job.
            timeout: Seconds to wait.
            on_change: Told of the job at once and at every change.

        Raises:
            FailedPrecondition: It failed or was cancelled; the words say why.
            DeadlineExceeded: It has not ended yet; the words say where it stands.
            NotFound: There is no such job.
            Unavailable: Nothing has answered for ten minutes; what restarts is waited for.
        """
        job = self.watch_job(name, timeout=timeout, on_change=on_change)
        if job.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise FailedPrecondition(
                f"The job {short(name)} is {describe_job(job)}",
                reason=Reason.WRONG_STATE,
                metadata={"job": short(name), "failure_reason": job.failure_reason},
            )
        return job

    def list_job_events(
        self,
        name: str,
        *,
        kinds: Sequence[service.JobEventKind.ValueType] = (),
        after: int = 0,
        limit: int | None = None,
    ) -> list[job_pb2.JobEvent]:
        """Return what happened in a job, in its order.

        Args:
            name: Name of the job.
            kinds: Only these kinds of events.
            after: Only events after this sequence.
            limit: At most this many.

        Raises:
            NotFound: There is no such job.
        """
        found: list[job_pb2.JobEvent] = []
        while limit is None or len(found) < limit:
            request = service.ListJobEventsRequest(
                parent=resource("jobs", name), kinds=kinds, after=found[-1].sequence if found else after
            )
            if limit is not None:
                request.page_size = min(1000, limit - len(found))
            page = self._unary(self._jobs.ListJobEvents, request)
            found.extend(page.events)
            if not page.more or not page.events:
                break
        return found

    def watch_job_events(
        self,
        name: str,
        on_event: EventCallback,
        *,
        kinds: Sequence[service.JobEventKind.ValueType] = (),
        after: int = 0,
        timeout: float = 86400.0,
    ) -> int:
        """Tell of each event of a job, once, until the job has ended and all are told.

        Args:
            name: Name of the job.
            on_event: Told of each event.
            kinds: Only these kinds of events.
            after: Only events after this sequence.
            timeout: Seconds to watch.

        Returns:
            The sequence of the last event, `after` if there was none.

        Raises:
            DeadlineExceeded: The job has not ended yet.
            NotFound: There is no such job.
            Unavailable: Nothing has answered for ten minutes; what restarts is waited for.
        """
        attempts = Attempts(timeout, OUTAGE_SECONDS)
        while True:
            request = service.WatchJobEventsRequest(name=resource("jobs", name), kinds=kinds, after=after)
            began = time.monotonic()
            try:
                for event in self._jobs.WatchJobEvents(request, timeout=attempts.left()):
                    attempts.answered()
                    after = event.sequence
                    on_event(event)
            except grpc.RpcError as error:
                if time.monotonic() - began > _HELD_SECONDS:
                    attempts.answered()  # nothing happened in the job, but somebody was there
                pause = attempts.pause_after(translate(error, self.endpoint))
            else:
                return after
            io.sleep(pause)
