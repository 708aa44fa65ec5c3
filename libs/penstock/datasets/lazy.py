"""Texts that are decoded when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload


class LazyTexts(Sequence[str], ABC):
    """A sequence of texts of which none is kept."""

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        places = range(len(self))[row]
        return self._read_all(places) if isinstance(places, range) else self._read(places)

    @abstractmethod
    def _read(self, place: int) -> str:
        """Return the text at a place from 0."""

    def _read_all(self, places: range) -> list[str]:
        """Return several; a class may know a faster way."""
        return [self._read(place) for place in places]
