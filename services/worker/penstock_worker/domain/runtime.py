"""The small interface behind which every runtime stands.

A runtime is one class in one file, found by its entry point in the group `penstock.runtimes` under the name
that manifests give in `runtime`. It makes a `Servable` of a bundle; the replica process calls that from one
thread only, the one that loaded it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from penstock_kit.ensembles import Step
from penstock_kit.errors import PenstockError
from penstock_kit.oip import Array, Signature

COMPILED_FORMATS = frozenset({"aoti"})
"""Formats that are code for a processor, so that an operator must have allowed them."""

Batch: TypeAlias = Mapping[str, Array]
"""Tensors by name. BYTES tensors are arrays of Python `bytes` objects."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a version, on this machine and checked against their digest."""

    directory: Path
    """Where they are."""
    format: str
    """Format of the entrypoint: pt2, torchscript, onnx, skops, python …"""
    entrypoint: Path
    """The file that the runtime opens."""
    signature: Signature
    """What the model takes and gives."""
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Options of the runtime from the manifest, such as {"threads": "1"}."""
    steps: tuple[Step, ...] = ()
    """The graph of an ensemble; empty for what computes by itself."""
    max_rows: int = 1
    """Rows in one call of the model at most; 1 for one that does not batch."""

    @property
    def threads(self) -> int:
        """Processor threads that one call of the model may use: the parameter `threads`, else 1."""
        return max(1, int(self.parameters.get("threads", "1")))


class DeviceLost(BaseException):
    """A device is in a state that only the end of the process clears, such as a GPU after a failed assertion.

    No `Exception`: it is not one request's error. The process ends, and what it computed is computed
    elsewhere, alone, so that a request which does this to every device is found out.
    """


class Servable(Protocol):
    """A loaded model. Used by one thread."""

    def predict(self, batch: Batch) -> Batch:
        """Compute one batch.

        Args:
            batch: The inputs of the signature by name and in its order, without the optional ones that the
                request left out. Arrays may be read-only and share memory with the request.

        Returns:
            The outputs by name. They may share memory with the inputs, but not with what a later call
            writes to: they are read while the next batch is computed.

        Raises:
            Exception: Whatever the model raises. The message goes to the caller as MODEL_ERROR.
        """
        ...

    def close(self) -> None:
        """Let go of memory and files."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Mesh:
    """Where the rest of the mesh is, for models that call others."""

    redis_url: str
    """Where the queues are."""
    scheduler_address: str
    """Who knows the routes."""
    name: str
    """Name of this process, never used by another one: answers come to it."""


@dataclasses.dataclass(slots=True)
class Call:
    """One request to a model that works on many at once."""

    inputs: Batch
    """As `Servable.predict` gets them."""
    outputs: tuple[str, ...] | None
    """Outputs that the caller asks for; None for all."""
    deadline_unix_micros: int
    """When nobody waits any more."""
    priority: int
    """0 (high), 1 (normal) or 2 (low)."""
    traceparent: str
    """W3C trace context; empty when it is not traced."""
    depth: int
    """How many ensembles it has come through before."""
    done: Callable[[Batch | PenstockError], None]
    """Gets the outputs that were asked for, or the error; called once, on any thread, and must not block."""


@runtime_checkable
class ConcurrentServable(Protocol):
    """A loaded model that works on many requests at once, because it mostly waits for others.

    Its requests are not joined: each goes its own way.
    """

    limit: int
    """Requests that it works on at the same time."""

    def start(self, mesh: Mesh) -> None:
        """Find the rest of the mesh; return once requests can be answered.

        Raises:
            PenstockError: It cannot be used; the message says why.
        """
        ...

    def begin(self, calls: Sequence[Call], *, wait: bool = False) -> None:
        """Begin requests; each call's `done` gets its outcome.

        Args:
            calls: The requests.
            wait: Return only once all that can be done at first has been done, instead of at once.
        """
        ...

    def abandon(self, calls: Sequence[Call]) -> None:
        """Give up requests that nobody waits for any more; those that are not done get an error."""
        ...

    def close(self) -> None:
        """Let go of everything; what is not done gets an error."""
        ...


class Runtime(Protocol):
    """Makes servables of bundles."""

    formats: frozenset[str]
    """The formats it opens."""
    runs_bundle_code: bool
    """Whether loading or serving executes code of the bundle, so that an operator must have allowed it."""

    def load(self, bundle: Bundle, devices: Sequence[str]) -> Servable | ConcurrentServable:
        """Open a bundle.

        Args:
            bundle: What to open.
            devices: Devices it may use, as `gpu0`; empty for the CPU alone.

        Raises:
            PenstockError: It cannot be opened; the message says why.
            Exception: The library's own error, which is shown to the caller as it is.
        """
        ...
