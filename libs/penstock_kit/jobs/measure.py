"""What PROFILE and EVALUATE jobs may ask for. Pure: no torch."""

from __future__ import annotations

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.jobs.fields import check_range, choose, invalid

METRICS = ("accuracy", "f1", "loss", "mse", "mae", "r2", "perplexity")
DEFAULT_PROFILE_SECONDS = 2.0
MAX_PROFILE_SECONDS = 600.0
MAX_BATCH_SIZES = 32
MAX_BATCH_SIZE = 65_536


def check_profile(work: job_work_pb2.ProfileWork) -> None:
    """Refuse a profile that no worker could measure.

    Raises:
        InvalidArgument: The words name what is wrong.
    """
    if not work.version:
        raise invalid("profile.version is required: the version to measure.", "job.profile.version")
    sizes = list(work.batch_sizes)
    if len(sizes) > MAX_BATCH_SIZES or any(not 1 <= size <= MAX_BATCH_SIZE for size in sizes):
        raise invalid(
            f"profile.batch_sizes are at most {MAX_BATCH_SIZES} numbers of rows, 1 to {MAX_BATCH_SIZE} each.",
            "job.profile.batch_sizes",
        )
    seconds = work.duration.seconds + work.duration.nanos * 1e-9
    check_range("profile.duration (s)", seconds, "job.profile.duration", low=0.0, high=MAX_PROFILE_SECONDS)


def check_evaluate(work: job_work_pb2.EvaluateWork) -> None:
    """Refuse an evaluation that no worker could make.

    Raises:
        InvalidArgument: The words name what is wrong and the nearest valid name.
    """
    if not work.version:
        raise invalid("evaluate.version is required: the version to measure.", "job.evaluate.version")
    if not work.dataset:
        raise invalid("evaluate.dataset is required: rows with their answers.", "job.evaluate.dataset")
    for name in work.metrics:
        choose("metric", name, METRICS, "job.evaluate.metrics")
    if not 0 <= work.held_out < 1:
        raise invalid(
            f"evaluate.held_out is {work.held_out:g}; it is a part of the rows, from 0 to less than 1.",
            "job.evaluate.held_out",
        )
