"""What the texts of options mean: sizes, KEY=VALUE, shares of traffic."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from google.protobuf import duration_pb2

from penstock.errors import InvalidArgument

# Powers of ten and of two, as people write them.
_PREFIXES = "kmgt"
_UNITS: dict[str, int] = {
    "": 1,
    **{prefix: 1000**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}i": 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_SECONDS = 10 * 365 * 86400.0


def byte_count(option: str, text: str) -> int:
    """Return the bytes that `64MiB`, `64MB`, `1.5GiB` or `65536` means.

    Raises:
        InvalidArgument: It is not of that form.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) *([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        raise InvalidArgument(f"{option} {text}: write a size such as 64MiB, 500MB or 65536.")
    return round(float(match[1]) * _UNITS[match[2] or ""])


def seconds(option: str, text: str) -> float:
    """Return the seconds that `50ms`, `60s`, `5m`, `1.5h`, `2d` or `60` means.

    Raises:
        InvalidArgument: It is not of that form.
    """
    match = re.fullmatch(r"(-?\d{1,12}(?:\.\d{1,9})?) *(ms|s|m|h|d)?", text.strip().lower())
    if match is None:
        raise InvalidArgument(f"{option} {text}: write a time such as 50ms, 60s or 5m.")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def duration(option: str, text: str) -> duration_pb2.Duration:
    """Return a time as the contract has it.

    Raises:
        InvalidArgument: It is not of the form of `seconds`, not above 0, or longer than ten years.
    """
    length = seconds(option, text)
    if not 0 < length <= _LONGEST_SECONDS:
        raise InvalidArgument(f"{option} {text}: it must be longer than 0 s, and ten years at most.")
    found = duration_pb2.Duration()
    found.FromNanoseconds(round(length * 1e9))
    return found


def taints(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Return KEY[=VALUE] texts as a dict; without a value it is empty.

    Raises:
        InvalidArgument: A key is empty or given twice.
    """
    return words(option, [text if "=" in text else f"{text}=" for text in texts])


def words(option: str, texts: Iterable[str] | None) -> dict[str, str]:
    """Return KEY=VALUE texts as a dict.

    Raises:
        InvalidArgument: One is not of that form, or a key is given twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"{option} {text}: write it as KEY=VALUE.")
        if key in found:
            raise InvalidArgument(f"{option} gives {key} twice.")
        found[key] = value
    return found


def numbers(option: str, texts: Sequence[str] | None) -> dict[str, float]:
    """Return KEY=NUMBER texts as a dict.

    Raises:
        InvalidArgument: One is not of that form, or not a finite number.
    """
    found = {}
    for key, value in words(option, texts).items():
        try:
            found[key] = float(value)
        except ValueError as error:
            raise InvalidArgument(f"{option} {key}={value}: {value!r} is not a number.") from error
        if not math.isfinite(found[key]):
            raise InvalidArgument(f"{option} {key}={value}: give a finite number.")
    return found


def shares(texts: Sequence[str]) -> dict[str | int, int]:
    """Return what `1=90,2=10` (or `v1=90 v2=10`, or `champion=100`) means.

    Raises:
        InvalidArgument: It is not of that form.
    """
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    found: dict[str | int, int] = {}
    for part in parts:
        selector, _, share = part.partition("=")
        if not selector or not share:
            raise InvalidArgument(f"traffic {part}: write it as VERSION=PER_CENT, such as 1=90.")
        if selector in found:
            raise InvalidArgument(f"traffic gives version {selector} twice.")
        try:
            found[selector] = int(share.removesuffix("%"))
        except ValueError as error:
            raise InvalidArgument(
                f"traffic {selector}={share}: give whole per cent, such as {selector}=90."
            ) from error
    return found
