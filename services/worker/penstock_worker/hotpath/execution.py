"""One call of the model for many requests: join, compute, check, split.

A request that makes the model fail must not take its neighbours along: when a joined batch fails, its
requests are computed one by one, and only the culprit gets the error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from penstock_kit.errors import DeadlineExceeded, Internal, PenstockError, Reason, ResourceExhausted
from penstock_kit.oip import BFLOAT16, Array, InferRequest, Signature, TensorSpec, name_of
from penstock_kit.queue.messages import Request
from penstock_worker.domain.runtime import Batch, Servable

_MESSAGE_LENGTH = 2000
# Dimensions up to 8 are padded to one another whatever they are.
_SHORT_BITS = 3
# Numbers and booleans of numpy's own, whose bytes may be read as they are.
_PLAIN_KINDS = frozenset("biuf")
# Not all of BaseException: a signal may end the replica while a model warms up. SIGINT is ignored there.
_RAISED_BY_MODELS = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)


class ModelError(Internal):
    """The model raised an error, or gave what its signature does not say.

    Args:
        message: What happened.
        raised: Whether the model itself raised it.
    """

    default_reason = Reason.MODEL_ERROR

    def __init__(self, message: str, *, raised: bool = False) -> None:
        super().__init__(message)
        self.raised = raised


_Axes = dict[int, tuple[str, int]]
"""Axis of an output → the input, and its axis, that it is as long as."""


@dataclasses.dataclass(slots=True)
class Work:
    """A decoded request on its way through the replica. Times are nanoseconds of `time.time_ns`."""

    request: Request
    infer: InferRequest
    decode_ns: int
    started_ns: int
    """When decoding began: the end of its time in the queue."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of a request. Durations in nanoseconds, of the whole call that it was part of."""

    request: Request
    infer: InferRequest | None
    result: Batch | PenstockError
    started_ns: int
    input_ns: int = 0
    compute_ns: int = 0


@dataclasses.dataclass(slots=True)
class Call:
    """One call of the model, for statistics. Durations in nanoseconds."""

    rows: int
    input_ns: int
    compute_ns: int


class Executor:
    """Computes batches on one loaded model. Used by one thread.

    Args:
        servable: The model.
        signature: What it takes and gives.
        max_rows: Rows in one call at most; 1 for a model that does not batch.
        pad: Whether inputs of different lengths are joined, shorter ones filled with zeros.
    """

    def __init__(self, servable: Servable, signature: Signature, *, max_rows: int, pad: bool) -> None:
        self._servable = servable
        self._outputs = signature.outputs
        self._batched = signature.batched
        self._pad = pad and any(-1 in spec.shape[1:] for spec in signature.inputs)
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self.max_rows = max_rows
        self.calls: list[Call] = []
        """Calls made since the caller last emptied this list."""

    def key(self, infer: InferRequest) -> Hashable:
        """Return what is equal for requests that one call can compute; None if it must be alone."""
        if self.max_rows == 1:
            return None
        inputs = infer.inputs
        if self._pad:
            return tuple([(name, bucket_of(array.shape[1:])) for name, array in inputs.items()])
        if len(inputs) == 1:
            (array,) = inputs.values()
            return array.shape[1:]
        return tuple([(name, array.shape[1:]) for name, array in inputs.items()])

    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        """Compute requests of one key; those past their deadline are dropped first.

        Never raises for what the model does: each request has its own outcome, in the order given.
        """
        start = time.time_ns()
        now = start // 1000
        outcomes: list[Outcome] = []
        alive: list[Work] = []
        for work in batch:
            if work.request.header.deadline_unix_micros <= now:
                outcomes.append(expired(work.request, work.started_ns))
            else:
                alive.append(work)
        if alive:
            outcomes += self._run(alive, start)
        return outcomes

    def _run(self, batch: Sequence[Work], start: int) -> list[Outcome]:
        decode_ns = sum([work.decode_ns for work in batch])
        rows = sum([work.infer.rows for work in batch])
        try:
            inputs = _aligned(batch[0].infer.inputs) if len(batch) == 1 else self._join(batch)
            joined = time.time_ns()
            input_ns = decode_ns + joined - start
            outputs = self._compute(inputs, rows, input_ns)
        except PenstockError as error:
            if len(batch) > 1:
                # Through `run`: the failure, and each of those before, took time that others may not have.
                return [outcome for work in batch for outcome in self.run([work])]
            work = batch[0]
            return [Outcome(work.request, work.infer, error, work.started_ns, decode_ns)]
        compute_ns = time.time_ns() - joined
        outcomes = []
        cuts = self._cuts(batch, inputs, outputs) if self._pad and len(batch) > 1 else {}
        at = 0
        for work in batch:
            infer = work.infer
            if len(batch) == 1:
                result: Batch = outputs
            else:
                end = at + infer.rows
                result = {name: array[at:end] for name, array in outputs.items()}
                for name, axes in cuts.items():
                    cut = [slice(None)] * outputs[name].ndim
                    for axis, (source, source_axis) in axes.items():
                        cut[axis] = slice(infer.inputs[source].shape[source_axis])
                    result[name] = result[name][tuple(cut)]
                at = end
            outcomes.append(Outcome(work.request, infer, result, work.started_ns, input_ns, compute_ns))
        return outcomes

    def _cuts(self, batch: Sequence[Work], inputs: Batch, outputs: Batch) -> dict[str, _Axes]:
        """Return which axes of outputs grew with the padding of inputs, and with which axis of which input.

        Those are the variable ones that are as long as an input was made; of several inputs of that length,
        one that has it on the same axis.
        """
        lengths: dict[int, list[tuple[str, int]]] = {}
        for name, array in inputs.items():
            for axis in _variable(self._inputs[name]):
                if any(work.infer.inputs[name].shape[axis] != array.shape[axis] for work in batch):
                    lengths.setdefault(array.shape[axis], []).append((name, axis))
        cuts: dict[str, _Axes] = {}
        for spec in self._outputs if lengths else ():
            for axis in _variable(spec):
                sources = lengths.get(outputs[spec.name].shape[axis])
                if sources:
                    same = [source for source in sources if source[1] == axis]
                    cuts.setdefault(spec.name, {})[axis] = (same or sources)[0]
        return cuts

    def _compute(self, inputs: Batch, rows: int, input_ns: int) -> Batch:
        if rows <= self.max_rows or not self._batched:
            return self._counted(inputs, rows, input_ns)
        # A request larger than a batch is answered all the same, in pieces.
        pieces = []
        for at in range(0, rows, self.max_rows):
            size = min(self.max_rows, rows - at)
            piece = {name: array[at : at + size] for name, array in inputs.items()}
            pieces.append(self._counted(piece, size, 0 if at else input_ns))
        try:
            return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        except ValueError as error:
            raise ModelError(
                f"The model's answers to parts of a request do not fit together: {error}."
            ) from error

    def _counted(self, inputs: Batch, rows: int, input_ns: int) -> Batch:
        start = time.perf_counter_ns()
        outputs = self.call(inputs, rows)
        self.calls.append(Call(rows, input_ns, time.perf_counter_ns() - start))
        return outputs

    def call(self, inputs: Batch, rows: int) -> Batch:
        """Call the model once and check what it gives.

        Returns:
            The signature's outputs in its order and datatypes.

        Raises:
            PenstockError: What the model raised, if it is of that tree.
            ModelError: The model raised something else, or its outputs differ from the signature.
        """
        try:
            given = self._servable.predict(inputs)
        except PenstockError:
            raise
        except _RAISED_BY_MODELS as error:
            words = f"The model raised {type(error).__name__}: {error}"
            raise ModelError(words[:_MESSAGE_LENGTH], raised=True) from error
        return {spec.name: check_output(spec, given, rows if self._batched else 0) for spec in self._outputs}

    def close(self) -> None:
        """Let go of the model."""
        self._servable.close()

    def _join(self, batch: Sequence[Work]) -> dict[str, Array]:
        join = _pad if self._pad else _joined
        try:
            return {name: join([work.infer.inputs[name] for work in batch]) for name in batch[0].infer.inputs}
        except (MemoryError, ValueError) as error:
            # One long request makes all others as long: alone they may fit.
            raise ResourceExhausted("The joined requests do not fit into memory; send fewer rows.") from error


def check_output(spec: TensorSpec, given: Mapping[str, Any], rows: int) -> Array:
    """Return an output in the signature's datatype, of those that a model gave.

    Args:
        spec: What the signature says of it.
        given: All that the model gave.
        rows: How many rows it must have; 0 if its first dimension is no batch.

    Raises:
        ModelError: It is missing, or differs from the signature in more than its precision.
    """
    array = given.get(spec.name)
    if array is None:
        raise ModelError(
            f"The model gave no output {spec.name}; it gave {', '.join(map(str, given)) or 'nothing'}."
        )
    if array.dtype != spec.dtype or array.dtype == object:
        array = _cast(spec, array)
    shape = array.shape
    if len(shape) == len(spec.shape):
        for want, size in zip(spec.shape, shape, strict=True):
            if want != size and want >= 0:
                break
        else:
            if not rows or shape[0] == rows:
                return cast("Array", array)
            raise ModelError(
                f"The model gave {shape[0]} rows of the output {spec.name} for {rows} rows of input."
            )
    raise ModelError(
        f"The model gave the output {spec.name} in the shape {list(shape)}; "
        f"its signature says {list(spec.shape)}."
    )


def _aligned(inputs: dict[str, Array]) -> dict[str, Array]:
    """Return tensors that lie where compiled code expects numbers to lie; views of a message may not."""
    for name, array in inputs.items():
        if not array.flags.aligned:
            inputs[name] = array.copy()
    return inputs


def expired(request: Request, started_ns: int) -> Outcome:
    """Return the outcome of a request that nobody waits for any more."""
    error = DeadlineExceeded(
        "The deadline passed while the request was queued; allow more time, or add replicas."
    )
    return Outcome(request, None, error, started_ns)


def late(work: Work) -> Outcome:
    """Return the outcome of a request whose deadline would pass while it is computed."""
    error = DeadlineExceeded(
        "The deadline would pass before the answer is computed; allow more time, or add replicas."
    )
    return Outcome(work.request, None, error, work.started_ns)


def bucket_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return what is equal for shapes that are padded to one another.

    By dimension they differ by less than twice, or are both short: padding costs computing.
    """
    return tuple([max(_SHORT_BITS, (size - 1).bit_length()) for size in shape])


def _variable(spec: TensorSpec) -> list[int]:
    return [axis for axis, size in enumerate(spec.shape) if axis and size < 0]


def _joined(arrays: Sequence[Array]) -> Array:
    """Join arrays along their first dimension.

    numpy lets other threads have the interpreter at each array that it copies, and waits to have it back:
    32 rows of 4 KiB took 0.3 to 1.3 ms beside a busy reader, where one piece of bytes takes 0.04.
    """
    first, rows = arrays[0], sum([len(array) for array in arrays])
    trailing, dtype = first.shape[1:], first.dtype
    if dtype.kind not in _PLAIN_KINDS or any(
        array.dtype != dtype or array.shape[1:] != trailing or not array.flags.c_contiguous
        for array in arrays
    ):
        return np.concatenate(arrays)
    return np.ndarray((rows, *trailing), dtype, bytearray().join(cast("Sequence[memoryview]", arrays)))


def _pad(arrays: Sequence[Array]) -> Array:
    sizes = {array.shape[1:] for array in arrays}
    if len(sizes) == 1:
        return _joined(arrays)
    shape = (sum(len(array) for array in arrays), *map(max, *sizes))
    joined = (
        np.full(shape, b"", dtype=object) if arrays[0].dtype == object else np.zeros(shape, arrays[0].dtype)
    )
    at = 0
    for array in arrays:
        joined[(slice(at, at + len(array)), *map(slice, array.shape[1:]))] = array
        at += len(array)
    return joined


def _cast(spec: TensorSpec, array: Array) -> Array:
    """Return an output in the signature's datatype; only its precision may change, not its kind."""
    if spec.datatype == "BYTES":
        if array.dtype.kind in "OSU":
            return _bytes(spec, array)
    elif array.dtype == BFLOAT16 or spec.datatype == "BF16":
        if array.dtype.kind in "fV" and name_of(array.dtype):
            return array.astype(spec.dtype)
    elif np.can_cast(array.dtype, spec.dtype, casting="same_kind"):
        return array.astype(spec.dtype)
    raise ModelError(
        f"The model gave the output {spec.name} as {name_of(array.dtype) or array.dtype}; "
        f"its signature says {spec.datatype}."
    )


def _bytes(spec: TensorSpec, array: Array) -> Array:
    elements = array.ravel().tolist()
    found = np.empty(len(elements), dtype=object)
    for index, element in enumerate(elements):
        if isinstance(element, str):
            element = element.encode()
        if not isinstance(element, bytes):
            raise ModelError(
                f"The model gave a {type(element).__name__} as element of the output {spec.name}, "
                "whose datatype is BYTES."
            )
        found[index] = element
    return found.reshape(array.shape)
