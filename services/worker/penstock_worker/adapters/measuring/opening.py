"""What a job names, opened: its version, and the rows that it is asked."""

from __future__ import annotations

import numpy as np

from penstock_kit.oip import Array
from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.measuring.loading import OpenedVersion, open_version
from penstock_worker.adapters.measuring.questions import Questions, questions_of
from penstock_worker.adapters.measuring.rows import DRAWN_LENGTH, drawn_inputs
from penstock_worker.usecases.job_context import FetchedVersion, JobContext, Stopped

OTHER_LENGTH = 12


def open_fetched(context: JobContext, fetched: FetchedVersion, *, threads: int = 0) -> OpenedVersion:
    """Open a version that the job fetched, with what the operator allows.

    Args:
        context: Of the job.
        fetched: The version.
        threads: Of one call; 0 leaves it to the manifest, as replicas do.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be opened.
    """
    return open_version(
        fetched.path,
        fetched.version.manifest,
        name=fetched.version.name,
        devices=context.devices,
        threads=threads,
        allow_python_runtime=context.allow_python_runtime,
        allow_compiled_models=context.allow_compiled_models,
    )


class Inputs:
    """Inputs of a version in any number: rows of a dataset over and over, or drawn from the signature.

    Args:
        context: Of the job.
        opened: The version.
        dataset: Name of the dataset; empty for none.
        most_bytes: A larger dataset is refused; 0 for any size.

    Raises:
        JobFailure: INVALID_DATA: the dataset does not fit the version.
    """

    def __init__(
        self, context: JobContext, opened: OpenedVersion, dataset: str, *, most_bytes: int = 0
    ) -> None:
        self._signature = opened.signature
        self._questions: Questions | None = None
        if dataset:
            fetched = context.dataset(dataset, most_bytes=most_bytes)
            data = open_dataset(fetched, held_out=0.0, require_label=False, scratch=context.scratch)
            self._questions = questions_of(opened.signature, data, data.train, directory=opened.directory)

    @property
    def rows(self) -> int:
        """How many different rows there are; 0 if as many as one likes."""
        return len(self._questions) if self._questions is not None else 0

    def __call__(self, rows: int, start: int = 0) -> dict[str, Array]:
        """Return so many rows, from row `start` of the dataset on."""
        if self._questions is None:
            # The first row has another size than the others where any will do: one that was taken for a
            # constant shows.
            length = DRAWN_LENGTH if start == 0 else OTHER_LENGTH
            return drawn_inputs(self._signature, rows, seed=start, length=length)
        indices = (np.arange(rows, dtype=np.int64) + start) % len(self._questions)
        return self._questions.batch(indices)[0]


def check_stop(context: JobContext) -> None:
    """End the work if it shall stop.

    Raises:
        Stopped: It shall.
    """
    if context.should_stop():
        raise Stopped("It was stopped before it was done.")
