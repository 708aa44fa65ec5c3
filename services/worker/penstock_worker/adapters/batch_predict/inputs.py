"""What a model is given of a dataset's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets import Contents
from penstock_kit.oip.datatypes import NUMPY, to_raw
from penstock_kit.oip.relay import RawTensor
from penstock_kit.routing.model import Tensor
from penstock_worker.usecases.job_context import JobFailure

Encode = Callable[[Sequence[str]], NDArray[np.int64]]
"""Texts → ids of their tokens, int64 [rows, the longest of them], filled up."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one input of the model comes from.

    Attributes:
        tensor: The input.
        rows: Array [rows, …], or texts.
        shape: Of one row, as the model takes it; of no meaning for texts that are encoded.
        encode: Makes numbers of texts for a model that takes those.
    """

    tensor: Tensor
    rows: NDArray[Any] | Sequence[str]
    shape: tuple[int, ...]
    encode: Encode | None = None

    def take(self, begin: int, end: int) -> RawTensor:
        """Return rows begin … end−1 as they travel."""
        dtype = NUMPY[self.tensor.datatype]
        if self.encode is not None:
            tokens = self.encode(list(self.rows[begin:end]))
            return RawTensor(self.tensor.datatype, tokens.shape, to_raw(tokens))
        if isinstance(self.rows, np.ndarray):
            block = np.ascontiguousarray(self.rows[begin:end]).astype(dtype, copy=False)
        else:
            block = np.array([text.encode() for text in self.rows[begin:end]], dtype=object)
        block = block.reshape(end - begin, *self.shape)
        return RawTensor(self.tensor.datatype, block.shape, to_raw(block))


def find_sources(
    tensors: Sequence[Tensor],
    contents: Contents,
    mapping: Mapping[str, str],
    encoder: Callable[[], Encode | None] = lambda: None,
) -> tuple[Source, ...]:
    """Return where each input comes from: the column it is mapped to, else the one of its name.

    A model with one input takes the data's only one, whatever its name. A row of another shape with as many
    elements is reshaped: [1, 8, 8] for a model that takes [8, 8] or [64]. Texts for a model that takes ids of
    tokens (INT64 [-1, -1]) are encoded as its bundle says.

    Args:
        tensors: The model's inputs, the batch axis first.
        contents: The data.
        mapping: Names of inputs → names of columns.
        encoder: Gives what encodes texts for the model; None if its bundle does not say how.

    Raises:
        JobFailure: INVALID_DATA: an input is in no column, or of another shape. UNSUPPORTED: the model takes
            no rows.
    """
    for name in mapping:
        if name not in {tensor.name for tensor in tensors}:
            raise JobFailure(
                f"inputs names {name!r}, which the model does not take; it takes "
                f"{', '.join(tensor.name for tensor in tensors)}.",
                "INVALID_DATA",
            )
    columns = _columns(contents)
    needed = [tensor for tensor in tensors if not tensor.optional or tensor.name in mapping]
    found = []
    for tensor in needed:
        column = mapping.get(tensor.name, tensor.name)
        rows = columns.get(column)
        if rows is None and tensor.name not in mapping and len(needed) == 1:
            rows = _only(contents)
        if rows is None:
            raise JobFailure(
                f"The dataset has no column {column!r} for the model's input {tensor.name!r}; it has "
                f"{', '.join(list(columns)[:20])}. Say which with inputs: {tensor.name}=COLUMN.",
                "INVALID_DATA",
            )
        takes_ids = (tensor.datatype, tuple(tensor.shape)) == ("INT64", (-1, -1))
        encode = encoder() if takes_ids and not isinstance(rows, np.ndarray) else None
        shape = () if encode is not None else _row_shape(tensor, rows)
        found.append(Source(tensor, rows, shape, encode))
    return tuple(found)


def _columns(contents: Contents) -> dict[str, NDArray[Any] | Sequence[str]]:
    """Return all that an input may be, by name."""
    columns: dict[str, NDArray[Any] | Sequence[str]] = dict(contents.inputs)
    features: Sequence[str] = contents.notes.get("features", ())
    for place, name in enumerate(features):
        columns[name] = contents.inputs["x"][:, place]
    if contents.texts is not None:
        columns[str(contents.columns[0]["name"])] = contents.texts
    return columns


def _only(contents: Contents) -> NDArray[Any] | Sequence[str] | None:
    if contents.texts is not None:
        return contents.texts
    return next(iter(contents.inputs.values())) if len(contents.inputs) == 1 else None


def _row_shape(tensor: Tensor, rows: NDArray[Any] | Sequence[str]) -> tuple[int, ...]:
    """Return the shape in which a row goes to the model.

    Raises:
        JobFailure: It does not fit.
    """
    if not tensor.shape or tensor.shape[0] != -1:
        raise JobFailure(
            f"The model's input {tensor.name!r} has the shape {list(tensor.shape)}: it takes no rows, so a "
            "dataset cannot be sent through it. Deploy a version whose first dimension is -1.",
            "UNSUPPORTED",
        )
    wanted = tensor.shape[1:]
    is_text = not isinstance(rows, np.ndarray)
    if is_text != (tensor.datatype == "BYTES"):
        raise JobFailure(
            f"The model's input {tensor.name!r} takes {tensor.datatype}, and the column is "
            f"{'text' if is_text else 'numbers'}.",
            "INVALID_DATA",
        )
    have = () if is_text else tuple(rows.shape[1:])  # type: ignore[union-attr]
    if len(have) == len(wanted) and all(w in (-1, h) for w, h in zip(wanted, have, strict=True)):
        return have
    free = [place for place, size in enumerate(wanted) if size == -1]
    known = math.prod(size for size in wanted if size != -1)
    total = math.prod(have)
    if not free and known == total:
        return wanted
    if len(free) == 1 and known and total % known == 0:
        return tuple(total // known if size == -1 else size for size in wanted)
    raise JobFailure(
        f"The model's input {tensor.name!r} takes rows of the shape {list(wanted)}, and the dataset has rows "
        f"of {list(have)}. Say which columns it takes with inputs, or push data of that shape.",
        "INVALID_DATA",
    )
