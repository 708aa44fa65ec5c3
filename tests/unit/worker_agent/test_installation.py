"""What tells two workers of one name apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock_kit.errors import FailedPrecondition
from penstock_worker.adapters.installation import installation


def boot(root: Path, text: str) -> Path:
    path = root / "proc/sys/kernel/random/boot_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


def test_an_installation_stays_what_it_is_over_restarts_and_differs_from_others(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = installation(tmp_path / "a")
    assert installation(tmp_path / "a") == first
    assert installation(tmp_path / "b") != first


def test_a_copy_of_a_disk_on_another_machine_is_another_installation(tmp_path: Path) -> None:
    here = installation(tmp_path, boot(tmp_path / "here", "11111111-2222"))
    there = installation(tmp_path, boot(tmp_path / "there", "33333333-4444"))
    assert here != there
    assert here.split("-")[0] == there.split("-")[0]


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "worker.id").write_text("not an id\n")
    assert "not an id" not in installation(tmp_path)
    assert installation(tmp_path) == installation(tmp_path)


def test_a_directory_that_cannot_be_used_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="PENSTOCK_DATA_DIR"):
        installation(tmp_path / "missing")
