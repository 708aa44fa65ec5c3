"""Datasets in files that several processes map: the same rows, and never all of them in memory."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from penstock.datasets import Contents, ReadOptions, laid_out, read
from penstock.errors import InvalidArgument, ResourceExhausted

RANDOM = np.random.default_rng(0)


def npz(path: Path) -> None:
    by_columns = np.asfortranarray(RANDOM.normal(size=(50, 7)))
    np.savez(path / "d.npz", x=by_columns, z=np.arange(50), y=np.array(["a", "b"] * 25))


def compressed(path: Path) -> None:
    np.savez_compressed(
        path / "d.npz", x=RANDOM.integers(0, 255, (20, 6, 6, 3), np.uint8), y=np.arange(20) % 2
    )


def csv(path: Path) -> None:
    (path / "d.csv").write_text("a,b,label\n" + "".join(f"{n},{n / 7},{n / 3}\n" for n in range(30)))


def parquet(path: Path) -> None:
    lists = [[float(n), 1.0] for n in range(30)]
    pq.write_table(pa.table({"a": range(30), "v": lists, "label": ["x", "y"] * 15}), path / "d.parquet")


def text_column(path: Path) -> None:
    pq.write_table(
        pa.table({"text": [f"ä {n}" for n in range(9)], "label": ["x", "y", "z"] * 3}), path / "d.pq"
    )


def images(path: Path) -> None:
    for row in range(8):
        (path / f"{row % 2}").mkdir(exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 255, (5, 4, 3), np.uint8)).save(path / f"{row % 2}" / f"{row}.png")


def lines(path: Path) -> None:
    texts = (json.dumps({"text": f"text {n} ☃", "label": n % 3}) for n in range(12))
    (path / "d.jsonl").write_text("\n".join(texts))


def folders(path: Path) -> None:
    for row in range(6):
        (path / f"{row % 2}").mkdir(exist_ok=True)
        (path / f"{row % 2}" / f"{row}.txt").write_text("é" * (row + 1))


def plain(path: Path) -> None:
    (path / "d.txt").write_text("\n\n".join(f"Chapter {n}: " + "word " * 40 for n in range(40)))


MAKERS = [npz, compressed, csv, parquet, text_column, images, lines, folders, plain]


def facts(contents: Contents) -> Any:
    return (contents.task, contents.rows, contents.classes, contents.label, contents.columns, contents.notes)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_laid_out_is_what_was_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    data, directory, moved = tmp_path / "data", tmp_path / "partial", tmp_path / "whole"
    data.mkdir()
    directory.mkdir()
    make(data)
    within = read(data)
    laid_out.save(read(data, options=ReadOptions(layout=directory)), directory)
    directory.rename(moved)
    found = laid_out.load(moved)
    assert facts(found) == facts(within)
    assert list(found.inputs) == list(within.inputs)
    for name, array in within.inputs.items():
        assert isinstance(found.inputs[name], np.memmap)
        assert found.inputs[name].dtype == array.dtype
        assert np.array_equal(found.inputs[name], array)
    if within.targets is not None:
        assert found.targets is not None
        assert (found.targets.dtype, found.targets.tolist()) == (
            within.targets.dtype,
            within.targets.tolist(),
        )
    if within.texts is not None:
        assert found.texts is not None
        assert list(found.texts) == list(within.texts)
        assert found.texts[2:5] == list(within.texts)[2:5]


@contextmanager
def most_memory() -> Iterator[list[int]]:
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_archive_is_read_a_few_megabytes_at_a_time(tmp_path: Path, order: Any) -> None:
    size = 64 << 20
    x = np.ones((4096, size // 4096 // 4), np.float32, order=order)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(4096) % 2)
    layout = tmp_path / "layout"
    layout.mkdir()
    with most_memory() as most:
        laid_out.save(read(tmp_path / "d.npz", options=ReadOptions(layout=layout)), layout)
    assert most[0] < size / 3
    assert sum(file.stat().st_size for file in layout.iterdir()) < size * 1.01


def test_an_archive_that_would_fill_the_disk_with_zeros_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.datasets.arrays.MAX_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((4, 2**20)), y=np.arange(4) % 2)
    with pytest.raises(InvalidArgument, match="again and again"):
        read(tmp_path / "d.npz")


def test_a_disk_without_room_is_said_with_its_numbers(tmp_path: Path) -> None:
    full = Path("/dev/full")
    contents = Contents(task="tabular", rows=2, inputs={"x": np.zeros((2, 250_000), np.float32)})
    (tmp_path / "input.0").symlink_to(full)
    with pytest.raises(ResourceExhausted, match=r"No space left.* 2\.0 MB more were needed.* free") as error:
        laid_out.save(contents, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_archive_is_not_to_blame_for_a_disk_that_takes_no_file(tmp_path: Path) -> None:
    npz(tmp_path)
    with pytest.raises(ResourceExhausted, match=r"in .*gone"):
        read(tmp_path / "d.npz", "", ReadOptions(scratch=tmp_path / "gone"))
