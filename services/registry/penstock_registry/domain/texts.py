"""Rules of what people write: texts, keys, labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from penstock_kit.errors import InvalidArgument

MAX_ENTRIES = 256
MAX_TEXT = 16 * 1024

# Keys of labels, metrics and parameters: what a filter term can name.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/@:%+]{0,127}")

Empty: Mapping[str, Any] = MappingProxyType({})


def check_text(name: str, text: str, *, longest: int = MAX_TEXT) -> None:
    """Return if a text can be stored.

    Raises:
        InvalidArgument: It is too long, or has a NUL, which Postgres cannot store.
    """
    if len(text) > longest or "\x00" in text:
        raise InvalidArgument(f"{name} is longer than {longest} characters, or has a NUL in it.")


def check_labels(labels: Mapping[str, str]) -> None:
    """Return if the labels can be stored and filtered by.

    Raises:
        InvalidArgument: They cannot.
    """
    check_texts("labels", labels, longest=1024)


def check_texts(where: str, texts: Mapping[str, str], *, longest: int = MAX_TEXT) -> None:
    """Return if keys and texts can be stored, and found by a filter.

    Raises:
        InvalidArgument: They cannot.
    """
    check_keys(where, texts)
    for key, value in texts.items():
        check_text(f"{where}[{key!r}]", value, longest=longest)


def check_keys(where: str, keys: Iterable[str]) -> None:
    """Return if there are not too many keys, and a filter can name each.

    Raises:
        InvalidArgument: There are, or one cannot be named.
    """
    for count, key in enumerate(keys, start=1):
        if count > MAX_ENTRIES:
            raise InvalidArgument(f"{where} has more than {MAX_ENTRIES} entries.")
        if not _KEY.fullmatch(key):
            raise InvalidArgument(
                f"{where} has the key {key[:80]!r}; keys are 1 to 128 letters, digits and '_.-/@:%+', "
                "a letter, digit or '_' first."
            )
