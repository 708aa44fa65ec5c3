"""What checkpoints are called in the registry is a name there, however long that of the job is."""

from __future__ import annotations

import pytest

from penstock_kit.jobs.checkpoints import checkpoint_artifact
from penstock_kit.names import parse_artifact


@pytest.mark.parametrize("part", [0, 1, 9999])
@pytest.mark.parametrize("length", [1, 42, 43, 48, 49, 63])
def test_a_job_of_any_name_can_send_its_checkpoints_and_no_other_has_the_same_name_for_its_own(
    length: int, part: int
) -> None:
    names = {checkpoint_artifact("j" * (length - 1) + last, part) for last in "ab"}
    assert len(names) == 2
    for name in names:
        parse_artifact(name)


def test_a_name_that_fits_is_that_of_the_job() -> None:
    assert checkpoint_artifact("fit", 0) == "artifacts/job-fit-checkpoint"
    assert checkpoint_artifact("f" * 48, 0) == f"artifacts/job-{'f' * 48}-checkpoint"
    assert checkpoint_artifact("fit", 3) == "artifacts/job-fit-checkpoint-3"
