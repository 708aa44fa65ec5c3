"""Rows of datasets as inputs of a model, and inputs out of nothing where there is no dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from penstock_kit.oip import BFLOAT16, Array, Signature, TensorSpec
from penstock_worker.usecases.job_context import JobFailure

# Size of a dimension that may have any, when inputs are drawn: a short sentence, a small image.
DRAWN_LENGTH = 16


def inputs_of(signature: Signature, columns: Mapping[str, Any]) -> dict[str, Array]:
    """Return the inputs of a model from columns of a dataset.

    Inputs take the columns of their names. A model with one input takes the only column whatever its name,
    or all columns side by side where they are numbers. Numbers are cast to the signature's datatype, and
    reshaped where only the shape of a row differs ([8, 8] to [1, 8, 8] or [64]).

    Args:
        signature: Of the model.
        columns: By name, [rows, …] each: arrays, tensors, or lists of texts.

    Raises:
        JobFailure: INVALID_DATA if the columns cannot be what the model takes; the message names both.
    """
    found = {name: _array(values) for name, values in columns.items()}
    wanted = [spec for spec in signature.inputs if not spec.optional or spec.name in found]
    if all(spec.name in found for spec in wanted):
        return {spec.name: _fitted(spec, found[spec.name], spec.name) for spec in wanted}
    if len(wanted) == 1 and len(found) == 1:
        ((name, array),) = found.items()
        return {wanted[0].name: _fitted(wanted[0], array, name)}
    if len(wanted) == 1 and all(array.dtype != object for array in found.values()):
        parts = [array.reshape(len(array), -1) for array in found.values()]
        joined = np.concatenate(parts, axis=1)
        return {wanted[0].name: _fitted(wanted[0], joined, ", ".join(found))}
    raise JobFailure(
        f"The model takes {', '.join(spec.name for spec in wanted)}; the dataset has "
        f"{', '.join(found) or 'no columns'}. Name its columns as the model's inputs.",
        "INVALID_DATA",
    )


def drawn_inputs(
    signature: Signature, rows: int, *, seed: int = 0, length: int = DRAWN_LENGTH
) -> dict[str, Array]:
    """Return inputs that fit a signature: normal numbers, zeros and ones for integers, short texts.

    Integers beyond 0 and 1 might be no index of the model's.

    Args:
        signature: Of the model.
        rows: How many, where the model batches.
        seed: Of the numbers; the same inputs each time.
        length: Of dimensions that may have any size.
    """
    generator = np.random.default_rng(seed)
    return {
        spec.name: _drawn(spec, rows, length, generator, batched=signature.batched)
        for spec in signature.inputs
        if not spec.optional
    }


def _drawn(
    spec: TensorSpec, rows: int, length: int, generator: np.random.Generator, *, batched: bool
) -> Array:
    shape = tuple(length if size < 0 else size for size in spec.shape)
    if batched:
        shape = (rows, *shape[1:])
    if spec.datatype == "BYTES":
        return np.full(shape, b"penstock", dtype=object)
    if spec.dtype.kind == "f" or spec.dtype == BFLOAT16:
        return generator.standard_normal(shape).astype(spec.dtype)
    return generator.integers(0, 2, shape).astype(spec.dtype)


def _array(values: Any) -> Array:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if isinstance(values, list | tuple):
        if values and isinstance(values[0], str | bytes):
            return _texts(values)
        values = np.asarray(values)
    if values.dtype.kind in "USO":
        return _texts(values.ravel().tolist()).reshape(values.shape)
    array: Array = values
    return array


def _texts(values: list[Any] | tuple[Any, ...]) -> Array:
    texts = np.empty(len(values), dtype=object)
    texts[:] = [value.encode() if isinstance(value, str) else bytes(value) for value in values]
    return texts


def _fitted(spec: TensorSpec, array: Array, column: str) -> Array:
    if (spec.datatype == "BYTES") != (array.dtype == object):
        what = "texts" if array.dtype == object else "numbers"
        raise JobFailure(
            f"The column {column} has {what}; the model's input {spec.name} is {spec.datatype}.",
            "INVALID_DATA",
        )
    if spec.datatype != "BYTES":
        array = np.ascontiguousarray(array.astype(spec.dtype, copy=False))
    if _fits(spec.shape, array.shape):
        return array
    row = spec.shape[1:]
    sizes = int(np.prod(array.shape[1:])) if array.ndim else 1
    if -1 not in row and spec.shape[:1] == (-1,) and int(np.prod(row)) == sizes:
        return array.reshape(len(array), *row)
    raise JobFailure(
        f"Rows of the column {column} have the shape {list(array.shape[1:])}; "
        f"the model's input {spec.name} takes {list(row)}. Take a dataset with rows of that shape.",
        "INVALID_DATA",
    )


def _fits(wanted: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(
        want in (-1, size) for want, size in zip(wanted, shape, strict=True)
    )
