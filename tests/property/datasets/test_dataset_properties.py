"""Whatever lies in a file, it is read or refused; however rows are split, each is used once."""

import io
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from penstock.datasets import FORMATS, describe, read
from penstock.errors import PenstockError
from penstock_worker.domain.sampling import epoch_order, rank_batches, split

NAMES = {"npz": "d.npz", "csv": "d.csv", "parquet": "d.parquet", "images": "a/d.png", "text": "d.jsonl"}


def _valid() -> dict[str, bytes]:
    npz, png = io.BytesIO(), io.BytesIO()
    np.savez(npz, x=np.arange(12.0).reshape(6, 2), y=np.arange(6) % 2)
    Image.new("RGB", (4, 4)).save(png, "PNG")
    return {
        "npz": npz.getvalue(),
        "csv": b"a,b,label\n1,2,x\n3,4,y\n5,6,x\n",
        "parquet": b"PAR1",
        "images": png.getvalue(),
        "text": b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
    }


VALID = _valid()


@settings(max_examples=150)
@given(st.sampled_from(FORMATS), st.data())
def test_any_file_is_read_or_refused_with_words(name: str, data: st.DataObject) -> None:
    content = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(0, 4))):
        where = data.draw(st.integers(0, len(content)))
        some = data.draw(st.sampled_from([b"", b"\x00", b",", b"nan", b"\n", b"\xff", b'"', b"1e999", b"{}"]))
        content[where : where + data.draw(st.integers(0, 3))] = some
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAMES[name])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(content))
        if name == "images":
            Path(folder, "b").mkdir()
            Path(folder, "b/e.png").write_bytes(VALID["images"])
        try:
            found = read(Path(folder), name)
        except PenstockError:
            return
    assert found.rows >= 2
    assert all(np.isfinite(array).all() and len(array) == found.rows for array in found.inputs.values())
    assert found.targets is None or len(found.targets) == found.rows
    assert describe(found)["rows"] == found.rows


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.floats(0, 0.99),
    st.integers(-(2**63), 2**63 - 1),
)
def test_every_row_is_learnt_from_or_held_out(labels: list[int], held_out: float, seed: int) -> None:
    classes = np.array(labels)
    train, held = split(len(labels), held_out, seed, classes)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(labels)))
    for one in set(labels):
        rows = int((classes == one).sum())
        kept = int((classes[held] == one).sum())
        assert abs(kept - rows * held_out) <= 1 or rows == 1
        assert kept < rows


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 9), st.integers(0, 50), st.integers(0, 2**63))
def test_ranks_share_each_step_without_overlap(
    rows: int, batch: int, world: int, epoch: int, seed: int
) -> None:
    order = epoch_order(rows, epoch, seed)
    assert sorted(order.tolist()) == list(range(rows))
    ranks = [list(rank_batches(order, batch, rank, world)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    assert (
        np.concatenate([part for step in zip(*ranks, strict=True) for part in step]).tolist()
        == order.tolist()
    )
