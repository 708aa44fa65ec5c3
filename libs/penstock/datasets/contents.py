"""What a dataset is once it was read and found right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgument

Task = Literal["tabular", "image", "text", "language_model"]
TASKS: tuple[Task, ...] = ("tabular", "image", "text", "language_model")
# What the label may be called where nobody says it, in this order.
LABEL_NAMES = ("label", "target", "y", "class")
MAX_TEXT_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a dataset is to be read.

    Attributes:
        task: One of `TASKS`; empty means what the data are.
        label: Name of the array or column with the label; empty means one of `LABEL_NAMES`.
        features: Names of the arrays or columns to learn from; empty means all but the label.
        target: "classes" or "numbers"; empty means what the label looks like (`labels.encode`).
        classes: The labels that there may be, in the order of their indices; empty means those that occur.
        scratch: Where data larger than `memory_bytes` are laid out as flat files; None means a temporary
            directory.
        memory_bytes: Up to how many bytes of an array are held in memory.
        layout: Where arrays of any size are laid out as files that stay, for `laid_out.save`.
    """

    task: str = ""
    label: str = ""
    features: tuple[str, ...] = ()
    target: str = ""
    classes: tuple[str, ...] = ()
    scratch: Path | None = None
    memory_bytes: int = 1 << 30
    layout: Path | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """All rows of a dataset, checked.

    Attributes:
        task: What it is for.
        rows: How many there are.
        inputs: Name → array [rows, …] of float32 or uint8, all finite; empty for texts. Larger ones are
            memory-mapped.
        texts: The rows' texts, for the tasks text and language_model.
        targets: int64 [rows] indices into `classes`, or float32 [rows]; None if the data have no label.
        classes: What the indices mean; empty if the label is a number.
        label: Name of the label.
        columns: What there is, as {"name", "dtype", "shape"} (shape of one row).
        notes: Further facts for the description.
    """

    task: Task
    rows: int
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    texts: Sequence[str] | None = None
    targets: NDArray[Any] | None = None
    classes: tuple[str, ...] = ()
    label: str = ""
    columns: tuple[Mapping[str, Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def check_task(task: str, found: Task, possible: Sequence[Task]) -> Task:
    """Return the task that was asked for, or `found` if none was.

    Raises:
        InvalidArgument: The data are not for it.
    """
    for name in possible:
        if task == name:
            return name
    if task:
        words = f"task {task!r} is none of {', '.join(TASKS)}" if task not in TASKS else f"not for {task}"
        raise InvalidArgument(f"These data are for {' or '.join(possible)}: {words}.")
    return found


def check_rows(rows: int, what: str) -> None:
    """Return if there is anything to learn from.

    Raises:
        InvalidArgument: There are fewer than two rows.
    """
    if rows < 2:
        raise InvalidArgument(f"{what} has {rows} row{'s' * (rows != 1)}; a dataset has at least 2.")


def check_text(text: str, where: str) -> None:
    """Return if a text can be learnt from.

    Raises:
        InvalidArgument: It is blank, or too long, or has a NUL or half a character.
    """
    if not text.strip():
        raise InvalidArgument(f"{where}: the text is empty. Remove the row, and push again.")
    if len(text) > MAX_TEXT_CHARACTERS or "\x00" in text:
        raise InvalidArgument(
            f"{where}: the text is longer than {MAX_TEXT_CHARACTERS:,} characters, or has a NUL in it."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can say one half of what UTF-16 writes in two.
        raise InvalidArgument(
            f"{where}: {text[error.start]!a} is no character but half of one. Correct the row, and push "
            "again."
        ) from error


def finite_float32(
    values: NDArray[Any], name: str, names: Sequence[str] = (), first_row: int = 0
) -> NDArray[np.float32]:
    """Return numbers as float32.

    Args:
        values: Numbers, [rows, …].
        name: Of the array, for the error.
        names: Of its columns, if it has any.
        first_row: Which row of the dataset its first one is.

    Raises:
        InvalidArgument: One is NaN, or infinite, or too large for float32; the words say which.
    """
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        found = values[tuple(place)]
        column = ", ".join(str(int(index)) for index in place[1:])
        if names and len(place) == 2:
            column = repr(names[int(place[1])])
        where = f"row {first_row + int(place[0])}" + (f", column {column}" if column else "")
        what = "NaN (a missing value)" if np.isnan(found) else f"{found}, which is not finite in float32"
        count = int((~finite).sum())
        raise InvalidArgument(
            f"{name}: {where} is {what}; {count} value{'s are' if count > 1 else ' is'} so. "
            "Fill in or remove these rows, and push again."
        )
    return numbers
