"""Arrays that grow row by row and need not fit into memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import ReadOptions
from penstock.errors import ResourceExhausted


class Growing:
    """An array that blocks of rows are appended to.

    It is held in memory up to `options.memory_bytes`, then in a file without a name under `options.scratch`,
    which goes away with the array. With `options.layout` it is in a file there from the first block on.
    """

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._blocks: list[NDArray[Any]] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._rows = 0
        self._like: NDArray[Any] | None = None

    @property
    def rows(self) -> int:
        """How many rows there are by now."""
        return self._rows

    @property
    def width(self) -> int | None:
        """Length of the first axis of a row; None before the first block."""
        return None if self._like is None else int(self._like.shape[1])

    def append(self, block: NDArray[Any]) -> None:
        """Add rows, of the same dtype and row shape as those before.

        Raises:
            ResourceExhausted: The disk has no room for them.
        """
        if self._like is None:
            self._like = block[:0]
        self._rows += len(block)
        self._bytes += block.nbytes
        in_memory = self._options.layout is None and self._bytes <= self._options.memory_bytes
        if self._file is None and in_memory:
            self._blocks.append(block)
            return
        try:
            if self._file is None:
                self._file = self._open()
                for earlier in self._blocks:
                    self._file.write(np.ascontiguousarray(earlier).data)
                self._blocks = []
            self._file.write(np.ascontiguousarray(block).data)
        except OSError as error:
            raise no_room(error, self._folder(), self._bytes, block.nbytes) from error

    def finish(self) -> NDArray[Any]:
        """Return the array [rows, …]; nothing is appended after.

        Raises:
            ResourceExhausted: The disk has no room for it.
        """
        if self._like is None:
            return np.empty((0,), np.float32)
        if self._file is None:
            return np.concatenate(self._blocks) if self._blocks else self._like
        shape = (self._rows, *self._like.shape[1:])
        try:
            self._file.flush()
        except OSError as error:
            raise no_room(error, self._folder(), self._bytes, self._bytes) from error
        with self._file as file:
            if self._options.layout is None:
                return np.memmap(file, self._like.dtype, "r+", shape=shape)
            return np.memmap(file.name, self._like.dtype, "r", shape=shape)

    def _open(self) -> IO[bytes]:
        if self._options.layout is None:
            return tempfile.TemporaryFile(dir=self._options.scratch)
        return tempfile.NamedTemporaryFile(dir=self._options.layout, delete=False)

    def _folder(self) -> Path:
        return self._options.layout or self._options.scratch or Path(tempfile.gettempdir())


def write_all(file: IO[bytes], data: Any, folder: Path, before: int) -> int:
    """Write to a file that is not buffered, which may take a part at a time; return how many bytes.

    Args:
        file: Where to.
        data: An array whose values lie together, or bytes.
        folder: Where the file is, for the error.
        before: Bytes that were written before, likewise.

    Raises:
        ResourceExhausted: The disk has no room for them.
    """
    whole = memoryview(data)
    size = whole.nbytes
    left = whole.cast("B") if size else whole[:0]
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise no_room(error, folder, before + size, size) from error
    return size


def no_room(error: OSError, folder: Path, taken: int, more: int) -> ResourceExhausted:
    """Return the error of a disk that did not take the rows of a dataset.

    Args:
        error: What the kernel said.
        folder: Where they were written.
        taken: Bytes of all rows of the array by now.
        more: Bytes that were written last.
    """
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
    except OSError:
        free = "nobody knows how much"
    return ResourceExhausted(
        f"There is no room for the rows of the dataset in {folder}: {os.strerror(error.errno or 0)}; "
        f"{more / 1e6:.1f} MB more were needed after {(taken - more) / 1e6:.1f} MB, and {free} are free "
        "there. Free or add space."
    )
