"""`.csv` and `.parquet`: tables with a row an example and a column a feature, read by pyarrow piece by piece.

Numbers and booleans become one input `x` in the order of the columns; a column of lists of equal length (in
parquet) an input of its own name; a table whose only feature is a column of text is for texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    check_text,
    finite_float32,
)
from penstock.datasets.flat import Growing
from penstock.datasets.labels import encode
from penstock.datasets.lazy import LazyTexts
from penstock.errors import FailedPrecondition, InvalidArgument

try:
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pa_parquet
except ImportError:  # the client alone does without; `need_arrow` says what to install
    pa = None

MAX_COLUMNS = 20_000
# The name of the input that the columns of numbers make up.
STACKED = "x"
# Rows of a piece of a parquet file, and bytes of one of a csv file: some megabytes either way.
_PIECE_ROWS = 32_768
_BLOCK_BYTES = 8 << 20
# What pyarrow says of a line with too few or too many values.
_RAGGED = re.compile(r"Row #(?P<line>\d+): Expected (?P<wanted>\d+) columns, got (?P<found>\d+)")


def read_csv(files: Sequence[Path], options: ReadOptions) -> Contents:
    """Read tables of text with a header line each; `.tsv` has tabs for commas.

    Raises:
        InvalidArgument: A row is ragged, a value is missing or no number; the words say where.
        FailedPrecondition: pyarrow is not installed.
    """
    need_arrow()
    return _read(files, options, _csv_pieces)


def read_parquet(files: Sequence[Path], options: ReadOptions) -> Contents:
    """Read parquet files, one after the other.

    Raises:
        InvalidArgument: A file is damaged, a value is missing or no number; the words say where.
        FailedPrecondition: pyarrow is not installed.
    """
    need_arrow()
    return _read(files, options, _parquet_pieces)


def need_arrow() -> None:
    """Return if pyarrow is there.

    Raises:
        FailedPrecondition: It is not; the words say what to install.
    """
    if pa is None:
        raise FailedPrecondition("Tables are read with pyarrow: pip install 'penstock[data]'.")


class TextColumn(LazyTexts):
    """The texts of a column, in Arrow's memory."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def _read(self, place: int) -> str:
        return str(self._column[place].as_py())

    def _read_all(self, places: range) -> list[str]:
        if places.step == 1:
            # Without a copy: `take` would first put all chunks together.
            return [str(text) for text in self._column.slice(places.start, len(places)).to_pylist()]
        return super()._read_all(places)


class _Plan:
    """Which columns of a table are what.

    Args:
        schema: Arrow's.
        options: How the table is to be read.
        where: The file, for errors.
    """

    def __init__(self, schema: Any, options: ReadOptions, where: str) -> None:
        names: list[str] = list(schema.names)
        _check_header(names, where)
        self.types: Mapping[str, Any] = {name: schema.field(name).type for name in names}
        self.label = options.label or next((name for name in LABEL_NAMES if name in names), "")
        if self.label and self.label not in names:
            raise InvalidArgument(
                f"{where} has no column {self.label!r} for the label; it has {_some(names)}."
            )
        features = list(options.features) or [name for name in names if name != self.label]
        for name in features:
            if name not in names:
                raise InvalidArgument(f"{where} has no column {name!r}; it has {_some(names)}.")
        if not features:
            raise InvalidArgument(f"{where} has only the label {self.label!r}; it needs features beside it.")
        self.text = ""
        if len(features) == 1 and _is_text(self.types[features[0]]):
            self.text = features[0]
        self.numbers = [name for name in features if _is_number(self.types[name])]
        self.lists = [name for name in features if _is_list(self.types[name])]
        known = {*self.numbers, *self.lists, self.text}
        self.strange = [name for name in features if name not in known]
        self.features = features

    def columns(self) -> list[dict[str, Any]]:
        """Return what a description says of them, without the shapes of lists."""
        names = [*self.features, *([self.label] if self.label else [])]
        return [{"name": name, "dtype": str(self.types[name]), "shape": []} for name in names]


def _read(files: Sequence[Path], options: ReadOptions, pieces: Any) -> Contents:
    plan: _Plan | None = None
    stacked, lists = Growing(options), dict[str, Growing]()
    labels: list[NDArray[Any]] = []
    texts: list[Any] = []
    rows = 0
    for path in files:
        for piece in pieces(path, options):
            here = _Plan(piece.schema, options, path.name)
            if plan is None:
                plan = here
                lists = {name: Growing(options) for name in plan.lists}
            elif (here.features, here.label) != (plan.features, plan.label):
                raise InvalidArgument(
                    f"{path.name} has other columns than {files[0].name}: {_some(here.features)} where "
                    f"the first has {_some(plan.features)}."
                )
            if not piece.num_rows:
                continue
            _take(piece, plan, rows, path.name, stacked, lists, texts)
            if plan.label:
                labels.append(_label_values(piece.column(plan.label), plan.label, rows))
            rows += piece.num_rows
    if plan is None:
        raise InvalidArgument(f"{files[0].name} is empty.")
    check_rows(rows, files[0].name if len(files) == 1 else f"{files[0].name} and the other files")
    targets, classes = encode(np.concatenate(labels), plan.label, options) if labels else (None, ())
    if plan.text:
        found: Task = "text" if plan.label else "language_model"
        return Contents(
            task=check_task(options.task, found, ["text", "language_model"] if plan.label else [found]),
            rows=rows,
            texts=TextColumn(pa.chunked_array(texts)),
            targets=targets,
            classes=classes,
            label=plan.label,
            columns=tuple(plan.columns()),
        )
    inputs = {name: column.finish() for name, column in lists.items()}
    if plan.numbers:
        inputs = {STACKED: stacked.finish(), **inputs}
    columns = plan.columns()
    for column in columns:
        if column["name"] in lists:
            column["shape"] = list(inputs[column["name"]].shape[1:])
    return Contents(
        task=check_task(options.task, "tabular", ["tabular"]),
        rows=rows,
        inputs=inputs,
        targets=targets,
        classes=classes,
        label=plan.label,
        columns=tuple(columns),
        notes={"features": plan.numbers} if plan.numbers else {},
    )


def _take(
    piece: Any,
    plan: _Plan,
    first: int,
    where: str,
    stacked: Growing,
    lists: Mapping[str, Growing],
    texts: list[Any],
) -> None:
    """Add the rows of a piece of a table, the first of which is row `first`, to what was read."""
    for name in plan.features:
        column = piece.column(name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise InvalidArgument(
                f"{where}: row {first + row}, column {name!r} is missing. Fill in or remove these "
                "rows (rows count from 0), or leave the column out, and push again."
            )
    for name in plan.strange:
        raise _strange(piece.column(name), name, first, where, plan.label)
    if plan.text:
        column = piece.column(plan.text)
        for row, text in enumerate(column.to_pylist()):
            check_text(text, f"{where}: row {first + row}, column {plan.text!r}")
        texts.append(column)
        return
    if plan.numbers:
        block = np.empty((piece.num_rows, len(plan.numbers)), np.float64)
        for place, name in enumerate(plan.numbers):
            block[:, place] = piece.column(name).to_numpy(zero_copy_only=False)
        stacked.append(finite_float32(block, where, plan.numbers, first))
    for name, growing in lists.items():
        growing.append(_list_values(piece.column(name), name, first, where, growing))


def _list_values(column: Any, name: str, first: int, where: str, before: Growing) -> NDArray[Any]:
    lengths = np.diff(np.asarray(column.offsets)) if hasattr(column, "offsets") else None
    length = int(lengths[0]) if lengths is not None else column.type.list_size
    if before.width is not None:
        length = before.width
    if lengths is not None and (lengths != length).any():
        row = int(np.flatnonzero(lengths != length)[0])
        raise InvalidArgument(
            f"{where}: row {first + row}, column {name!r} has {int(lengths[row])} values where others have "
            f"{length}. Pad or cut them to one length."
        )
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), length)
    return finite_float32(values, f"{where}, column {name!r}", first_row=first)


def _label_values(column: Any, name: str, first: int) -> NDArray[Any]:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InvalidArgument(
            f"The label {name!r} is missing in row {first + row}. Fill in or remove these rows (rows "
            "count from 0), and push again."
        )
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        raise InvalidArgument(f"The label {name!r} has bytes that are no UTF-8; convert it (iconv -t utf-8).")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _strange(column: Any, name: str, first: int, where: str, label: str) -> InvalidArgument:
    """Return the error of a feature that is neither a number nor the only text."""
    hint = "" if label else f" If it is the label, say so: no column is called {', '.join(LABEL_NAMES)}."
    if _is_text(column.type):
        for row, value in enumerate(column.to_pylist()):
            if not _reads_as_number(value):
                return InvalidArgument(
                    f"{where}: row {first + row}, column {name!r} is {value[:40]!r}, which is no number. "
                    f"Encode the column as numbers, or name the features to learn from.{hint}"
                )
    return InvalidArgument(
        f"{where}: column {name!r} is of type {column.type}, which cannot be learnt from. Make it numbers, "
        f"or name the features to learn from.{hint}"
    )


def _reads_as_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _csv_pieces(path: Path, options: ReadOptions) -> Iterator[Any]:
    """Yield the pieces of a csv file. Whole numbers are read as floats, but for the label's column."""
    with _said_of(path):
        with _open_csv(path, {}) as reader:
            schema = reader.schema
        label = options.label or next((name for name in LABEL_NAMES if name in schema.names), "")
        _check_header(list(schema.names), path.name)
        # What is a whole number in the first piece may have a point in the next.
        wide = {f.name: pa.float64() for f in schema if pa.types.is_integer(f.type) and f.name != label}
        with _open_csv(path, wide) as reader:
            yield from reader


def _open_csv(path: Path, types: Mapping[str, Any]) -> Any:
    return pa_csv.open_csv(
        path,
        pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        pa_csv.ParseOptions(
            delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
            newlines_in_values=True,
        ),
        pa_csv.ConvertOptions(strings_can_be_null=True, column_types=dict(types)),
    )


def _parquet_pieces(path: Path, _options: ReadOptions) -> Iterator[Any]:
    with _said_of(path), pa_parquet.ParquetFile(path, memory_map=True) as file:
        if not file.metadata.num_rows:
            yield file.schema_arrow.empty_table().combine_chunks()
        yield from file.iter_batches(_PIECE_ROWS)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises into words about the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        words = str(error).partition("\n")[0]
        if "Empty CSV" in words:
            raise InvalidArgument(f"{path.name} is empty.") from error
        if ragged := _RAGGED.search(words):
            raise InvalidArgument(
                f"{path.name}: line {ragged['line']} has {ragged['found']} values where the header has "
                f"{ragged['wanted']} columns. Mend it (quote texts with commas in them), and push again."
            ) from error
        raise InvalidArgument(f"{path.name} cannot be read as a table: {words}") from error


def _check_header(names: Sequence[str], where: str) -> None:
    if len(names) > MAX_COLUMNS:
        raise InvalidArgument(
            f"{where} has {len(names)} columns; {MAX_COLUMNS} are allowed. Use npz for arrays."
        )
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidArgument(f"{where} has two columns {name!r}; name each differently.")
        seen.add(name)
    if names and all(_reads_as_number(name) for name in names):
        raise InvalidArgument(
            f"{where} begins with numbers ({_some(names)}); give it a header line with names."
        )


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: Any) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists) and _is_number(kind.value_type)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
