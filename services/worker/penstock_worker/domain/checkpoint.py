"""Checkpoints in parts, one for each task of the group that wrote it: which one all tasks can go on from.

A part is on the disk of the node that wrote it, and some time later in the registry, too. A checkpoint can be
gone on from if each of its parts can be had from somewhere; parts of different writings never go together.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Writing:
    """One writing of one checkpoint.

    Attributes:
        step: Of the work.
        round: Tells the meetings of ranks apart: after a step back, the same step is written again.
        parts: How many it has.
    """

    step: int
    round: str
    parts: int


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What to go on from.

    Attributes:
        writing: Which checkpoint.
        sources: For each part the place (the number of a task in the group) that has it on its disk; -1 if
            none has, and it comes from the registry.
    """

    writing: Writing
    sources: tuple[int, ...]


Parts = Collection[tuple[Writing, int]]
"""Parts of checkpoints, each with its number."""


def newest(held: Sequence[Parts], stored: Parts = ()) -> Choice | None:
    """Choose the newest checkpoint of which every part can be had; of equals, what is nearer.

    Args:
        held: By place, the complete parts that are on its disk.
        stored: Those that the registry has.
    """
    places: defaultdict[Writing, dict[int, int]] = defaultdict(dict)
    for writing, part in stored:
        places[writing][part] = -1
    for place in reversed(range(len(held))):
        for writing, part in held[place]:
            places[writing][part] = place
    found = []
    for writing, where in places.items():
        sources = tuple(where.get(part, -2) for part in range(writing.parts))
        if writing.parts > 0 and -2 not in sources:
            near = sum(source >= 0 for source in sources)
            found.append((writing.step, near, writing.round, Choice(writing, sources)))
    return max(found, key=lambda each: each[:3])[3] if found else None
