"""Answers as they are kept: a parquet file a chunk, a row an answer, in the order of the dataset.

Columns: `index` (int64, the row's number in the dataset, from 0), one for each output of the model (a value,
or lists as deep as the row's shape; BYTES as binary), `version` (who answered) and `error` (why a row has no
answer; null for those that have one).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock_kit.errors import Internal, Reason
from penstock_kit.oip.datatypes import NUMPY, Array
from penstock_kit.routing.model import Tensor

OWN_COLUMNS = ("index", "version", "error")


class ChunkAnswers:
    """The answers to the rows of one chunk, in any order.

    Args:
        begin: First row.
        end: Row after the last.
        outputs: What the model gives.
        version: Who answers.
    """

    def __init__(self, begin: int, end: int, outputs: Sequence[Tensor], version: str) -> None:
        self.begin = begin
        self.end = end
        self.outputs = tuple(outputs)
        self._version = version
        self._parts: dict[int, dict[str, Array]] = {}
        self._errors: dict[int, str] = {}

    @property
    def failed(self) -> int:
        """Rows without an answer."""
        return len(self._errors)

    def put(self, begin: int, end: int, answer: Mapping[str, Array]) -> None:
        """Take the answers to rows begin … end−1.

        Raises:
            Internal: An output is missing, or has not a row for each; reason MODEL_ERROR.
        """
        for output in self.outputs:
            found = answer.get(output.name)
            if found is None:
                raise Internal(f"The model gave no output {output.name}.", reason=Reason.MODEL_ERROR)
            if not found.ndim or len(found) != end - begin:
                raise Internal(
                    f"The output {output.name} has the shape {list(found.shape)} for {end - begin} rows.",
                    reason=Reason.MODEL_ERROR,
                )
        # Copied: the answers are views of whole messages.
        self._parts[begin] = {output.name: np.array(answer[output.name]) for output in self.outputs}

    def refuse(self, begin: int, end: int, words: str) -> None:
        """Take that rows begin … end−1 have no answer."""
        for row in range(begin, end):
            self._errors[row] = words

    def write(self, path: Path) -> None:
        """Write the chunk, durable once this returns. Blocking.

        Raises:
            Internal: Rows of an output have different shapes; reason MODEL_ERROR.
        """
        columns: dict[str, Any] = {"index": pa.array(np.arange(self.begin, self.end, dtype=np.int64))}
        for output in self.outputs:
            name = output.name if output.name not in OWN_COLUMNS else f"output.{output.name}"
            columns[name] = self._column(output)
        count = self.end - self.begin
        columns["version"] = pa.array([self._version] * count).dictionary_encode()
        columns["error"] = pa.array(
            [self._errors.get(row) for row in range(self.begin, self.end)], pa.string()
        )
        table = pa.table(columns)
        unfinished = path.with_name(f".{path.name}")
        with unfinished.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def _column(self, output: Tensor) -> Any:
        """Return the answers of one output, null where there is none."""
        pieces: list[Any] = []
        kind: Any = None
        row = self.begin
        while row < self.end:
            part = self._parts.get(row)
            if part is None:
                pieces.append(row)
                row += 1
                continue
            values = part[output.name]
            piece = _nested(values)
            if kind is not None and piece.type != kind:
                raise Internal(
                    f"Rows of the output {output.name} have different shapes: {kind} and {piece.type}. Each "
                    "row of a batch prediction needs the same.",
                    reason=Reason.MODEL_ERROR,
                )
            kind = piece.type
            pieces.append(piece)
            row += len(values)
        if kind is None:
            shape = tuple(max(size, 1) for size in output.shape[1:])
            kind = _nested(np.empty((0, *shape), NUMPY[output.datatype])).type
        return pa.chunked_array(
            [pa.nulls(1, kind) if isinstance(piece, int) else piece for piece in pieces], kind
        )


def _nested(values: Array) -> Any:
    """Return an array [rows, …] as rows of values or of lists of a fixed length, one in another."""
    flat = values.reshape(-1)
    if values.dtype == object:
        column = pa.array([bytes(one) for one in flat.tolist()], pa.binary())
    elif values.dtype.name == "bfloat16":
        column = pa.array(flat.astype(np.float32))
    else:
        column = pa.array(flat)
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
