"""The digest of the code is another one whenever results may be."""

from __future__ import annotations

from pathlib import Path

import pytest

import penstock.datasets
import penstock_kit.jobs
import penstock_worker
from penstock_worker.adapters.jobs.lineage import code_digest

MODULES = (
    Path(penstock_worker.__file__).with_name("adapters") / "training" / "loop.py",
    Path(penstock_kit.jobs.__file__).with_name("train.py"),
    Path(penstock.datasets.__file__).with_name("tables.py"),
)


@pytest.mark.parametrize("changed", MODULES, ids=lambda path: path.stem)
def test_a_change_of_what_does_the_work_changes_the_digest_of_the_code(
    changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = code_digest.__wrapped__(), Path.read_bytes
    assert code_digest.__wrapped__() == before
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == changed))
    assert code_digest.__wrapped__() != before
