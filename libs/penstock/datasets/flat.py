"""Arrays that grow row by row and need not fit into memory."""

from __future__ import annotations

import tempfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import ReadOptions
from penstock.errors import ResourceExhausted


class Growing:
    """An array that blocks of rows are appended to.

    It is held in memory up to `options.memory_bytes`, then in a file without a name under `options.scratch`,
    which goes away with the array.
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
        if self._file is None and self._bytes <= self._options.memory_bytes:
            self._blocks.append(block)
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._options.scratch)  # noqa: SIM115 - it outlives this call
                for earlier in self._blocks:
                    self._file.write(np.ascontiguousarray(earlier).data)
                self._blocks = []
            self._file.write(np.ascontiguousarray(block).data)
        except OSError as error:
            raise ResourceExhausted(
                f"There is no room for the rows of the dataset ({self._bytes / 1e9:.1f} GB by now) in "
                f"{self._options.scratch or tempfile.gettempdir()}: {error}."
            ) from error

    def finish(self) -> NDArray[Any]:
        """Return the array [rows, …]; nothing is appended after."""
        if self._like is None:
            return np.empty((0,), np.float32)
        if self._file is None:
            return np.concatenate(self._blocks) if self._blocks else self._like
        self._file.flush()
        with self._file as file:
            return np.memmap(file, self._like.dtype, "r+", shape=(self._rows, *self._like.shape[1:]))
