"""The weights of a subject, whatever it is, to be changed in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from penstock_worker.adapters.compression.subject import GraphWeights, Subject, Weight, weights_of


@contextmanager
def changed_weights(subject: Subject, chosen: Sequence[str], scratch: Path) -> Iterator[list[Weight]]:
    """Give the weights of a subject's layers; what is changed in them is kept.

    Args:
        subject: Its module is changed in place; of a graph a new file is written.
        chosen: Names of layers; empty means all.
        scratch: Where the new file goes.

    Raises:
        JobFailure: INVALID_RECIPE if there is no layer of a chosen name.
    """
    if subject.graph is None:
        yield weights_of(subject.need_module("clip"), chosen)
        return
    graph = GraphWeights(subject.graph)
    yield graph.weights(chosen)
    target = scratch / f"weights{subject.graph.suffix}"
    graph.store(target)
    subject.graph = target
