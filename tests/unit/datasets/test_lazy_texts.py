"""Texts that are read when they are asked for look like a list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.datasets.laid_out import FlatTexts
from penstock.datasets.tables import TextColumn
from penstock.datasets.texts import FileTexts, MappedTexts

TEXTS = ["first", "", "zwei — три", "\N{SNOWMAN}", "last"]
ENCODED = [text.encode() for text in TEXTS]
ENDS = np.cumsum([len(each) for each in ENCODED])


def flat(_: Path) -> Sequence[str]:
    return FlatTexts(np.frombuffer(b"".join(ENCODED), np.uint8), ENDS)


def mapped(_: Path) -> Sequence[str]:
    places = [(0, end - len(each), end) for each, end in zip(ENCODED, ENDS, strict=True)]
    return MappedTexts([b"".join(ENCODED)], np.array(places))


def files(root: Path) -> Sequence[str]:
    paths = [root / f"{number}.txt" for number in range(len(TEXTS))]
    for path, content in zip(paths, ENCODED, strict=True):
        path.write_bytes(content)
    return FileTexts(paths)


def column(_: Path) -> Sequence[str]:
    return TextColumn(pa.chunked_array([TEXTS[:2], TEXTS[2:]]))


@pytest.mark.parametrize("make", [flat, mapped, files, column])
def test_they_are_indexed_and_sliced_as_a_list_is(
    make: Callable[[Path], Sequence[str]], tmp_path: Path
) -> None:
    texts = make(tmp_path)
    assert (len(texts), list(texts)) == (len(TEXTS), TEXTS)
    assert [texts[-1], texts[-5], texts[2]] == [TEXTS[-1], TEXTS[-5], TEXTS[2]]
    for rows in (slice(None), slice(1, 3), slice(9, None), slice(3, 1), slice(None, None, -2), slice(-2, 99)):
        assert texts[rows] == TEXTS[rows]
    for row in (5, -6):
        with pytest.raises(IndexError):
            texts[row]
