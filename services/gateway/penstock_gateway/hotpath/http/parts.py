"""Bodies that come in parts."""

from __future__ import annotations

# A bytes object costs about forty bytes beside its own: parts of one byte would cost forty times what
# they are counted as.
SMALL_BYTES = 256
_MOST_SMALL = 64


class Parts:
    """Parts of one body, in their order. Small ones are put together as they come."""

    __slots__ = ("_parts", "_small")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        # So many at the end are small.
        self._small = 0

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, part: bytes) -> None:
        """Take the next part."""
        if not part:
            return
        parts = self._parts
        parts.append(part)
        if len(part) >= SMALL_BYTES:
            self._small = 0
            return
        self._small += 1
        if self._small == _MOST_SMALL:
            self._small = 0
            parts[-_MOST_SMALL:] = [b"".join(parts[-_MOST_SMALL:])]

    def join(self) -> bytes:
        """Return all parts as one, and forget them."""
        parts, self._parts = self._parts, []
        self._small = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)
