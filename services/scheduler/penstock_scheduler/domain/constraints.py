"""Which nodes a replica may run on: labels that a node must have, taints that a replica bears."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Taint(NamedTuple):
    """Keeps replicas off a node that do not bear it."""

    key: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.value else self.key


class Toleration(NamedTuple):
    """Lets replicas on nodes with a taint: any with an empty key, any value of the key with an empty one."""

    key: str = ""
    value: str = ""

    def bears(self, taint: Taint) -> bool:
        """Whether it lets a replica on a node with this taint."""
        return not self.key or (self.key == taint.key and self.value in ("", taint.value))


@dataclass(frozen=True, slots=True)
class Constraints:
    """Where a replica may run.

    Attributes:
        node_selector: labels that a node must have with these values, sorted.
        tolerations: the taints that it bears.
    """

    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[Toleration, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.node_selector or self.tolerations)

    def unborne(self, taints: Iterable[Taint]) -> Taint | None:
        """The first taint that it does not bear."""
        return next((taint for taint in taints if not any(t.bears(taint) for t in self.tolerations)), None)


NO_CONSTRAINTS = Constraints()
"""Any node without taints."""
