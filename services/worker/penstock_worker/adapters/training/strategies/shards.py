"""The optimizer of parameters that lie in slices: each rank steps on its slices as on tensors of their own.

DTensor would do each operation of an optimizer on the slices of all ranks in step. For small tensors it
takes far longer to find out what to do than to do it, and some operations it lacks. Optimizers work number
by number, so slices are enough (but for adafactor, which is refused).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock_worker.adapters.training.strategies.base import Strategy
from penstock_worker.adapters.training.strategies.parts import Gradients


class Sliced(Strategy):
    """What strategies with slices of tensors do."""

    def _build_optimizer(self) -> None:
        """Make the optimizer of this rank's slices, once the module has them."""
        self._named = dict(self.module.named_parameters())
        # Each shares its memory with the slice.
        self._own = {name: _own(value) for name, value in self._named.items()}
        self.optimizer = self.parts.build_optimizer(list(self._own.values()))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Give this rank's slices, by the names of whole tensors."""
        return self._own

    def _update(self, gradients: Gradients, rate: float) -> tuple[Tensor, Tensor | float]:
        def sliced() -> tuple[Tensor, Tensor | float]:
            found = gradients()
            for name, value in self._named.items():
                gradient = value.grad
                self._own[name].grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                value.grad = gradient if value is self._own[name] else None
            return found

        return super()._update(sliced, rate)

    def _clip(self, most: float) -> None:
        slices: list[Tensor] = []
        whole: list[Tensor] = []
        for name, value in self._own.items():
            if value.grad is not None:
                (slices if _is_cut(self._named[name]) else whole).append(value.grad)
        square = self.group.sum_tensor(_square(slices)) + _square(whole)
        factor = (most / (square.sqrt() + 1e-6)).clamp(max=1.0).to(self.device)
        torch._foreach_mul_([*slices, *whole], factor)

    def _saved(self, name: str, value: Tensor) -> Tensor:
        whole = self._named[name]
        if not isinstance(whole, DTensor) or value.shape != self._own[name].shape:
            return value
        return _slice_of(whole, value)

    def _restored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        whole = self._named[name]
        if not isinstance(whole, DTensor) or shape != tuple(whole.shape):
            return super()._restored(name, shape, dtype)
        value = torch.zeros_like(self._own[name].detach(), dtype=dtype)
        return _slice_of(whole, value), value


def _own(value: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.detach().to_local()) if isinstance(value, DTensor) else value


def _is_cut(value: Tensor) -> bool:
    return isinstance(value, DTensor) and any(placement.is_shard() for placement in value.placements)


def _slice_of(whole: DTensor, value: Tensor) -> Tensor:
    found: Tensor = DTensor.from_local(
        value,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return found


def _square(gradients: Iterable[Tensor]) -> Tensor:
    """Add up the squares of all numbers, on the CPU."""
    return nn.utils.get_total_norm(list(gradients)).square().cpu()
