"""A fetched dataset, opened for learning and measuring."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from google.protobuf import json_format
from numpy.typing import DTypeLike, NDArray

from penstock.datasets import Contents, ReadOptions, laid_out, read
from penstock_kit.errors import PenstockError, ResourceExhausted
from penstock_worker.adapters.data.once import Shared
from penstock_worker.domain.sampling import split
from penstock_worker.usecases.job_context import FetchedDataset, JobFailure


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model that learns from the dataset.

    Attributes:
        name: Such as "x".
        dtype: Always float32: bytes of images come as 0 to 255.
        shape: Of one row, without the batch axis.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows.

    Attributes:
        inputs: Name → float32 [n, …]; empty for texts.
        targets: int64 [n] (classes) or float32 [n] (numbers); of length 0 if the dataset has no label, as
            those for language models.
        texts: The n texts, for the tasks text and language_model; else empty.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    texts: tuple[str, ...] = ()


class Part:
    """Some of the rows of a dataset, counted from 0. They are read when they are asked for.

    Attributes:
        rows: int64 [len], their numbers in the dataset.
    """

    def __init__(self, data: _Tensors, rows: NDArray[np.int64]) -> None:
        self.rows = torch.from_numpy(rows)
        self._data = data

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: torch.Tensor | NDArray[Any] | Sequence[int]) -> Batch:
        """Return rows of this part.

        Args:
            indices: int64 [n], 0 ≤ index < len; in any order, also repeated.

        Raises:
            IndexError: One is out of range.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self._data.batch(self.rows[chosen])

    def all(self) -> Batch:
        """Return all rows in one batch, in memory of this process's own."""
        return self._data.batch(self.rows)

    @property
    def texts(self) -> Sequence[str]:
        """All texts, each read when it is asked for; empty if the rows are none."""
        return _PartTexts(self._data.texts, self.rows)

    @property
    def targets(self) -> torch.Tensor:
        """All targets, without the inputs."""
        return self._data.targets[self.rows] if len(self._data.targets) else self._data.targets


class _PartTexts(Sequence[str]):
    def __init__(self, texts: Sequence[str] | None, rows: torch.Tensor) -> None:
        self._texts, self._rows = texts or (), rows if texts is not None else rows[:0]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._texts[row] for row in self._rows[place].tolist()]
        return self._texts[int(self._rows[place])]


class _Tensors:
    """The contents as tensors over the same memory, which is nobody's to write to."""

    def __init__(self, contents: Contents) -> None:
        self._inputs = {name: _tensor(array) for name, array in contents.inputs.items()}
        self.texts = contents.texts
        self.targets = (
            torch.zeros(0, dtype=torch.int64) if contents.targets is None else _tensor(contents.targets)
        )

    def batch(self, rows: torch.Tensor) -> Batch:
        return Batch(
            inputs={name: tensor.index_select(0, rows).float() for name, tensor in self._inputs.items()},
            targets=self.targets[rows] if len(self.targets) else self.targets,
            texts=() if self.texts is None else tuple(self.texts[row] for row in rows.tolist()),
        )


def mapped(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a file of values without a header as a tensor that is read as it is asked for.

    Args:
        path: The file.
        dtype: Of the values.
        shape: Of all of them.

    Raises:
        OSError, ValueError: It is not there, or smaller.
    """
    if 0 in shape:
        return torch.from_numpy(np.zeros(shape, dtype))
    return _tensor(np.memmap(path, dtype, "r", shape=shape))


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        # That it must not be written to: it is not, and who would is stopped by the kernel.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


@dataclass(frozen=True, slots=True)
class OpenedDataset:
    """A dataset whose rows are all fit to learn from.

    Attributes:
        task: tabular, image, text or language_model.
        train: Rows to learn from.
        held_out: Rows to measure on; without rows if nothing was to be held out.
        classes: Names of the classes, by index; empty if the label is a number or there is none.
        input_specs: What a batch's inputs are; empty for texts.
        target_dtype: int64 for classes, float32 for numbers, None without a label.
        shared: Where ranks leave what they make of it for one another.
        key: Part of the name of what depends on this dataset and on which rows are held out.
        label: Name of the label.
        feature_names: Names of the columns of a table's input, in order; else empty.
    """

    task: str
    train: Part
    held_out: Part
    classes: tuple[str, ...]
    input_specs: tuple[InputSpec, ...]
    target_dtype: torch.dtype | None
    shared: Shared
    key: str
    label: str = ""
    feature_names: tuple[str, ...] = ()


def open_dataset(
    fetched: FetchedDataset,
    *,
    task: str = "",
    label: str = "",
    features: Sequence[str] = (),
    held_out: float = 0.2,
    seed: int = 0,
    require_label: bool = True,
    scratch: Path | None = None,
) -> OpenedDataset:
    """Read, check and split a dataset.

    It is read and checked once on each node, by the first rank to come, into files that all map into memory
    (`penstock.datasets.laid_out`): a rank reads the rows that it asks for, and they are in memory once.

    The split is a function of the number of rows, their classes, `held_out` and `seed` alone, so it is the
    same on every rank and in every job.

    Args:
        fetched: What the job's context fetched.
        task: tabular, image, text or language_model; empty means what the data are.
        label: Name of the label's column; empty means what the dataset says of itself.
        features: Names of the columns to learn from; empty means those named at the push, else all others.
        held_out: Part of the rows held out, 0 ≤ held_out < 1.
        seed: Of the split.
        require_label: Refuse data without a label, unless they are for a language model.
        scratch: Where the files are if no other rank shares them; None means the usual place of such.

    Raises:
        JobFailure: INVALID_DATA: the data are not fit to learn from; the words name row and column.
            OUT_OF_DISK: there is no room for the files.
    """
    described = json_format.MessageToDict(fetched.artifact.description)
    if not 0 <= held_out < 1:
        raise JobFailure(
            f"held_out is {held_out}; it is a part of the rows, from 0 to less than 1.", "INVALID_RECIPE"
        )
    # What was worked out when it was pushed holds only for the label it was worked out for.
    own_label = str(described.get("label", ""))
    same = not label or label == own_label
    options = ReadOptions(
        task=task,
        label=label or own_label,
        features=tuple(features) or tuple(str(name) for name in described.get("learn_from", ()) if same),
        target=str(described.get("target", "")) if same else "",
        classes=tuple(str(name) for name in described.get("classes", ())) if same else (),
    )
    shared = Shared(fetched.decoded, scratch)
    contents = contents_of(fetched, options, shared)
    if require_label and contents.targets is None and contents.task != "language_model":
        raise JobFailure(
            f"The dataset {_short(fetched)} has no label: say which column it is (`label`), or push it "
            "with one called label or target.",
            "INVALID_DATA",
        )
    stratify = contents.targets if contents.classes else None
    train_rows, held_rows = split(contents.rows, held_out, seed, stratify)
    if held_out > 0 and not len(held_rows):
        raise JobFailure(
            f"The dataset {_short(fetched)} has too few rows of each class to hold out {held_out:g} of them.",
            "INVALID_DATA",
        )
    tensors = _Tensors(contents)
    target_dtype = None if contents.targets is None else tensors.targets.dtype
    return OpenedDataset(
        shared=shared,
        key=_digest(fetched.artifact.format, options, held_out, seed),
        task=contents.task,
        train=Part(tensors, train_rows),
        held_out=Part(tensors, held_rows),
        classes=contents.classes,
        input_specs=tuple(
            InputSpec(name, torch.float32, tuple(array.shape[1:])) for name, array in contents.inputs.items()
        ),
        target_dtype=target_dtype,
        label=contents.label,
        feature_names=tuple(contents.notes.get("features", ())),
    )


def contents_of(fetched: FetchedDataset, options: ReadOptions, shared: Shared) -> Contents:
    """Return what a dataset holds, mapped; it is read and checked if no rank of the node has done so.

    Args:
        fetched: The dataset.
        options: How it is to be read.
        shared: Where the files are.

    Raises:
        JobFailure: INVALID_DATA or OUT_OF_DISK.
    """

    def write(directory: Path) -> None:
        laid = dataclasses.replace(options, layout=directory)
        laid_out.save(read(fetched.path, fetched.artifact.format, laid), directory)

    try:
        return laid_out.load(shared.once(f"contents-{_digest(fetched.artifact.format, options)}", write))
    except JobFailure:
        raise
    except ResourceExhausted as error:
        raise JobFailure(str(error), "OUT_OF_DISK", permanent=False) from error
    except PenstockError as error:
        raise JobFailure(f"The dataset {_short(fetched)} cannot be used: {error}", "INVALID_DATA") from error


def _digest(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _short(fetched: FetchedDataset) -> str:
    name = fetched.artifact.name.removeprefix("artifacts/").replace("/versions/", ":")
    return repr(name or fetched.path.name)
