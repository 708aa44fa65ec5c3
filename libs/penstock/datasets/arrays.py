"""`.npz`: NumPy arrays in one file, read without pickle, a few megabytes at a time."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
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
from penstock.datasets.flat import Growing, no_room, write_all
from penstock.datasets.labels import encode
from penstock.errors import InvalidArgument

# Beyond the first, an archive is refused that holds so many times its own size: a lot of zeros.
MAX_BYTES = 32 << 30
MAX_INFLATION = 100
IMAGE_CHANNELS = (1, 3, 4)
_BLOCK_BYTES = 4 << 20


def read_npz(path: Path, options: ReadOptions) -> Contents:
    """Read arrays with one row each along their first axis.

    An array of three axes is an image in one channel, of four an image with its channels first or last (1, 3
    or 4 of them); it comes as [rows, channels, height, width].

    Args:
        path: The file.
        options: How.

    Raises:
        InvalidArgument: It is no such file, or something in it is wrong; the words say what.
        ResourceExhausted: The disk has no room for it.
    """
    with _opened(path) as archive:
        arrays = _members(archive, path)
        label = _label_name(arrays, options.label)
        names = list(options.features) or [name for name in arrays if name != label]
        for name in names:
            if name not in arrays:
                raise InvalidArgument(f"There is no array {name!r}; there are {', '.join(arrays)}.")
        if not names:
            raise InvalidArgument(
                f"{path.name} holds only the label {label!r}; add an array x with one row each."
            )
        rows = arrays[names[0]].shape[0]
        check_rows(rows, path.name)
        for name in [*names, *([label] if label else [])]:
            if arrays[name].shape[0] != rows:
                raise InvalidArgument(
                    f"{name!r} has {arrays[name].shape[0]} rows and {names[0]!r} has {rows}; "
                    "all need as many."
                )
        inputs = {name: _input(archive, arrays[name], options) for name in names}
        labels = np.concatenate(list(_blocks(archive, arrays[label], options))) if label else None
    is_image = len(inputs) == 1 and next(iter(inputs.values())).ndim == 4
    found: Task = "image" if is_image else "tabular"
    task = check_task(options.task, found, ["image", "tabular"] if is_image else ["tabular"])
    targets, classes = (None, ()) if labels is None else encode(labels, label, options)
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


@dataclass(frozen=True, slots=True)
class _Member:
    """One array of an archive, by its header.

    Attributes:
        name: Of the array.
        entry: Of its file in the archive.
        dtype: Of its values.
        shape: All of it, the rows first.
        by_columns: Values of the first axis lie side by side (Fortran's order).
    """

    name: str
    entry: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive, and turn what zipfile and NumPy raise into words about it."""
    try:
        with path.open("rb") as file:
            if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
                raise InvalidArgument(f"{path.name} is one array; save x and y with numpy.savez.")
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            packed = path.stat().st_size
            if size > max(MAX_BYTES, MAX_INFLATION * packed):
                raise InvalidArgument(
                    f"{path.name} has {packed / 1e6:.1f} MB and would fill {size / 1e9:.1f} GB: its arrays "
                    "hold the same values again and again. Save them without compression, or use parquet."
                )
            yield archive
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidArgument(f"{path.name} cannot be read as .npz: {error}") from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, _Member]:
    """Return the arrays of an archive, without their values."""
    found = {}
    for entry in archive.namelist():
        name = entry.removesuffix(".npy")
        with archive.open(entry) as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = read_header(file)
        if dtype.hasobject:
            raise InvalidArgument(
                f"{path.name} holds Python objects (pickles), or rows of different lengths; save arrays of "
                "numbers or text: numpy.asarray(values, dtype=…)."
            )
        if not shape:
            raise InvalidArgument(f"{name!r} in {path.name} is a single value; each array needs a row axis.")
        found[name] = _Member(name, entry, dtype, tuple(int(size) for size in shape), by_columns)
    if not found:
        raise InvalidArgument(f"{path.name} holds no arrays.")
    return found


def _blocks(archive: zipfile.ZipFile, member: _Member, options: ReadOptions) -> Iterator[NDArray[Any]]:
    """Yield the rows of an array, some megabytes at a time; an array without values is one block."""
    rows = member.shape[0]
    row_bytes = member.dtype.itemsize * int(np.prod(member.shape[1:], dtype=np.int64))
    if not rows or not row_bytes:
        yield np.empty(member.shape, member.dtype)
        return
    step = max(1, _BLOCK_BYTES // row_bytes)
    with archive.open(member.entry) as file:
        version = npy.read_magic(file)
        (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        if member.by_columns:
            with _turned(file, member, rows * row_bytes, options) as whole:
                for start in range(0, rows, step):
                    yield np.ascontiguousarray(whole[start : start + step])
        else:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                data = _exactly(file, count * row_bytes)
                yield np.frombuffer(data, member.dtype).reshape(count, *member.shape[1:])
        if file.read(1):  # at its end the archive's checksum is compared, too
            raise ValueError(f"{member.name} is longer than its header says")


@contextmanager
def _turned(
    file: IO[bytes], member: _Member, size: int, options: ReadOptions
) -> Iterator[np.memmap[Any, np.dtype[Any]]]:
    """Lay out an array whose rows do not lie together, so that they can be had one by one."""
    folder = options.layout or options.scratch or Path(tempfile.gettempdir())
    try:
        made = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - below
    except OSError as error:
        # Not the archive's fault, as other errors of reading it are.
        raise no_room(error, folder, size, size) from error
    with made as flat:
        left = size
        while left:
            block = _exactly(file, min(left, _BLOCK_BYTES))
            write_all(flat, block, folder, size - left)
            left -= len(block)
        yield np.memmap(flat, member.dtype, "r", shape=member.shape, order="F")


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError("it ends before its time")
    return data


def _label_name(arrays: Mapping[str, _Member], wanted: str) -> str:
    if wanted and wanted not in arrays:
        raise InvalidArgument(f"There is no array {wanted!r} for the label; there are {', '.join(arrays)}.")
    return wanted or next((name for name in LABEL_NAMES if name in arrays), "")


def _input(archive: zipfile.ZipFile, member: _Member, options: ReadOptions) -> NDArray[Any]:
    name, shape = member.name, member.shape
    if member.dtype.kind not in "biuf":
        raise InvalidArgument(
            f"{name!r} is of type {member.dtype}; inputs are numbers. Encode it, or leave it out."
        )
    if 0 in shape:
        raise InvalidArgument(f"{name!r} has the shape {list(shape)}: no values.")
    channels_last = len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in IMAGE_CHANNELS
    grown = Growing(options)
    for block in _blocks(archive, member, options):
        rows = block
        if rows.ndim == 3:
            rows = rows[:, None, :, :]
        elif channels_last:
            rows = rows.transpose(0, 3, 1, 2)
        elif rows.ndim == 1:
            rows = rows[:, None]
        if rows.dtype == np.uint8:
            grown.append(np.ascontiguousarray(rows))
        else:
            grown.append(finite_float32(rows, name, first_row=grown.rows))
    return grown.finish()
