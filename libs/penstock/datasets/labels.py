"""From labels as they stand in the data to what a model learns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import ReadOptions
from penstock.errors import InvalidArgument

# Whole numbers with more different values than this are quantities, not classes.
MAX_NUMBERED_CLASSES = 100
# Their names stand in the description, which has 1 MiB.
MAX_CLASSES = 4000
MAX_CLASS_CHARACTERS = 100


def encode(labels: NDArray[Any], name: str, options: ReadOptions) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return targets and classes.

    Texts and booleans are classes. Whole numbers are if at most 100 different ones occur, each twice on
    average; other numbers are numbers. `options.target` decides otherwise.

    Args:
        labels: [rows], of numbers, booleans or str.
        name: Of the label, for errors.
        options: `target` and `classes` are looked at.

    Returns:
        int64 [rows] and the classes, sorted (numbers by their value), or float32 [rows] and no classes.

    Raises:
        InvalidArgument: A label is missing, or there is only one class, or too many.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InvalidArgument(
            f"The label {name!r} has the shape {list(labels.shape)}; give one value a row "
            "(for one-hot labels: argmax over the last axis)."
        )
    kind = labels.dtype.kind
    if kind not in "biufUO":
        raise InvalidArgument(f"The label {name!r} is of type {labels.dtype}; give numbers or text.")
    if kind == "f":
        missing = np.flatnonzero(~np.isfinite(labels))
        if len(missing):
            raise _missing(name, int(missing[0]), len(missing))
    if kind == "U" or kind == "O":
        missing = np.flatnonzero([value is None or str(value) == "" for value in labels.tolist()])
        if len(missing):
            raise _missing(name, int(missing[0]), len(missing))
        labels = labels.astype(str)
        kind = "U"
    values, indices = np.unique(labels, return_inverse=True)
    if options.target == "numbers" or (
        not options.target and not options.classes and not _are_classes(values, len(labels))
    ):
        if kind == "U":
            raise InvalidArgument(f"The label {name!r} is text ({values[0]!r} …), not numbers.")
        if len(values) < 2:
            raise InvalidArgument(
                f"The label {name!r} is {values[0]} in every row; there is nothing to learn."
            )
        return labels.astype(np.float32), ()
    words = tuple(_word(value) for value in values.tolist())
    if options.classes:
        return _among(words, indices, options.classes, name)
    if len(words) < 2:
        raise InvalidArgument(
            f"The label {name!r} is {words[0]!r} in every row; a model needs two classes at least."
        )
    if len(words) > MAX_CLASSES:
        raise InvalidArgument(f"The label {name!r} has {len(words):,} classes; {MAX_CLASSES:,} are allowed.")
    longest = max(words, key=len)
    if len(longest) > MAX_CLASS_CHARACTERS:
        raise InvalidArgument(
            f"The label {name!r} has a class of {len(longest)} characters, more than {MAX_CLASS_CHARACTERS}."
        )
    return indices.reshape(-1).astype(np.int64), words


def _are_classes(values: NDArray[Any], rows: int) -> bool:
    if values.dtype.kind in "bU":
        return True
    return values.dtype.kind in "iu" and len(values) <= min(MAX_NUMBERED_CLASSES, max(2, rows // 2))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _among(
    words: tuple[str, ...], indices: NDArray[Any], classes: tuple[str, ...], name: str
) -> tuple[NDArray[Any], tuple[str, ...]]:
    places = {word: place for place, word in enumerate(classes)}
    for value, word in enumerate(words):
        if word not in places:
            row = int(np.flatnonzero(indices.reshape(-1) == value)[0])
            raise InvalidArgument(
                f"The label {name!r} of row {row} is {word!r}, none of the classes {', '.join(classes[:20])}."
            )
    table = np.array([places[word] for word in words], dtype=np.int64)
    return table[indices.reshape(-1)], classes


def _missing(name: str, row: int, count: int) -> InvalidArgument:
    return InvalidArgument(
        f"The label {name!r} is missing in row {row} ({count} row{'s' * (count != 1)} in all). "
        "Fill in or remove these rows, and push again."
    )
