"""A dataset as it was read and checked, in files that several processes map into memory: one copy for all.

    contents.json   what is not an array
    <name>          an array, without a header; of texts, their bytes one after the other and where each ends

What is mapped is paged in as it is asked for, and given up where memory is short: it is no process's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import TASKS, Contents
from penstock.datasets.flat import write_all
from penstock.datasets.lazy import LazyTexts

FACTS = "contents.json"
_TEXT_BYTES, _TEXT_ENDS, _TARGETS = "texts.bytes", "texts.ends", "targets"
_TEXTS = 4096


class FlatTexts(LazyTexts):
    """Texts that lie one after the other.

    Args:
        data: uint8 [bytes], all of them in UTF-8.
        ends: int64 [rows], where each ends.
    """

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._data = data.data if len(data) else memoryview(b"")
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def _read(self, place: int) -> str:
        begin = int(self._ends[place - 1]) if place else 0
        return str(self._data[begin : int(self._ends[place])], "utf-8")


def save(contents: Contents, directory: Path) -> None:
    """Write contents into a directory. Blocking.

    Args:
        contents: What was read; arrays that lie there already (`ReadOptions.layout`) stay where they are.
        directory: It may be moved later.

    Raises:
        ResourceExhausted: The disk has no room for it.
    """
    arrays = {
        f"input.{place}": _laid(array, directory, f"input.{place}")
        for place, array in enumerate(contents.inputs.values())
    }
    if contents.targets is not None:
        arrays[_TARGETS] = _laid(contents.targets, directory, _TARGETS)
    if contents.texts is not None:
        arrays |= _lay_texts(contents.texts, directory)
    facts = {
        "task": contents.task,
        "rows": contents.rows,
        "inputs": list(contents.inputs),
        "arrays": arrays,
        "classes": contents.classes,
        "label": contents.label,
        "columns": [dict(column) for column in contents.columns],
        "notes": dict(contents.notes),
    }
    _write(directory / FACTS, [json.dumps(facts).encode()])


def load(directory: Path) -> Contents:
    """Map what `save` wrote; arrays cannot be written to. Blocking.

    Raises:
        OSError, ValueError, KeyError: It is not there, or not whole.
    """
    facts = json.loads((directory / FACTS).read_bytes())

    def array(name: str) -> NDArray[Any]:
        found = facts["arrays"][name]
        shape, dtype = tuple(found["shape"]), np.dtype(found["dtype"])
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(directory / found["file"], dtype, "r", shape=shape)

    return Contents(
        task=next(task for task in TASKS if task == facts["task"]),
        rows=facts["rows"],
        inputs={name: array(f"input.{place}") for place, name in enumerate(facts["inputs"])},
        texts=FlatTexts(array(_TEXT_BYTES), array(_TEXT_ENDS)) if _TEXT_ENDS in facts["arrays"] else None,
        targets=array(_TARGETS) if _TARGETS in facts["arrays"] else None,
        classes=tuple(facts["classes"]),
        label=facts["label"],
        columns=tuple(facts["columns"]),
        notes=facts["notes"],
    )


def _laid(array: NDArray[Any], directory: Path, name: str) -> dict[str, Any]:
    """Return what tells where an array lies, after it was written there if it was not."""
    file = getattr(array, "filename", None)
    if file is not None and Path(file).parent == directory:
        name = Path(file).name
    else:
        _write(directory / name, [np.ascontiguousarray(array).data])
    return {"file": name, "dtype": array.dtype.str, "shape": list(array.shape)}


def _lay_texts(texts: Sequence[str], directory: Path) -> dict[str, Any]:
    ends = np.zeros(len(texts), np.int64)

    def blocks() -> Iterator[bytes]:
        at = 0
        for start in range(0, len(texts), _TEXTS):
            block = [text.encode() for text in texts[start : start + _TEXTS]]
            here = at + np.cumsum([len(text) for text in block])
            ends[start : start + len(block)] = here
            at = int(here[-1])
            yield b"".join(block)

    size = _write(directory / _TEXT_BYTES, blocks())
    return {
        _TEXT_BYTES: {"file": _TEXT_BYTES, "dtype": "|u1", "shape": [size]},
        _TEXT_ENDS: _laid(ends, directory, _TEXT_ENDS),
    }


def _write(path: Path, blocks: Iterable[Any]) -> int:
    """Write a file; return its size."""
    size = 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            size += write_all(file, block, path.parent, size)
    return size
