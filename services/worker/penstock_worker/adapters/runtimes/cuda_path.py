"""One batch's way through a GPU: page-locked memory, copy and compute streams, graphs of fixed sizes.

    begin    request's bytes ─copy→ page-locked ─copy stream→ device ─compute stream→ model or graph
             ─compute stream→ page-locked, event
    finish   wait for the event (without the interpreter lock) ─copy→ the answer's own memory

Two batches may be between `begin` and `finish`, so that the second is copied to the device while the first is
computed. All that only CUDA can do is behind `Streams`; what is decided here is the same without it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import torch

from penstock_kit.errors import FailedPrecondition, Reason
from penstock_kit.oip import BFLOAT16, Array, Signature
from penstock_worker.domain.runtime import Batch, Bundle, DeviceLost

log = logging.getLogger(__name__)

Compute = Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]
"""Runs the model: inputs in the signature's order → outputs by name."""

# Batches between `begin` and `finish`: one that is computed and one that is copied.
_SLOTS = 2
# Of page-locked memory, which nobody else on the machine can use, for one model.
_PINNED_BYTES = 256 * 1024**2
# What a model may raise; a capture that fails is no reason not to serve.
_RAISED_BY_MODELS = (Exception, SystemExit)
# How far the replay of a graph may be from the model itself, of its largest output.
_TOLERANCE = 1e-3


class GraphMode(StrEnum):
    """Which batches are computed by graphs: the parameter `cuda_graphs`."""

    OFF = "off"
    """None."""
    EXACT = "exact"
    """Those that have as many rows as a graph."""
    PAD = "pad"
    """Also smaller ones, with rows of zeros added and cut off again. For models whose rows do not meet."""


def mode_of(bundle: Bundle) -> GraphMode:
    """Return which graphs a bundle asks for.

    Programs of torch.export are functions of their inputs, and get them. TorchScript may keep state that a
    replay would not change, and gets them only on request.

    Raises:
        FailedPrecondition: LOAD_FAILED if there is no such mode.
    """
    word = bundle.parameters.get("cuda_graphs")
    if word is None:
        return GraphMode.EXACT if bundle.format == "pt2" else GraphMode.OFF
    try:
        return GraphMode(word)
    except ValueError as error:
        raise FailedPrecondition(
            f"The parameter cuda_graphs is {word!r}; it may be {', '.join(GraphMode)}.",
            reason=Reason.LOAD_FAILED,
        ) from error


def sizes_of(signature: Signature, max_rows: int) -> tuple[int, ...]:
    """Return the batch sizes to capture, largest first: `max_rows` and the powers of two below it.

    A model that does not batch has one size, 1. There are none if a graph would not have one shape: with
    variable dimensions beyond the batch, or optional inputs.
    """
    for spec in signature.inputs:
        if spec.optional or -1 in (spec.shape[1:] if signature.batched else spec.shape):
            return ()
    if not signature.batched:
        return (1,)
    powers = [1 << bits for bits in range((max_rows - 1).bit_length())]
    return (max_rows, *reversed(powers))


def size_for(rows: int, captured: Sequence[int], mode: GraphMode) -> int | None:
    """Return which of the captured sizes computes a batch; None if the model itself should.

    Args:
        rows: Rows of the batch.
        captured: Sizes that there are graphs for.
        mode: Whether rows may be added.
    """
    if rows in captured:
        return rows
    larger = [size for size in captured if size > rows] if mode is GraphMode.PAD else []
    return min(larger, default=None)


class Mark(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Wait until the device has come to it, without the interpreter lock."""
        ...


class Streams(Protocol):
    """What CUDA does for a batch."""

    def pin(self, size: int) -> torch.Tensor:
        """Return page-locked memory, `size` bytes as UINT8.

        Raises:
            RuntimeError: There is none.
        """
        ...

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Begin to copy to the device, on the copy stream; `host` must stay as it is until a later mark."""
        ...

    def computing(self, uploaded: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Make the compute stream current, after these uploads."""
        ...

    def mark(self) -> Mark:
        """Return the present end of the compute stream."""
        ...

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return device memory that stays."""
        ...

    def capture(
        self, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
        """Record what `compute` does on the compute stream.

        Returns:
            What does it again, and its outputs, which each replay overwrites.

        Raises:
            Exception: It cannot be recorded, or fails.
        """
        ...

    def drain(self) -> None:
        """Wait for all that was begun.

        Raises:
            RuntimeError: The device is in no state to go on.
        """
        ...

    def release(self) -> None:
        """Give back memory that is no longer used."""
        ...


class HostMemory:
    """Page-locked memory by name, which grows by powers of two up to what all share.

    Args:
        streams: Gives it.
        budget: Bytes that are left, in a list of one for all who share it.
    """

    def __init__(self, streams: Streams, budget: list[int]) -> None:
        self._streams = streams
        self._budget = budget
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a tensor, which the next call with this name takes over.

        Where there is no more page-locked memory it is ordinary: slower, and as right.
        """
        size = dtype.itemsize
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._grow(name, size)
        return buffer[:size].view(dtype).view(tuple(shape))

    def _grow(self, name: str, size: int) -> torch.Tensor:
        length = max(512, 1 << (size - 1).bit_length())
        before = self._buffers.get(name)
        more = length - (len(before) if before is not None else 0)
        if more <= self._budget[0]:
            try:
                buffer = self._streams.pin(length)
            except RuntimeError as error:
                # Not asked for again: the machine's limit will not change.
                self._budget[0] = 0
                log.warning("no page-locked memory", extra={"bytes": length, "error": str(error)})
            else:
                self._budget[0] -= more
                self._buffers[name] = buffer
                return buffer
        return torch.empty(size, dtype=torch.uint8)


@dataclasses.dataclass(slots=True)
class _Graph:
    inputs: list[torch.Tensor]
    outputs: dict[str, torch.Tensor]
    replay: Callable[[], None]


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A batch between `begin` and `finish`."""

    slot: HostMemory
    outputs: dict[str, torch.Tensor]
    """In memory of the host, once `mark` is reached."""
    mark: Mark
    kept: list[torch.Tensor]
    """What the device still reads."""


class CudaPath:
    """Computes batches on a GPU. Used by one thread.

    Args:
        compute: The model.
        signature: What it takes and gives.
        streams: The GPU.
        to_array: Makes an array of a tensor in memory of its own.
    """

    def __init__(
        self,
        compute: Compute,
        signature: Signature,
        streams: Streams,
        to_array: Callable[[torch.Tensor], Array],
    ) -> None:
        self._compute = compute
        self._signature = signature
        self._streams = streams
        self._to_array = to_array
        budget = [_PINNED_BYTES]
        self._free = [HostMemory(streams, budget) for _ in range(_SLOTS)]
        self._graphs: dict[int, _Graph] = {}
        self._mode = GraphMode.OFF

    @property
    def captured(self) -> tuple[int, ...]:
        """The batch sizes that there are graphs for."""
        return tuple(self._graphs)

    # capture

    def capture(self, mode: GraphMode, max_rows: int) -> None:
        """Record graphs for the sizes of `sizes_of`, until one cannot be: the log says why.

        The largest comes first: in the memory that they share the smaller ones find room.

        Args:
            mode: Which batches they compute.
            max_rows: Rows of a batch at most.

        Raises:
            DeviceLost: The attempt has left the GPU unusable.
        """
        self._mode = mode
        if mode is GraphMode.OFF:
            return
        sizes = sizes_of(self._signature, max_rows)
        why = "" if sizes else "the inputs have no fixed shapes"
        for size in sizes:
            try:
                with torch.inference_mode():
                    self._graphs[size] = self._record(size)
            except _RAISED_BY_MODELS as error:
                self._drain()
                why = _words(error)
                break
        if why:
            facts = {"captured": sorted(self._graphs), "reason": why}
            log.warning("computing without CUDA graphs what they have not captured", extra=facts)
        else:
            log.info("CUDA graphs captured", extra={"captured": sorted(self._graphs)})

    def _record(self, size: int) -> _Graph:
        inputs = []
        for spec in self._signature.inputs:
            shape = (size, *spec.shape[1:]) if self._signature.batched else spec.shape
            inputs.append(self._streams.zeros(shape, torch_type(spec.dtype)))
        replay, outputs = self._streams.capture(lambda: self._compute(inputs))
        self._check(inputs, outputs, replay)
        return _Graph(inputs, outputs, replay)

    def _check(
        self, inputs: list[torch.Tensor], outputs: dict[str, torch.Tensor], replay: Callable[[], None]
    ) -> None:
        """Compare the replay with the model: what changes from call to call is not for graphs.

        Whole numbers stay 0: they may be indices, and one out of range ends all use of the GPU.
        """
        generator = torch.Generator().manual_seed(0)
        probes = [
            torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            if tensor.dtype.is_floating_point
            else torch.zeros(tensor.shape, dtype=tensor.dtype)
            for tensor in inputs
        ]
        with self._streams.computing(()):
            for tensor, probe in zip(inputs, probes, strict=True):
                tensor.copy_(probe)
            wanted = {name: tensor.clone() for name, tensor in self._compute(inputs).items()}
            for tensor, probe in zip(inputs, probes, strict=True):
                # The model may write to its inputs.
                tensor.copy_(probe)
            replay()
            for name, want in wanted.items():
                if not _close(outputs[name], want):
                    raise ValueError(f"a replay gave another {name} than the model")

    # batches

    def predict(self, batch: Batch) -> dict[str, Array]:
        """Compute one batch. See `Servable.predict`."""
        return self.finish(self.begin(batch))

    def begin(self, batch: Batch) -> Ticket:
        """Begin to compute a batch; two may be begun at a time.

        Raises:
            Exception: Whatever the model raises.
            DeviceLost: The GPU cannot be used any more.
            RuntimeError: Two are begun already.
        """
        if not self._free:
            raise RuntimeError(f"There are {_SLOTS} batches under way; finish one first.")
        slot = self._free.pop()
        try:
            with torch.inference_mode():
                return self._begin(batch, slot)
        except BaseException:
            # The device may still read and write what the next batch would use.
            self._drain()
            self._free.append(slot)
            raise

    def _begin(self, batch: Batch, slot: HostMemory) -> Ticket:
        names = [spec.name for spec in self._signature.inputs if spec.name in batch]
        rows, graph = self._graph_for(batch, names)
        kept: list[torch.Tensor] = []
        uploaded: list[torch.Tensor] = []
        for name in names:
            array = batch[name]
            host = slot.take(f"input {name}", array.shape, torch_type(array.dtype))
            np.copyto(_view(host), _bits(array))
            kept.append(host)
            uploaded.append(self._streams.upload(host))
        with self._streams.computing(uploaded):
            if graph is None:
                given = self._compute(uploaded)
            else:
                for static, tensor in zip(graph.inputs, uploaded, strict=True):
                    if rows is None or rows == len(static):
                        static.copy_(tensor)
                    else:
                        static[:rows].copy_(tensor)
                        static[rows:].zero_()
                graph.replay()
                given = graph.outputs
            outputs = {}
            for name, tensor in given.items():
                if graph is not None and rows is not None and tensor.ndim:
                    tensor = tensor[:rows]
                host = slot.take(f"output {name}", tensor.shape, tensor.dtype)
                outputs[name] = host.copy_(tensor.detach(), non_blocking=True)
            return Ticket(slot, outputs, self._streams.mark(), kept)

    def finish(self, ticket: Ticket) -> dict[str, Array]:
        """Wait for a batch, and return its outputs in memory of their own.

        Raises:
            DeviceLost: The GPU cannot be used any more.
        """
        try:
            ticket.mark.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"The GPU failed: {error}") from error
        arrays = {name: self._to_array(host.clone()) for name, host in ticket.outputs.items()}
        self._free.append(ticket.slot)
        return arrays

    def close(self) -> None:
        """Let go of graphs and memory; nothing may be under way."""
        self._graphs.clear()
        self._free.clear()
        self._streams.release()

    def _graph_for(self, batch: Batch, names: Sequence[str]) -> tuple[int | None, _Graph | None]:
        """Return the rows of the batch, None if it has no rows, and the graph that computes it, if any."""
        if not self._graphs or len(names) < len(self._signature.inputs):
            return None, None
        batched = self._signature.batched
        rows = len(batch[names[0]]) if batched else 1
        size = size_for(rows, self.captured, self._mode)
        if size is None:
            return None, None
        graph = self._graphs[size]
        for name, static in zip(names, graph.inputs, strict=True):
            array = batch[name]
            shape = (rows, *static.shape[1:]) if batched else tuple(static.shape)
            if array.shape != shape or torch_type(array.dtype) != static.dtype:
                return None, None
        return rows if batched else None, graph

    def _drain(self) -> None:
        try:
            self._streams.drain()
        except RuntimeError as error:
            raise DeviceLost(f"The GPU failed: {error}") from error


@functools.cache
def torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    """Return torch's type of a numpy type."""
    return torch.bfloat16 if dtype == BFLOAT16 else torch.from_numpy(np.empty(0, dtype)).dtype


def _view(host: torch.Tensor) -> Array:
    array: Array = (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()
    return array


def _bits(array: Array) -> Array:
    return array.view(np.int16) if array.dtype == BFLOAT16 else array


def _words(error: BaseException) -> str:
    # Of errors that followed one another, the first: the end of a capture only says that it failed.
    while error.__context__ is not None and error.__cause__ is None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _close(given: torch.Tensor, want: torch.Tensor) -> bool:
    if given.shape != want.shape or given.dtype != want.dtype:
        return False
    if not want.dtype.is_floating_point:
        return bool(torch.equal(given, want))
    given, want = given.double(), want.double()
    largest = (
        float(torch.nan_to_num(want, nan=0.0, posinf=0.0, neginf=0.0).abs().max()) if want.numel() else 0.0
    )
    return bool(torch.allclose(given, want, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True))
