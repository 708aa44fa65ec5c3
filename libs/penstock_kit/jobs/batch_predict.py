"""What a batch prediction may ask for."""

from __future__ import annotations

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.jobs.fields import check_range, invalid
from penstock_kit.names import parse_artifact, parse_deployment

# At most; see the job.
DEFAULT_REQUEST_ROWS = 64
DEFAULT_CONCURRENCY = 8
DEFAULT_CHUNK_ROWS = 4096
MAX_REQUEST_ROWS = 65_536
MAX_CONCURRENCY = 256
MAX_CHUNK_ROWS = 10_000_000
MAX_INPUTS = 256


def check(work: job_work_pb2.BatchPredictWork) -> None:
    """Refuse a prediction that no worker could make.

    Raises:
        InvalidArgument: The words name what is wrong.
    """
    if not work.deployment:
        raise invalid("batch_predict.deployment is required: who answers.", "job.batch_predict.deployment")
    parse_deployment(work.deployment)
    if not work.dataset:
        raise invalid("batch_predict.dataset is required: the rows to answer.", "job.batch_predict.dataset")
    if not work.artifact:
        raise invalid(
            "batch_predict.artifact is required: artifacts/{artifact} that gets the answers.",
            "job.batch_predict.artifact",
        )
    parse_artifact(work.artifact)
    for name, most in (
        ("request_rows", MAX_REQUEST_ROWS),
        ("concurrency", MAX_CONCURRENCY),
        ("chunk_rows", MAX_CHUNK_ROWS),
    ):
        check_range(
            f"batch_predict.{name}", getattr(work, name), f"job.batch_predict.{name}", low=0, high=most
        )
    if len(work.inputs) > MAX_INPUTS or not all(work.inputs.values()):
        raise invalid(
            f"batch_predict.inputs names the column of at most {MAX_INPUTS} inputs, none empty.",
            "job.batch_predict.inputs",
        )
