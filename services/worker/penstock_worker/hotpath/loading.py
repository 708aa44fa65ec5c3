"""From a bundle to a model that is warm."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import time
from pathlib import Path

import numpy as np
from google.protobuf import json_format

from penstock.registry.v1 import manifest_pb2
from penstock_kit.ensembles import steps_from_proto
from penstock_kit.errors import FailedPrecondition, PenstockError, Reason
from penstock_kit.oip import Array, Signature, TensorSpec, signature_from_proto
from penstock_worker.domain.replica import ReplicaConfig
from penstock_worker.domain.runtime import COMPILED_FORMATS, Bundle, ConcurrentServable, Runtime
from penstock_worker.hotpath.execution import Executor, ModelError

log = logging.getLogger(__name__)

RUNTIMES = "penstock.runtimes"
# A second warm-up run tells the time of a warm call; after a first one this slow nobody needs to know.
_SLOW_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to serve."""

    executor: Executor
    signature: Signature
    seconds_of_one: float
    """Time of a call with one row."""
    seconds_of_max: float
    """Time of a call with as many rows as allowed."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedConcurrent:
    """A model that works on many requests at once; it has not been started."""

    servable: ConcurrentServable
    signature: Signature


def load(config: ReplicaConfig) -> Loaded | LoadedConcurrent:
    """Open the bundle with its runtime and run it on zeros.

    Raises:
        PenstockError: It cannot be served; the message says why.
    """
    manifest = json_format.Parse(config.manifest, manifest_pb2.Manifest(), ignore_unknown_fields=True)
    runtime = _find(manifest.runtime)
    if runtime.runs_bundle_code and not config.allow_python_runtime:
        raise FailedPrecondition(
            f"The runtime {manifest.runtime} runs code of the bundle, which this server does not allow. "
            "Convert the model (torch.export, ONNX, skops), or have an operator set "
            "PENSTOCK_ALLOW_PYTHON_RUNTIME.",
            reason=Reason.UNSAFE_FORMAT,
        )
    if manifest.format not in runtime.formats:
        raise FailedPrecondition(
            f"The runtime {manifest.runtime} opens {', '.join(sorted(runtime.formats))}, "
            f"not {manifest.format or 'an unnamed format'}.",
            reason=Reason.UNKNOWN_RUNTIME,
        )
    if manifest.format in COMPILED_FORMATS and not config.allow_compiled_models:
        raise FailedPrecondition(
            f"The format {manifest.format} is compiled code, which this server does not allow. Deploy the "
            "version that it was converted from, or have an operator set PENSTOCK_ALLOW_COMPILED_MODELS.",
            reason=Reason.UNSAFE_FORMAT,
        )
    signature = signature_from_proto(manifest.signature, batched=manifest.batching.max_batch_size > 0)
    directory = Path(config.bundle_dir)
    entrypoint = directory / manifest.entrypoint
    if not entrypoint.resolve().is_relative_to(directory.resolve()) or not entrypoint.exists():
        raise FailedPrecondition(
            f"The bundle has no {manifest.entrypoint}, which its manifest names as entrypoint.",
            reason=Reason.MANIFEST_MISMATCH,
        )
    steps = steps_from_proto(manifest.ensemble)
    max_rows = rows_per_call(signature, config.batching.max_batch_size, manifest.batching.max_batch_size)
    parameters = dict(manifest.parameters)
    bundle = Bundle(directory, manifest.format, entrypoint, signature, parameters, steps, max_rows)
    try:
        servable = runtime.load(bundle, config.devices)
    except PenstockError:
        raise
    except Exception as error:
        log.exception("loading failed")
        raise FailedPrecondition(
            f"The {manifest.runtime} runtime could not load {manifest.entrypoint}: "
            f"{type(error).__name__}: {_first_lines(error)}",
            reason=Reason.LOAD_FAILED,
        ) from error
    if isinstance(servable, ConcurrentServable):
        return LoadedConcurrent(servable, signature)
    executor = Executor(
        servable,
        signature,
        max_rows=max_rows,
        pad=config.batching.pad_variable_dimensions,
    )
    if manifest.parameters.get("warmup") == "off":
        return Loaded(executor, signature, 0.0, 0.0)
    return Loaded(executor, signature, *_warm_up(executor, signature))


def rows_per_call(signature: Signature, deployed: int, described: int) -> int:
    """Return how many rows one call of the model may have.

    Args:
        signature: The model's.
        deployed: `max_batch_size` of the deployment; 0 leaves it to the manifest.
        described: `max_batch_size` of the manifest.
    """
    return max(1, deployed or described) if signature.batched else 1


def zeros(spec: TensorSpec, rows: int, *, batched: bool) -> Array:
    """Return an input of zeros (empty strings) that fits a signature, with 1 for what has any size."""
    shape = tuple(max(1, size) if size < 0 else size for size in spec.shape)
    if batched:
        shape = (rows, *shape[1:])
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=object)
    return np.zeros(shape, dtype=spec.dtype)


def _find(name: str) -> Runtime:
    found = importlib.metadata.entry_points(group=RUNTIMES)
    for entry in found:
        if entry.name == name:
            try:
                made: Runtime = entry.load()()
            except ImportError as error:
                raise FailedPrecondition(
                    f"The runtime {name} cannot be used here: {error}. Install the extra penstock[{name}].",
                    reason=Reason.UNKNOWN_RUNTIME,
                ) from error
            return made
    raise FailedPrecondition(
        f"There is no runtime {name!r}; there are {', '.join(sorted(found.names)) or 'none'}.",
        reason=Reason.UNKNOWN_RUNTIME,
    )


def _warm_up(executor: Executor, signature: Signature) -> tuple[float, float]:
    # Where a size or a text is anybody's guess, a model may rightly refuse ours.
    guessed = any(
        spec.datatype == "BYTES" or -1 in spec.shape[1 if signature.batched else 0 :]
        for spec in signature.inputs
    )
    seconds = [0.0, 0.0]
    for index, rows in enumerate((1, executor.max_rows)):
        if index and rows == 1:
            seconds[1] = seconds[0]
            break
        batch = {spec.name: zeros(spec, rows, batched=signature.batched) for spec in signature.inputs}
        for _ in range(2):
            start = time.perf_counter()
            try:
                executor.call(batch, rows)
            except ModelError as error:
                if guessed and error.raised:
                    log.warning("warm-up refused", extra={"rows": rows, "error": error.message})
                    return 0.0, 0.0
                raise FailedPrecondition(
                    f"The warm-up run with {rows} row{'s' if rows > 1 else ''} failed: {error.message}",
                    reason=Reason.LOAD_FAILED,
                ) from error
            seconds[index] = time.perf_counter() - start
            if seconds[index] > _SLOW_SECONDS:
                break
    return seconds[0], seconds[1]


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).splitlines()[:5])[:1000]
