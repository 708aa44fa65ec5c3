"""CUDA behind `cuda_path.Streams`: two streams, page-locked memory, and graphs that share one pool.

As the notes on CUDA semantics and on graphs in PyTorch's documentation prescribe: three runs on the side
stream before a capture, tensors that stay for what a graph reads and writes, and `record_stream` for memory
that one stream takes and another uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

# Lazy initialisation, and TorchScript's specialisation, end before a capture: the documentation's number.
_WARM_UP_RUNS = 3


class CudaStreams:
    """One GPU's streams, for the thread that makes this object.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.set_device(device)
        self._copy = torch.cuda.Stream(device)
        self._compute = torch.cuda.Stream(device)
        # One pool for all graphs: they are replayed on one stream, so never two at a time, and what one
        # leaves there between replays is its outputs, which are kept and so never shared.
        self._pool = torch.cuda.graph_pool_handle()
        # The weights came on the default stream.
        torch.cuda.synchronize(device)

    def pin(self, size: int) -> torch.Tensor:
        """See `Streams.pin`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """See `Streams.upload`."""
        with torch.cuda.stream(self._copy):
            return host.to(self._device, non_blocking=True)

    @contextlib.contextmanager
    def computing(self, uploaded: Sequence[torch.Tensor]) -> Iterator[None]:
        """See `Streams.computing`."""
        self._compute.wait_stream(self._copy)
        for tensor in uploaded:
            # Its memory belongs to the copy stream, which must not take it back while the other reads it.
            tensor.record_stream(self._compute)
        with torch.cuda.stream(self._compute):
            yield

    def mark(self) -> torch.cuda.Event:
        """See `Streams.mark`."""
        # `blocking`: the thread that waits sleeps, where it would otherwise use up a core.
        event = torch.cuda.Event(blocking=True)
        event.record(self._compute)
        return event

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Streams.zeros`."""
        with torch.cuda.stream(self._compute):
            return torch.zeros(tuple(shape), dtype=dtype, device=self._device)

    def capture(
        self, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
        """See `Streams.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Around the capture too: where its end fails, `torch.cuda.graph` leaves its stream the current one.
        with torch.cuda.stream(self._compute):
            for _ in range(_WARM_UP_RUNS):
                compute()
            self._compute.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._compute):
                outputs = compute()
        return graph.replay, outputs

    def drain(self) -> None:
        """See `Streams.drain`."""
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        """See `Streams.release`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
