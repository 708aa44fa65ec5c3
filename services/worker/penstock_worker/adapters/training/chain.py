"""Models as a chain of blocks, which can be cut between any two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Chain(nn.Module):
    """Blocks one after the other.

    A block gives a tensor, or a tuple of tensors that are the arguments of the next one. Parameters are named
    by the block's place in the whole model ("3.up.weight"), also in a part of it, so that the state of all
    parts together is the state of the whole.

    Args:
        blocks: By place; an iterable counts from 0.
    """

    def __init__(self, blocks: Iterable[nn.Module] | Mapping[int, nn.Module]) -> None:
        super().__init__()
        numbered = blocks.items() if isinstance(blocks, Mapping) else enumerate(blocks)
        for place, block in numbered:
            self.add_module(str(place), block)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def part(self, start: int, stop: int) -> Chain:
        """Return the blocks [start, stop), which keep their names; shared, not copied."""
        return Chain({int(name): block for name, block in list(self.named_children())[start:stop]})

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> Any:
        """Compute all blocks.

        Args:
            x: What the first block takes, rows first.
            *more: What it takes beside that, if it is not the first of the whole model.

        Returns:
            What the last block gives: for a whole model one tensor, rows first.
        """
        given: Any = (x, *more)
        # Not `children`, which looks for doubles: felt in a small model's steps.
        for block in self._modules.values():
            given = block(*given) if isinstance(given, tuple) else block(given)
        return given
