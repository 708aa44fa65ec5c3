"""Datasets as jobs see them: split by the seed alone, the same on every rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.datasets import describe, read
from penstock.registry.v1 import artifact_pb2
from penstock_worker.adapters.data import OpenedDataset, open_dataset
from penstock_worker.domain.sampling import epoch_order, rank_batches, split
from penstock_worker.usecases.job_context import FetchedDataset, JobFailure


def fetched(path: Path, described: bool = True, fmt: str = "npz", **arrays: Any) -> FetchedDataset:
    """A dataset as a job's context gives it."""
    if arrays:
        np.savez(path / "data.npz", **arrays)
    artifact = artifact_pb2.Artifact(name="artifacts/toy/versions/2", format=fmt)
    if described:
        artifact.description.update(describe(read(path)))
    return FetchedDataset(path, artifact)


def toy(path: Path, **options: Any) -> OpenedDataset:
    x = np.arange(200.0).reshape(100, 2)
    y = np.array(["a"] * 80 + ["b"] * 20)
    return open_dataset(fetched(path, x=x, y=y), **options)


def test_rows_come_as_tensors_and_belong_to_their_targets(tmp_path: Path) -> None:
    data = toy(tmp_path)
    assert (data.task, data.classes, data.target_dtype) == ("tabular", ("a", "b"), torch.int64)
    (spec,) = data.input_specs
    assert (spec.name, spec.shape, spec.dtype) == ("x", (2,), torch.float32)
    for part in (data.train, data.held_out):
        batch = part.batch(torch.tensor([3, 0, 3]))
        assert batch.inputs["x"].dtype == torch.float32
        assert batch.inputs["x"][0].equal(batch.inputs["x"][2])
        for row, target in zip(batch.inputs["x"], batch.targets, strict=True):
            assert int(target) == (row[0] >= 160)
        assert part.targets.equal(part.all().targets)
    with pytest.raises(IndexError):
        data.held_out.batch([len(data.held_out)])


def test_every_class_is_held_out_in_its_share_and_the_seed_decides(tmp_path: Path) -> None:
    data = toy(tmp_path, held_out=0.25, seed=3)
    assert torch.bincount(data.held_out.targets).tolist() == [20, 5]
    rows = {*data.train.rows.tolist(), *data.held_out.rows.tolist()}
    assert len(data.train) + len(data.held_out) == len(rows) == 100
    assert toy(tmp_path, held_out=0.25, seed=3).held_out.rows.equal(data.held_out.rows)
    assert not toy(tmp_path, held_out=0.25, seed=4).held_out.rows.equal(data.held_out.rows)
    assert len(toy(tmp_path, held_out=0).held_out) == 0


def test_the_split_is_the_one_it_always_was() -> None:
    # What was held out of a version's training must be found again by any later release.
    assert split(12, 0.25, 7)[1].tolist() == [1, 5, 9]
    assert epoch_order(8, 2, 7).tolist() == [4, 3, 0, 7, 5, 2, 6, 1]


def test_a_step_is_on_the_same_rows_whatever_the_number_of_ranks() -> None:
    order = epoch_order(103, 5, 1)
    assert sorted(order.tolist()) == list(range(103))
    alone = list(rank_batches(order, 16, 0, 1))
    for world in (2, 3, 4):
        ranks = [list(rank_batches(order, 16, rank, world)) for rank in range(world)]
        for step, rows in enumerate(alone):
            assert np.concatenate([batches[step] for batches in ranks]).tolist() == rows.tolist()
            assert max(len(batches[step]) for batches in ranks) - min(len(b[step]) for b in ranks) <= 1
    resumed = [rows.tolist() for rows in rank_batches(order, 16, 0, 1, first_step=4)]
    assert resumed == [rows.tolist() for rows in alone[4:]]
    assert epoch_order(103, 6, 1).tolist() != order.tolist()


def test_rare_classes_are_on_both_sides_and_single_rows_are_learnt_from() -> None:
    train, held = split(13, 0.1, 0, np.array([0] * 10 + [1] * 2 + [2]))
    assert {10, 11} & set(held.tolist())
    assert {10, 11} & set(train.tolist())
    assert 12 in train


def test_images_of_bytes_come_as_numbers_up_to_255(tmp_path: Path) -> None:
    x = np.full((10, 4, 4, 3), 255, np.uint8)
    data = open_dataset(fetched(tmp_path, x=x, y=np.arange(10) % 2))
    assert data.task == "image"
    assert data.input_specs[0].shape == (3, 4, 4)
    assert data.train.batch([0]).inputs["x"].max() == 255.0


def test_texts_come_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "t{n}", "label": "{n % 2}"}}\n' for n in range(20)))
    data = open_dataset(fetched(tmp_path, fmt="text"))
    batch = data.train.batch([2, 1])
    assert (data.task, batch.inputs, len(batch.texts)) == ("text", {}, 2)
    assert [int(text[1:]) % 2 for text in batch.texts] == batch.targets.tolist()
    model = open_dataset(fetched(tmp_path, fmt="text"), task="language_model")
    assert model.task == "language_model"


def test_columns_and_label_may_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,label\n" + "".join(f"{n},{n * 2},{n % 2}\n" for n in range(20)))
    data = open_dataset(fetched(tmp_path, fmt="csv"), label="b", features=["a"])
    assert (data.label, data.feature_names, data.target_dtype) == ("b", ("a",), torch.float32)
    assert data.input_specs[0].shape == (1,)


def test_classes_are_those_of_the_description_also_where_rows_are_fewer(tmp_path: Path) -> None:
    found = fetched(tmp_path, x=np.zeros((6, 1)), y=np.array(["b", "c"] * 3))
    found.artifact.description.update({"classes": ["a", "b", "c"]})
    data = open_dataset(found)
    assert data.classes == ("a", "b", "c")
    assert set(data.train.targets.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"x": np.full((4, 1), np.nan), "y": np.arange(4) % 2}, {}, "'toy:2' cannot be used: x: row 0"),
        ({"x": np.zeros((4, 1))}, {}, "has no label"),
        ({"x": np.zeros((2, 1)), "y": np.array(["a", "b"])}, {}, "too few rows"),
        ({"x": np.zeros((4, 1)), "y": np.zeros(4, int)}, {}, "in every row"),
        ({"x": np.zeros((4, 1)), "y": np.arange(4) % 2}, {"label": "z"}, "no array 'z'"),
    ],
)
def test_what_cannot_be_learnt_from_fails_the_job_for_good(
    tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobFailure, match=words) as failure:
        open_dataset(fetched(tmp_path, described=False, **arrays), **options)
    assert (failure.value.cause, failure.value.permanent) == ("INVALID_DATA", True)


def test_a_split_that_is_no_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFailure, match="held_out is 1") as failure:
        toy(tmp_path, held_out=1.0)
    assert failure.value.cause == "INVALID_RECIPE"
