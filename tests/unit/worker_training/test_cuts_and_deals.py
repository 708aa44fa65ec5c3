"""How batches, layers and tensors are shared out among ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock_worker.adapters.training.strategies.parameter_server import deal
from penstock_worker.adapters.training.strategies.parts import share
from penstock_worker.adapters.training.strategies.pipeline import cut


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_parts_of_a_batch_are_the_batch_in_its_order(rows: int, parts: int) -> None:
    indices = torch.arange(100, 100 + rows)
    shares = [share(indices, part, parts) for part in range(parts)]
    counted = torch.cat([own for own, counts in shares if counts])
    assert torch.equal(counted, indices)
    # Who has no rows still computes one.
    assert all(len(own) for own, _ in shares)
    sizes = [len(own) if counts else 0 for own, counts in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_no_other_cut_has_a_smaller_largest_stage(sizes: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(sizes)))
    bounds = cut(sizes, parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    assert all(begin < end for begin, end in itertools.pairwise(bounds))

    def largest(bounds: tuple[int, ...]) -> int:
        return max(sum(sizes[begin:end]) for begin, end in itertools.pairwise(bounds))

    others = itertools.combinations(range(1, len(sizes)), parts - 1)
    assert largest(tuple(bounds)) == min(largest((0, *inner, len(sizes))) for inner in others)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_each_tensor_has_one_server_and_none_has_much_more_than_others(
    sizes: list[int], servers: int
) -> None:
    named = {f"tensor {number}": size for number, size in enumerate(sizes)}
    dealt = deal(named, servers)
    assert sorted(name for names in dealt for name in names) == sorted(named)
    held = [sum(named[name] for name in names) for names in dealt]
    assert max(held) - min(held) <= max(sizes, default=0)
    assert deal(dict(reversed(named.items())), servers) == dealt


@pytest.mark.parametrize(
    ("sizes", "parts", "bounds"), [([9, 1, 1, 1], 2, [0, 1, 4]), ([1, 1, 1, 9], 2, [0, 3, 4])]
)
def test_a_large_layer_is_a_stage_of_its_own(sizes: list[int], parts: int, bounds: list[int]) -> None:
    assert cut(sizes, parts) == bounds
