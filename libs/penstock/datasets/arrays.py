"""`.npz`: NumPy arrays in one file, read without pickle."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import (
    LABEL_NAMES,
    Contents,
    ReadOptions,
    Task,
    check_rows,
    check_task,
    finite_float32,
)
from penstock.datasets.labels import encode
from penstock.errors import InvalidArgument

MAX_BYTES = 32 << 30
IMAGE_CHANNELS = (1, 3, 4)


def read_npz(path: Path, options: ReadOptions) -> Contents:
    """Read arrays with one row each along their first axis.

    An array of three axes is an image in one channel, of four an image with its channels first or last (1, 3
    or 4 of them); it comes as [rows, channels, height, width].

    Args:
        path: The file.
        options: How.

    Raises:
        InvalidArgument: It is no such file, or something in it is wrong; the words say what.
    """
    arrays = _load(path)
    label = _label_name(arrays, options.label)
    names = list(options.features) or [name for name in arrays if name != label]
    for name in names:
        if name not in arrays:
            raise InvalidArgument(f"There is no array {name!r}; there are {', '.join(arrays)}.")
    if not names:
        raise InvalidArgument(
            f"{path.name} holds only the label {label!r}; add an array x with one row each."
        )
    rows = len(arrays[names[0]])
    check_rows(rows, path.name)
    for name in [*names, *([label] if label else [])]:
        if len(arrays[name]) != rows:
            raise InvalidArgument(
                f"{name!r} has {len(arrays[name])} rows and {names[0]!r} has {rows}; all need as many."
            )
    inputs: dict[str, NDArray[Any]] = {}
    for name in names:
        inputs[name] = _input(arrays[name], name)
    is_image = len(inputs) == 1 and next(iter(inputs.values())).ndim == 4
    found: Task = "image" if is_image else "tabular"
    task = check_task(options.task, found, ["image", "tabular"] if is_image else ["tabular"])
    targets, classes = encode(arrays[label], label, options) if label else (None, ())
    columns = [
        {"name": name, "dtype": str(arrays[name].dtype), "shape": list(inputs[name].shape[1:])}
        for name in names
    ]
    if label:
        columns.append({"name": label, "dtype": str(arrays[label].dtype), "shape": []})
    return Contents(
        task=task,
        rows=rows,
        inputs=inputs,
        targets=targets,
        classes=classes,
        label=label,
        columns=tuple(columns),
    )


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        # Opened here: numpy leaves it open if it is damaged.
        with path.open("rb") as file:
            _check_size(path)
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InvalidArgument(f"{path.name} is one array; save x and y with numpy.savez.")
            with archive:
                arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error).lower() and zipfile.is_zipfile(path):
            raise InvalidArgument(
                f"{path.name} holds Python objects (pickles), or rows of different lengths; save arrays of "
                "numbers or text: numpy.asarray(values, dtype=…)."
            ) from error
        raise InvalidArgument(f"{path.name} cannot be read as .npz: {error}") from error
    if not arrays:
        raise InvalidArgument(f"{path.name} holds no arrays.")
    for name, array in arrays.items():
        if array.ndim == 0:
            raise InvalidArgument(f"{name!r} in {path.name} is a single value; each array needs a row axis.")
    return arrays


def _check_size(path: Path) -> None:
    """Return if the arrays can be held in memory: a small archive may hold a lot of zeros.

    Raises:
        InvalidArgument: They cannot.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_BYTES:
        raise InvalidArgument(
            f"{path.name} holds {size / 1e9:.1f} GB of arrays, more than {MAX_BYTES / 1e9:.1f} GB, and they "
            "are read as a whole. Use parquet, which is read piece by piece."
        )


def _label_name(arrays: dict[str, NDArray[Any]], wanted: str) -> str:
    if wanted and wanted not in arrays:
        raise InvalidArgument(f"There is no array {wanted!r} for the label; there are {', '.join(arrays)}.")
    return wanted or next((name for name in LABEL_NAMES if name in arrays), "")


def _input(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.dtype.kind not in "biuf":
        raise InvalidArgument(
            f"{name!r} is of type {array.dtype}; inputs are numbers. Encode it, or leave it out."
        )
    if array.size == 0:
        raise InvalidArgument(f"{name!r} has the shape {list(array.shape)}: no values.")
    if array.ndim == 3:
        array = array[:, None, :, :]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in IMAGE_CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim == 1:
        array = array[:, None]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    return finite_float32(array, name)
