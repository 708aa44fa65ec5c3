"""A bundle, opened in this process by the code that opens it in a replica."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from google.protobuf import json_format

from penstock.registry.v1 import manifest_pb2
from penstock_kit.errors import PenstockError
from penstock_kit.oip import Array, Signature
from penstock_worker.domain.replica import BatchingPolicy, ReplicaConfig
from penstock_worker.domain.runtime import Batch
from penstock_worker.hotpath.execution import Executor, ModelError
from penstock_worker.hotpath.loading import LoadedConcurrent, load
from penstock_worker.usecases.job_context import JobFailure

# Rows in one call of a version whose manifest does not say how many it takes: it does not batch.
_ALONE = 1


class OpenedVersion:
    """A loaded version. Used by one thread, the one that opened it; close it, or use it in `with`.

    Attributes:
        name: What to call it in words.
        directory: Where the files of the bundle are.
        manifest: What the version is.
        signature: What it takes and gives.
        max_rows: Rows in one call at most.
        load_seconds: From its files to the end of the warm-up, in this process.
        size_bytes: Of the files of the bundle, all together.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        manifest: manifest_pb2.Manifest,
        executor: Executor,
        signature: Signature,
        load_seconds: float,
    ) -> None:
        self.name = name
        self.directory = directory
        self.manifest = manifest
        self.signature = signature
        self.max_rows = executor.max_rows
        self.load_seconds = load_seconds
        self.size_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        self._executor: Executor | None = executor
        self._threads = max(1, int(manifest.parameters.get("threads", "1")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def batched(self) -> bool:
        """Whether the first dimension of every tensor is the batch."""
        return self.signature.batched

    def predict(self, inputs: Batch) -> dict[str, Array]:
        """Compute rows as a replica does: what is more than one call takes goes in several.

        Args:
            inputs: The inputs of the signature by name. BYTES tensors are arrays of `bytes`.

        Returns:
            The outputs of the signature in its datatypes.

        Raises:
            ModelError: The model raised an error, or gave what its signature does not say.
            PenstockError: What the runtime raised.
        """
        rows = rows_of(inputs) if self.batched else 1
        if rows <= self.max_rows or not self.batched:
            return dict(self.call(inputs, rows))
        pieces = [
            self.call(
                {name: array[at : at + self.max_rows] for name, array in inputs.items()},
                min(self.max_rows, rows - at),
            )
            for at in range(0, rows, self.max_rows)
        ]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def call(self, inputs: Batch, rows: int) -> Batch:
        """Call the model once, with `rows` rows that fit one call."""
        if self._executor is None:
            raise RuntimeError(f"{self.name} is closed.")
        return self._executor.call(inputs, rows)

    def take_turn(self) -> None:
        """Give the process the settings of this version: torch's threads are one number for all models."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def close(self) -> None:
        """Let go of the model."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None


def open_version(
    directory: Path,
    manifest: manifest_pb2.Manifest,
    *,
    name: str = "the version",
    devices: Sequence[str] = ("cpu",),
    threads: int = 0,
    max_rows: int = 0,
    allow_python_runtime: bool = False,
    allow_compiled_models: bool = False,
) -> OpenedVersion:
    """Open a bundle and warm it up, as a replica does.

    Args:
        directory: The files.
        manifest: What they are; is not changed.
        name: What to call it in words, such as models/digits/versions/3.
        devices: As torch calls them ("cpu", "cuda:0"); the first one is used.
        threads: Processor threads of one call; 0 leaves it to the manifest's parameter `threads`, else 1.
        max_rows: Rows in one call at most; 0 leaves it to the manifest.
        allow_python_runtime: Whether an operator allowed code of bundles.
        allow_compiled_models: Whether an operator allowed compiled code of bundles.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be opened or measured; the message says why.
    """
    described = manifest_pb2.Manifest()
    described.CopyFrom(manifest)
    if threads:
        described.parameters["threads"] = str(threads)
    config = ReplicaConfig(
        replica="measured",
        consumer="measured",
        queue="measured",
        redis_url="",
        bundle_dir=str(directory),
        manifest=json_format.MessageToJson(described),
        model="measured",
        version=1,
        batching=BatchingPolicy(
            max_batch_size=max_rows,
            pad_variable_dimensions=described.batching.pad_variable_dimensions,
        ),
        devices=tuple(device.replace("cuda:", "gpu") for device in devices if device.startswith("cuda")),
        allow_python_runtime=allow_python_runtime,
        allow_compiled_models=allow_compiled_models,
    )
    start = time.perf_counter()
    try:
        loaded = load(config)
    except PenstockError as error:
        raise JobFailure(f"{name} cannot be opened: {error.message}", "UNSUPPORTED") from error
    seconds = time.perf_counter() - start
    if isinstance(loaded, LoadedConcurrent):
        raise JobFailure(
            f"{name} is an ensemble, which computes nothing itself; measure and convert its models.",
            "UNSUPPORTED",
        )
    return OpenedVersion(name, directory, described, loaded.executor, loaded.signature, seconds)


def rows_of(inputs: Batch) -> int:
    """Return how many rows the inputs have: the first dimension of the first of them."""
    first = next(iter(inputs.values()))
    return len(first) if first.ndim else _ALONE


__all__ = ["ModelError", "OpenedVersion", "open_version", "rows_of"]
