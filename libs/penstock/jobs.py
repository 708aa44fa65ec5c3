"""Words of jobs."""

from __future__ import annotations

import uuid

from penstock.scheduler.v1 import job_pb2

_ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


def job_ended(job: job_pb2.Job) -> bool:
    """Whether nothing more happens to a job."""
    return job.state in _ENDED


def job_state(job: job_pb2.Job) -> str:
    """Return the state in one word: RUNNING."""
    return job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")


def job_kind(job: job_pb2.Job) -> str:
    """Return what is done, in one word: train, convert, compress, profile, evaluate, batch_predict."""
    return job.WhichOneof("work") or "nothing"


def describe_job(job: job_pb2.Job | None) -> str:
    """Return where a job stands, in words."""
    if job is None:
        return "nothing was heard of it"
    return f"{job_state(job)}. {job.message}".strip()


def versions_of(job: job_pb2.Job) -> list[str]:
    """Return the versions that a job made, as models/{model}/versions/{version}."""
    return [name for name in job.results if name.startswith("models/")]


def new_job_name(job: job_pb2.Job) -> str:
    """Return a name that no other job has: train-3f9a1c."""
    return f"{job_kind(job).replace('_', '-')}-{uuid.uuid4().hex[:8]}"
