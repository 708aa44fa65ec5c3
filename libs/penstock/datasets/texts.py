"""Texts: `.jsonl` with a text and perhaps a label a line, folders with a file a row, or plain text.

Plain text, for language models, is cut into rows at blank lines, of about `PIECE_BYTES`; so some of it can be
held out. Files are mapped into memory, and a row is decoded when it is asked for.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import (
    LABEL_NAMES,
    Contents,
    ReadOptions,
    check_rows,
    check_task,
    check_text,
)
from penstock.datasets.labels import encode
from penstock.datasets.lazy import LazyTexts
from penstock.errors import InvalidArgument

TEXT_NAMES = ("text", "content", "sentence", "document")
PIECE_BYTES = 2048
MAX_LINE_BYTES = 8 << 20


def read_texts(root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    """Read texts.

    Args:
        root: The folder of the dataset.
        files: All files in it.
        options: How.

    Raises:
        InvalidArgument: A file is no UTF-8, a line no JSON, a text or a label missing; the words say where.
    """
    lines = [path for path in files if path.suffix.lower() in (".jsonl", ".ndjson")]
    if lines and len(lines) != len(files):
        other = next(path for path in files if path not in lines)
        raise InvalidArgument(f"{other.name} lies beside .jsonl files; push one kind at a time.")
    if lines:
        return _read_lines(lines, options)
    depths = {len(path.relative_to(root).parts) for path in files}
    if depths == {1}:
        return _read_plain(files, options)
    if 1 in depths:
        loose = next(path for path in files if len(path.relative_to(root).parts) == 1)
        raise InvalidArgument(f"{loose.name} lies beside folders of classes; put it into one, or remove it.")
    return _read_folders(root, files, options)


class MappedTexts(LazyTexts):
    """Rows that are parts of files.

    Args:
        buffers: The files.
        places: int64 [rows, 3]: file, begin, end.
        key: Of the text in a row of JSON; empty if a row is the text.
    """

    def __init__(
        self, buffers: Sequence[mmap.mmap | bytes], places: NDArray[np.int64], key: str = ""
    ) -> None:
        self._buffers = buffers
        self._places = places
        self._key = key

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, place: int) -> str:
        file, begin, end = self._places[place]
        text = self._buffers[file][begin:end].decode()
        return str(json.loads(text)[self._key]) if self._key else text


class FileTexts(LazyTexts):
    """Rows that are whole files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def _read(self, place: int) -> str:
        return self._files[place].read_text(encoding="utf-8")


def _read_lines(files: Sequence[Path], options: ReadOptions) -> Contents:
    places: list[tuple[int, int, int]] = []
    labels: list[Any] = []
    key = label = ""
    buffers = [_map(path) for path in files]
    for number, (path, buffer) in enumerate(zip(files, buffers, strict=True)):
        for line, (begin, end) in enumerate(_lines(buffer, path), start=1):
            where = f"{path.name}, line {line}"
            fields = _fields(buffer[begin:end], where)
            if not key:
                key = next((name for name in (*options.features[:1], *TEXT_NAMES) if name in fields), "")
                label = options.label or next((name for name in LABEL_NAMES if name in fields), "")
                if not key:
                    raise InvalidArgument(
                        f"{where} has no {'/'.join(TEXT_NAMES)}; it has {', '.join(fields)}."
                    )
            if not isinstance(fields.get(key), str):
                raise InvalidArgument(f"{where}: {key!r} is missing, or no text.")
            check_text(fields[key], where)
            if label:
                value = fields.get(label)
                if value is None or value == "" or not isinstance(value, str | int | float):
                    raise InvalidArgument(
                        f"{where}: the label {label!r} is missing. Fill in or remove the line, "
                        "and push again."
                    )
                labels.append(value)
            elif (late := next((name for name in LABEL_NAMES if name in fields), "")) != "":
                raise InvalidArgument(f"{where} has a {late!r}, and lines before it have none.")
            places.append((number, begin, end))
    what = files[0].name if len(files) == 1 else f"{files[0].name} and the other files"
    check_rows(len(places), what)
    targets, classes = encode(_label_array(labels, label), label, options) if label else (None, ())
    possible: list[Any] = ["text", "language_model"] if label else ["language_model"]
    columns = [{"name": key, "dtype": "string", "shape": []}]
    if label:
        columns.append({"name": label, "dtype": "string", "shape": []})
    return Contents(
        task=check_task(options.task, possible[0], possible),
        rows=len(places),
        texts=MappedTexts(buffers, np.array(places, dtype=np.int64), key),
        targets=targets,
        classes=classes,
        label=label,
        columns=tuple(columns),
    )


def _read_folders(root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    labels = np.array([path.relative_to(root).parts[0] for path in files])
    check_rows(len(files), root.name)
    for path in files:
        check_text(_whole(path), str(path.relative_to(root)))
    targets, classes = encode(labels, "folder", options)
    return Contents(
        task=check_task(options.task, "text", ["text", "language_model"]),
        rows=len(files),
        texts=FileTexts(files),
        targets=targets,
        classes=classes,
        label="folder",
        columns=(
            {"name": "text", "dtype": "string", "shape": []},
            {"name": "folder", "dtype": "string", "shape": []},
        ),
    )


def _read_plain(files: Sequence[Path], options: ReadOptions) -> Contents:
    buffers = [_map(path) for path in files]
    # A small text still has rows enough to hold some out.
    piece = max(64, min(PIECE_BYTES, sum(map(len, buffers)) // 50))
    places: list[tuple[int, int, int]] = []
    for number, (path, buffer) in enumerate(zip(files, buffers, strict=True)):
        for begin, end in _pieces(buffer, piece):
            _decoded(buffer[begin:end], path, begin)
            places.append((number, begin, end))
    what = files[0].name if len(files) == 1 else f"{files[0].name} and the other files"
    check_rows(len(places), what)
    return Contents(
        task=check_task(options.task, "language_model", ["language_model"]),
        rows=len(places),
        texts=MappedTexts(buffers, np.array(places, dtype=np.int64)),
        columns=({"name": "text", "dtype": "string", "shape": []},),
        notes={"piece_bytes": piece},
    )


def _pieces(buffer: mmap.mmap | bytes, least: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of parts that end at a blank line where there is one; none is blank.

    Args:
        buffer: The text.
        least: Bytes of a part; it has four times as many at most.
    """
    begin, size = 0, len(buffer)
    while begin < size:
        end = buffer.find(b"\n\n", begin + least, begin + 4 * least)
        if end < 0:
            end = buffer.rfind(b"\n", begin, begin + 4 * least)
        end = min(begin + 4 * least, size) if end < 0 else end + 1
        if size - end < least:
            end = size
        # Not within a character: those after its first byte begin with the bits 10.
        while end < size and buffer[end] & 0xC0 == 0x80:
            end += 1
        if buffer[begin:end].strip():
            yield begin, end
        begin = end


def _lines(buffer: mmap.mmap | bytes, path: Path) -> Iterator[tuple[int, int]]:
    begin, size = 0, len(buffer)
    while begin < size:
        end = buffer.find(b"\n", begin)
        end = size if end < 0 else end
        if end - begin > MAX_LINE_BYTES:
            raise InvalidArgument(
                f"{path.name} has a line of {end - begin:,} bytes; {MAX_LINE_BYTES:,} are allowed."
            )
        if buffer[begin:end].strip():
            yield begin, end
        begin = end + 1


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where} is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise InvalidArgument(f'{where} is no object; write {{"text": …, "label": …}} a line.')
    return fields


def _label_array(labels: list[Any], name: str) -> NDArray[Any]:
    kinds = {type(value) for value in labels}
    if str in kinds and len(kinds) > 1:
        row = next(row for row, value in enumerate(labels) if type(value) is not type(labels[0]))
        raise InvalidArgument(
            f"The label {name!r} is {labels[0]!r} at first and {labels[row]!r} in row {row}."
        )
    return np.array(labels)


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _whole(path: Path) -> str:
    return _decoded(path.read_bytes(), path, 0)


def _decoded(data: bytes, path: Path, begin: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{path.name} is no UTF-8 at byte {begin + error.start}; convert it (iconv -t utf-8)."
        ) from error
