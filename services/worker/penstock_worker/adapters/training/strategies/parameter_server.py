"""Parameter server: some ranks hold the weights and the optimizer's state; the others compute gradients.

The last `servers` ranks are servers, each of a slice of the tensors; the first ones are workers (Li et al.
2014). In each step a worker computes the gradient of its part of the batch, sends each server the slice
that is its, and gets the new weights of the slice back. Messages are flat float32 tensors, gradients with
two numbers behind them (what the rows weigh, the factor on the learning rate), point to point over gloo; on
GPUs they pass through the memory of the host.

Synchronous: a server waits for all workers, adds up, divides by the weight of the whole batch and steps
once, so a step is that of one process.

Asynchronous (stale synchronous parallel, Ho et al. 2013): a server steps on each worker's gradient as it
comes, with 1 / workers of the learning rate. A worker that has taken c steps gets its answer, and with it
leave for the next step, once the slowest has taken at least c + 1 - staleness: so nobody is ever more than
`staleness` steps ahead. What comes out depends on who was faster.

A rank that dies ends the attempt of all; the group forms anew and goes on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock_worker.adapters.training.strategies.base import Strategy
from penstock_worker.adapters.training.strategies.group import TIMEOUT
from penstock_worker.adapters.training.strategies.parts import share
from penstock_worker.usecases.job_context import JobFailure

# Numbers behind the gradients of a message: what the rows weigh, and the factor on the learning rate.
_TAIL = 2


class Slice:
    """The tensors of one server: their values in one flat tensor, their gradients in another.

    Args:
        parameters: By name; from now on they are views of the flat tensors.
        device: Where they are computed with.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], device: torch.device) -> None:
        self.parameters = parameters
        size = sum(value.numel() for value in parameters.values())
        self.values = torch.empty(size, device=device)
        self.gradients = torch.zeros(size + _TAIL, device=device)
        begin = 0
        for parameter in parameters.values():
            end = begin + parameter.numel()
            view = self.values[begin:end].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.gradients[begin:end].view(parameter.shape)
            begin = end


class ParameterServerStrategy(Strategy):
    """Is a worker in the first ranks, a server in the last."""

    name: ClassVar[str] = "parameter_server"

    def _build(self) -> None:
        rank, spec = self.group.rank, self.spec
        # Fewer ranks than the job asked for, as a node is gone: somebody must still compute.
        servers = min(spec.servers or 1, self.group.size - 1)
        if servers < spec.servers:
            self.notes.append(
                f"{servers} instead of {spec.servers} servers: there are {self.group.size} ranks."
            )
        self.workers = self.group.size - servers
        self.asynchronous = spec.asynchronous
        self.staleness = spec.staleness or 4
        self.lag = self.staleness if self.asynchronous else 0
        # A group of their own for gradients and weights, so that votes never come between; and one of the
        # servers.
        self._data = dist.new_group(backend="gloo", timeout=TIMEOUT)
        server_ranks = list(range(self.workers, self.group.size))
        self._servers = dist.new_group(server_ranks, backend="gloo", timeout=TIMEOUT)
        model = self.parts.build_model()
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        dealt = deal({name: value.numel() for name, value in parameters.items()}, servers)
        if not all(dealt):
            raise JobFailure(
                f"The model has {len(parameters)} tensors, fewer than {servers} servers. Take fewer servers.",
                "INVALID_RECIPE",
            )
        self._is_server = rank >= self.workers
        # Steps that each worker has taken (asynchronous servers), and the most that one was ahead of another.
        self._clocks = [0] * self.workers
        self._waiting: set[int] = set()
        self.lead = 0
        if self._is_server:
            self.device = torch.device("cpu")
            own = {name: parameters[name] for name in dealt[rank - self.workers]}
            self._slices = [Slice(own, self.device)]
            self._inboxes = [torch.empty_like(self._slices[0].gradients) for _ in range(self.workers)]
            self.module = nn.Module()
            self.optimizer = self.parts.build_optimizer(list(own.values()))
        else:
            self.module = model.to(self.device).train()
            self._slices = [Slice({name: parameters[name] for name in names}, self.device) for names in dealt]
            self.optimizer = None

    def tensors(self) -> dict[str, Tensor]:
        """Give the slice of a server; of rank 0 what no optimizer changes."""
        if self._is_server:
            return {name: value.detach() for name, value in self._slices[0].parameters.items()}
        if self.group.rank:
            return {}
        learned = {name for part in self._slices for name in part.parameters}
        return {name: value for name, value in super().tensors().items() if name not in learned}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Give the slice of a server."""
        return self._slices[0].parameters if self._is_server else {}

    def weights(self) -> dict[str, Tensor] | None:
        """Bring the slices together on rank 0."""
        return self._gathered(self.tensors())

    def step(self, indices: Tensor, rate: float = 1.0) -> None:
        """Compute a gradient and take the new weights, or serve until all workers have taken this step."""
        if not self._is_server:
            self._work(indices, rate)
        elif self.asynchronous:
            self._serve_each()
        else:
            self._serve_all()

    def predict(self, inputs: Tensor) -> Tensor:
        """Compute the outputs; servers have none to compute."""
        outputs: Tensor = self.module(inputs)
        return outputs

    def _deal(self) -> tuple[int, int]:
        return self.group.rank, self.workers

    def _wanted(self) -> dict[str, Tensor]:
        return self.tensors() if self._is_server else super().tensors()

    def _before_measuring(self) -> None:
        if self.asynchronous:
            self._refresh()

    def _loaded(self) -> None:
        self._clocks = [self.steps] * self.workers
        self._refresh()

    def _refresh(self) -> None:
        """Give all workers the present weights; all ranks call it."""
        if self._is_server:
            self._send_values(range(self.workers))
        else:
            for work in self._receive_values():
                work.wait()
            self._values_arrived()

    # Workers.

    def _work(self, indices: Tensor, rate: float) -> None:
        objective = self.parts.objective
        own, counts = share(indices, self.group.rank, self.workers)
        for part in self._slices:
            part.gradients.zero_()
        total, weight = torch.zeros((), device=self.device), torch.zeros(())
        if counts:
            pieces = self._pieces(own)
            weight = self._weight_of(pieces).cpu()
            for piece in pieces:
                inputs, targets = self.parts.rows.batch(piece)
                with self._autocast():
                    outputs = self.module(inputs)
                loss_sum = objective.loss_sum(outputs, targets)
                loss_sum.backward()
                total += loss_sum.detach()
        if self.asynchronous and self.parts.clip_gradient_norm and counts:
            self._clip_own(self.parts.clip_gradient_norm * float(weight))
        arriving = self._receive_values()
        leaving = []
        for number, part in enumerate(self._slices):
            part.gradients[-_TAIL:] = torch.tensor([float(weight), rate])
            leaving.append(dist.isend(part.gradients.cpu(), self.workers + number, group=self._data))
        for work in (*leaving, *arriving):
            work.wait()
        self._values_arrived()
        self._note(total, weight)

    def _clip_own(self, most: float) -> None:
        gradients = [part.gradients[:-_TAIL] for part in self._slices]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))

    def _receive_values(self) -> list[Any]:
        self._arrivals = [part.values if part.values.is_cpu else part.values.cpu() for part in self._slices]
        return [
            dist.irecv(values, self.workers + number, group=self._data)
            for number, values in enumerate(self._arrivals)
        ]

    def _values_arrived(self) -> None:
        for part, values in zip(self._slices, self._arrivals, strict=True):
            if values is not part.values:
                part.values.copy_(values)

    # Servers.

    def _serve_all(self) -> None:
        part = self._slices[0]
        arriving = [dist.irecv(inbox, worker, group=self._data) for worker, inbox in enumerate(self._inboxes)]
        part.gradients.zero_()
        # In the order of ranks, whoever is first, so that the sum is always the same.
        for work, inbox in zip(arriving, self._inboxes, strict=True):
            work.wait()
            part.gradients += inbox
        self._apply(rate=float(self._inboxes[0][-1]), most=self.parts.clip_gradient_norm)
        self._send_values(range(self.workers))
        self.steps += 1

    def _serve_each(self) -> None:
        part, inbox = self._slices[0], self._inboxes[0]
        while min(self._clocks) <= self.steps:
            worker = dist.recv(inbox, group=self._data)
            part.gradients.copy_(inbox)
            self._apply(rate=float(inbox[-1]) / self.workers, most=0.0)
            self._clocks[worker] += 1
            self._waiting.add(worker)
            slowest = min(self._clocks)
            self.lead = max(self.lead, self._clocks[worker] - slowest)
            free = [other for other in self._waiting if self._clocks[other] + 1 - slowest <= self.staleness]
            self._waiting.difference_update(free)
            self._send_values(free)
        self.steps += 1

    def _apply(self, rate: float, most: float) -> None:
        """Step with the sums of gradients and weights that lie in the slice."""
        gradients = self._slices[0].gradients
        weight = float(gradients[-_TAIL])
        if not weight:
            return
        gradients /= weight
        if most:
            self._clip_together(self._slices[0].parameters.values(), most, self._servers)
        assert self.optimizer is not None  # noqa: S101 - servers have one
        self._set_rate(rate)
        self.optimizer.step()

    def _send_values(self, workers: Sequence[int]) -> None:
        values = self._slices[0].values
        for work in [dist.isend(values, worker, group=self._data) for worker in workers]:
            work.wait()


def deal(sizes: dict[str, int], servers: int) -> list[list[str]]:
    """Deal tensors to servers: the largest first, each to the one that has least.

    Tensors stay whole, so every optimizer works as it does in one process.

    Args:
        sizes: By name.
        servers: How many.

    Returns:
        The names of each server's tensors.
    """
    dealt: list[list[str]] = [[] for _ in range(servers)]
    held = [0] * servers
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = held.index(min(held))
        dealt[least].append(name)
        held[least] += sizes[name]
    return dealt
