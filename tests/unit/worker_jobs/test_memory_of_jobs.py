"""What counts as a job's own memory: not the rows of datasets that it has mapped."""

import os
from pathlib import Path

import numpy as np

from penstock_worker.adapters.jobs.limits import mapped_of, memory_of_all

SIZE = 32 << 20
NEAR = 4 << 20


def test_rows_that_are_mapped_are_no_memory_of_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "a job" / "0"
    folder.mkdir(parents=True)
    np.ones(SIZE, np.uint8).tofile(folder / "rows")
    pid = os.getpid()
    before = memory_of_all([pid])
    rows = np.memmap(folder / "rows", np.uint8, "r")
    assert rows.sum() == SIZE
    assert memory_of_all([pid]) - before > SIZE - NEAR
    assert abs(memory_of_all([pid], tmp_path) - before) < NEAR
    assert mapped_of(pid, tmp_path / "elsewhere") == mapped_of(0, tmp_path) == 0


def test_what_is_written_to_a_mapping_of_ones_own_counts(tmp_path: Path) -> None:
    np.ones(SIZE, np.uint8).tofile(tmp_path / "rows")
    rows = np.memmap(tmp_path / "rows", np.uint8, "c")
    rows[: SIZE // 2] = 2
    assert rows.sum() == SIZE * 3 // 2
    assert abs(mapped_of(os.getpid(), tmp_path) - SIZE // 2) < NEAR
