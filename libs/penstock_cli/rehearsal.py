"""Traffic for a canary that nobody calls yet: rows of the model's own kind, sent while its guards look."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from penstock import Client
from penstock.errors import PenstockError
from penstock.oip.v2 import inference_pb2 as oip

_CALLERS = 4
_ROWS = 2
_LENGTH = 16
"""Of a dimension that may have any length, such as that of a text."""
_LARGEST_INTEGER = 32
"""Small enough for the number of any token or class."""
_PAUSE_SECONDS = 0.01
_JOIN_SECONDS = 10.0


class Rehearsal:
    """Calls a deployment from a few threads for as long as it is entered.

    Args:
        client: To the mesh.
        deployment: Who is called.
        rows: What is sent, by input; without any, rows that are drawn from the signature.
    """

    def __init__(self, client: Client, deployment: str, rows: dict[str, Any] | None = None) -> None:
        self._client = client
        self._deployment = deployment
        self._rows = rows
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.answered = 0
        self.failed = 0
        self._threads = [threading.Thread(target=self._call, args=(n,), daemon=True) for n in range(_CALLERS)]

    def __enter__(self) -> Rehearsal:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _call(self, number: int) -> None:
        dice = np.random.default_rng(number)
        source = self._given(dice) if self._rows else self._drawn(dice)
        while not self._over.wait(_PAUSE_SECONDS):
            try:
                self._client.predict(self._deployment, next(source), timeout=10.0)
            except PenstockError:
                with self._lock:
                    self.failed += 1
            else:
                with self._lock:
                    self.answered += 1

    def _given(self, dice: np.random.Generator) -> Iterator[dict[str, Any]]:
        rows = self._rows or {}
        count = min(len(values) for values in rows.values())
        while True:
            chosen = dice.integers(0, count, _ROWS)
            yield {name: np.asarray(values)[chosen] for name, values in rows.items()}

    def _drawn(self, dice: np.random.Generator) -> Iterator[dict[str, Any]]:
        inputs = self._client.get_metadata(self._deployment).inputs
        while True:
            yield {each.name: draw(each, dice) for each in inputs}


@contextmanager
def no_rehearsal() -> Iterator[None]:
    """Call nobody."""
    yield


def draw(tensor: oip.ModelMetadataResponse.TensorMetadata, dice: np.random.Generator) -> Any:
    """Return random values for an input; a first dimension of any length is that of rows."""
    shape = [
        size if size > 0 else _ROWS if place == 0 else _LENGTH for place, size in enumerate(tensor.shape)
    ]
    if tensor.datatype == "BYTES":
        return np.full(shape, b"penstock", dtype=object)
    if tensor.datatype == "BOOL":
        return dice.integers(0, 2, shape).astype(bool)
    if tensor.datatype.startswith(("INT", "UINT")):
        return dice.integers(0, _LARGEST_INTEGER, shape).astype(tensor.datatype.lower())
    kinds = {"FP64": np.float64, "FP16": np.float16}
    return dice.standard_normal(shape).astype(kinds.get(tensor.datatype, np.float32))
