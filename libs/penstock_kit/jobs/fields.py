"""Parameters by name with types, ranges and defaults, as they come in a `google.protobuf.Struct`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format, struct_pb2

from penstock_kit.errors import InvalidArgument, Reason


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter.

    Attributes:
        kind: integer, number, flag, choice, word, integers, numbers or names (lists), or mapping.
        default: What it is if nobody says; None where that is left to who uses it.
        help: What it does, for people.
        low: It, or each element, must not be below.
        high: It must not be above.
        above_low: It must not be equal to `low` either.
        below_high: It must not be equal to `high` either.
        choices: What a choice may be.
        length: A list has so many elements: (least, most).
    """

    kind: str
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    below_high: bool = False
    choices: tuple[str, ...] = ()
    length: tuple[int, int] = (0, 64)


def read_fields(
    where: str, known: Mapping[str, Field], given: Mapping[str, Any], field: str
) -> dict[str, Any]:
    """Return all parameters: those given in their own types, the others with their defaults.

    Args:
        where: What they belong to, for the message, such as "the optimizer sgd".
        known: The parameters that there are.
        given: Those that were said, as a Struct gives them (numbers are floats).
        field: Path of the field, for programs.

    Raises:
        InvalidArgument: One is unknown (the nearest is named), of another type or out of its range.
    """
    for name in given:
        if name not in known:
            words = nearest(name, known) if known else "; it has none."
            raise invalid(f"{where} has no parameter {name!r}{words}", field)
    return {
        name: _value(f"{where}: {name}", entry, given[name], field) if name in given else entry.default
        for name, entry in known.items()
    }


def values_of(parameters: struct_pb2.Struct, where: str, field: str) -> dict[str, Any]:
    """Return the parameters of a message by name; numbers are floats.

    Raises:
        InvalidArgument: One is NaN or infinite, which JSON does not have.
    """
    try:
        found: dict[str, Any] = json_format.MessageToDict(parameters)
    except ValueError as error:
        raise invalid(f"{where}: {error}", field) from error
    return found


def choose(what: str, word: str, known: Iterable[str], field: str) -> str:
    """Return `word` if it is one of the known names.

    Raises:
        InvalidArgument: It is not; the words name the nearest, or all.
    """
    names = tuple(known)
    if word not in names:
        raise invalid(f"There is no {what} {_shown(word)}{nearest(word, names)}", field)
    return word


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: the name that was probably meant, or all that there are."""
    names = sorted(known)
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)
    if not close:
        return f"; there are {', '.join(names)}."
    # Of those that share most letters, one with letters too many or too few, then the one of the same length:
    # letters are swapped more often than lost.
    best = min(close, key=lambda name: (not (name in word or word in name), abs(len(name) - len(word))))
    return f"; did you mean {by_lower[best]!r}?"


def invalid(message: str, field: str) -> InvalidArgument:
    """Return the error for a field of a job."""
    return InvalidArgument(message, reason=Reason.INVALID_REQUEST, metadata={"field": field})


def check_range(
    where: str, value: float, field: str, *, low: float = -math.inf, high: float = math.inf
) -> None:
    """Refuse a number that is not finite or outside [low, high].

    Raises:
        InvalidArgument: It is.
    """
    if not math.isfinite(value) or not low <= value <= high:
        raise invalid(f"{where} is {value:g}; it must be {_range(Field('number', 0, '', low, high))}.", field)


def _value(where: str, entry: Field, value: Any, field: str) -> Any:
    if entry.kind == "flag":
        if isinstance(value, bool):
            return value
        raise invalid(f"{where} is {value!r}; it must be true or false.", field)
    if entry.kind == "choice":
        if isinstance(value, str) and value in entry.choices:
            return value
        choices = ", ".join(entry.choices)
        raise invalid(f"{where} cannot be {_shown(value)}; it may be {choices}.", field)
    if entry.kind == "word":
        if isinstance(value, str):
            return value
        raise invalid(f"{where} is {_shown(value)}; it must be a word.", field)
    if entry.kind == "names":
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise invalid(f"{where} is {_shown(value)}; it must be a list of names.", field)
    if entry.kind == "mapping":
        if isinstance(value, Mapping):
            return dict(value)
        raise invalid(f"{where} is {_shown(value)}; it must be a mapping.", field)
    if entry.kind in {"integers", "numbers"}:
        least, most = entry.length
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            size = f"{least}" if least == most else f"{least} to {most}"
            raise invalid(f"{where} is {_shown(value)}; it must be a list of {size} numbers.", field)
        return tuple(_number(where, entry, item, field) for item in value)
    return _number(where, entry, value, field)


def _number(where: str, entry: Field, value: Any, field: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(f"{where} is {_shown(value)}; it must be a number.", field)
    whole = entry.kind in {"integer", "integers"}
    if whole and value != int(value):
        raise invalid(f"{where} is {value!r}; it must be a whole number.", field)
    below = value <= entry.low if entry.above_low else value < entry.low
    beyond = value >= entry.high if entry.below_high else value > entry.high
    if below or beyond:
        raise invalid(f"{where} is {value:g}; it must be {_range(entry)}.", field)
    return int(value) if whole else float(value)


def _range(entry: Field) -> str:
    words = []
    if entry.low > -math.inf:
        words.append(f"{'above' if entry.above_low else 'at least'} {entry.low:g}")
    if entry.high < math.inf:
        words.append(f"{'below' if entry.below_high else 'at most'} {entry.high:g}")
    return " and ".join(words) or "finite"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
