"""What jobs may ask for, checked without running anything: pure, no torch.

`check` is what the scheduler asks before it stores a job. Each kind has a module with a `check(work)`, whose
tables of names and parameters are also what the work itself is read with, so that both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.batch_predict import check as check_batch_predict
from penstock_kit.jobs.compress import check as check_compress
from penstock_kit.jobs.convert import check as check_convert
from penstock_kit.jobs.measure import check_evaluate, check_profile
from penstock_kit.jobs.ranks import check_ranks
from penstock_kit.jobs.train import check as check_train

_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "train": check_train,
    "compress": check_compress,
    "convert": check_convert,
    "evaluate": check_evaluate,
    "profile": check_profile,
    "batch_predict": check_batch_predict,
}


def check(job: job_pb2.Job) -> None:
    """Refuse what no worker could do.

    Args:
        job: As its maker wrote it; only `work` is looked at, and for trainings the ranks and GPUs.

    Raises:
        InvalidArgument: There is no work in it, or a name, value or combination is wrong. The words name the
            nearest valid one; `metadata["field"]` is the path of the field.
    """
    kind = job.WhichOneof("work")
    if kind is None:
        raise InvalidArgument(
            "The job says nothing to do: set one of train, convert, compress, profile, evaluate and "
            "batch_predict.",
            metadata={"field": "job.work"},
        )
    _CHECKS[kind](getattr(job, kind))
    if kind == "train" and job.train.WhichOneof("way") == "recipe":
        check_ranks(job)
