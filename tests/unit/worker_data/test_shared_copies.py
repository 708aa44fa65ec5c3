"""What the ranks of a node make once and all use."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from penstock.datasets import write_example
from penstock.registry.v1 import artifact_pb2
from penstock_worker.adapters.data import Shared, mapped, open_dataset
from penstock_worker.usecases.job_context import FetchedDataset, JobFailure


def test_the_first_to_come_writes_and_all_others_read(tmp_path: Path) -> None:
    written, found = [], []

    def write(directory: Path) -> None:
        written.append(threading.get_ident())
        (directory / "f").write_bytes(b"\1\0\0\0" * 1000)

    def rank() -> None:
        found.append(Shared(tmp_path).once("numbers", write) / "f")

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(20)
    assert len(written) == 1
    assert {path.stat().st_size for path in found} == {4000}
    assert mapped(found[0], np.int32, (10, 100)).sum() == 1000


def test_a_writer_that_is_killed_or_fails_leaves_the_work_to_the_next(tmp_path: Path) -> None:
    shared = Shared(tmp_path)

    def killed(directory: Path) -> None:
        (directory / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        shared.once("numbers", killed)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL

    def failing(directory: Path) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        shared.once("numbers", failing)
    made = shared.once("numbers", lambda directory: (directory / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]


def test_what_an_earlier_start_of_the_machine_left_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot"
    monkeypatch.setattr("penstock_worker.adapters.data.once._BOOT", boot)
    for name in ("first", "second"):
        boot.write_text(name)
        made = Shared(tmp_path / "d").once(
            "n", lambda directory: (directory / "f").write_text(boot.read_text())
        )
        assert (made / "f").read_text() == name


def toy(path: Path) -> FetchedDataset:
    (path / "data").mkdir()
    np.savez(path / "data" / "d.npz", x=np.arange(40.0).reshape(20, 2), y=np.arange(20) % 2)
    return FetchedDataset(path / "data", artifact_pb2.Artifact(format="npz"), path / "decoded")


def test_a_dataset_is_decoded_once_for_the_ranks_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = toy(tmp_path)
    first = open_dataset(fetched, seed=1)
    monkeypatch.delattr("penstock_worker.adapters.data.dataset.read")
    second = open_dataset(fetched, seed=1)
    assert second.train.all().inputs["x"].equal(first.train.all().inputs["x"])
    other = open_dataset(fetched, seed=2)
    assert (second.key, other.key != first.key) == (first.key, True)
    with pytest.raises(NameError):
        open_dataset(fetched, features=["x"])


def test_what_is_held_out_of_a_dataset_is_what_always_was(tmp_path: Path) -> None:
    write_example("sklearn:digits", tmp_path)
    data = open_dataset(FetchedDataset(tmp_path, artifact_pb2.Artifact(format="npz")))
    held_out = data.held_out.rows
    assert (len(data.train), held_out[:6].tolist(), int(held_out.sum())) == (
        1438,
        [0, 6, 12, 20, 33, 35],
        322_003,
    )
    assert float(data.held_out.all().inputs["x"].double().sum()) == 112_896


def test_a_disk_without_room_for_the_copy_is_no_fault_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - closed by what writes to it
    monkeypatch.setattr("penstock.datasets.flat.tempfile.NamedTemporaryFile", lambda **_: full)
    with full, pytest.raises(JobFailure, match="No space left") as failure:
        open_dataset(toy(tmp_path))
    assert (failure.value.cause, failure.value.permanent) == ("OUT_OF_DISK", False)
