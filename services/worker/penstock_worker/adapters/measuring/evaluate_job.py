"""EVALUATE: metrics of a version on rows of a dataset."""

from __future__ import annotations

from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.measuring.opening import check_stop, open_fetched
from penstock_worker.adapters.measuring.quality import measure_quality
from penstock_worker.adapters.measuring.questions import questions_of
from penstock_worker.hotpath.execution import ModelError
from penstock_worker.usecases.job_context import JobContext, JobFailure


def run(context: JobContext) -> None:
    """Evaluate the version of the job; rank 0 does it alone.

    Raises:
        JobFailure: UNSUPPORTED if the version cannot be opened, raises an error or gives no such answers;
            INVALID_DATA if the dataset does not fit it; INVALID_RECIPE for a metric that it cannot have.
    """
    if context.rank:
        return
    work = context.job.evaluate
    context.progress(0, 0, "rows", "loading")
    fetched = context.version(work.version)
    dataset = open_dataset(
        context.dataset(work.dataset),
        label=work.label,
        held_out=work.held_out,
        seed=work.seed,
        scratch=context.scratch,
    )
    part = dataset.held_out if work.held_out else dataset.train

    def progress(done: int, total: int) -> None:
        check_stop(context)
        context.progress(done, total, "rows", "measuring")

    with open_fetched(context, fetched, threads=context.threads) as opened:
        questions = questions_of(opened.signature, dataset, part, directory=fetched.path)
        try:
            found = measure_quality(opened, questions, metrics=list(work.metrics), progress=progress)
        except ModelError as error:
            raise JobFailure(
                f"{fetched.version.name} fails on rows of the dataset: {error.message}", "UNSUPPORTED"
            ) from error
    context.metrics(0, found.metrics)
    if work.record:
        context.record_metrics(work.version, found.metrics)
    context.report(
        {
            "kind": "evaluation",
            "metrics": found.metrics,
            "margins": found.margins,
            "rows": found.rows,
            "part": "held out" if work.held_out else "all",
        }
    )
