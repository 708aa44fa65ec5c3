"""The process group of a training: which rank this is, on which device, and how ranks add up numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock_worker.usecases.job_context import JobContext

# A rank that is killed is noticed at once, as its connections break. This is for one that hangs: its peers
# wait no longer, and the group forms anew. Loading data or measuring in one rank must not take longer.
TIMEOUT = timedelta(minutes=5)


@dataclass(slots=True)
class Group:
    """One rank among those of a training.

    Attributes:
        rank: From 0.
        size: How many there are.
        device: What it computes on.
        control: Group on the CPU for votes; None means the default one, or no group at size 1.
        writing: Group on the CPU for what writes checkpoints in the background.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    writing: Any = None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all ranks; each gets the sums."""
        if self.size == 1:
            return list(values)
        found: list[float] = self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def sum_tensor(self, value: Tensor) -> Tensor:
        """Add up a tensor on the CPU over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.control)
        return value

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.sum([0.0])

    def close(self) -> None:
        """Leave; safe after a failure, and twice."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(context: JobContext) -> Group:
    """Form the group of all ranks, as torch.distributed's environment says.

    On the CPU it is gloo; with GPUs nccl carries what lies on them, and gloo votes and checkpoints.

    Raises:
        torch.distributed.DistError: The ranks do not meet in time.
    """
    torch.set_num_threads(max(1, context.threads))
    device = _device(context)
    if context.world_size == 1:
        return Group(device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Group(
        context.rank,
        context.world_size,
        device,
        control=dist.new_group(backend="gloo", timeout=TIMEOUT),
        writing=dist.new_group(backend="gloo", timeout=TIMEOUT),
    )


def _device(context: JobContext) -> torch.device:
    devices = list(context.devices) or ["cpu"]
    return torch.device(devices[context.local_rank % len(devices)])
