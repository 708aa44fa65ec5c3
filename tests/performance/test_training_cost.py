"""What the framework costs a training: a recipe's epochs beside the same loop written by hand in torch.

Both train the same model on the same tensors with the same batch size, and measure the held-out rows after
each epoch; they take turns, and the fastest turns are compared. Recipes let AdamW pass over each weight
once (`fused`), which torch does not by default: there is a loop by hand of either kind.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from penstock_kit.jobs.train import plan_of
from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.training.job import parts_of
from penstock_worker.adapters.training.loop import Loop
from penstock_worker.adapters.training.preparation import Prepared, prepare
from penstock_worker.adapters.training.strategies import open_strategy
from support.job_context import FileJobContext
from support.training import context_for, example

pytestmark = [pytest.mark.performance, pytest.mark.timeout(300)]

TURNS = {"cnn": 15, "bag": 7, "gpt": 9}
LIMIT = 1.05
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    # The fewer steps, the more the beginning and the end of a training would be felt beside its epochs.
    "linear": ("sklearn:digits", {"architecture": "linear"}, 30),
    "mlp": ("sklearn:digits", {"architecture": "mlp"}, 30),
    "cnn": ("sklearn:digits", {"architecture": "cnn"}, 4),
    "bag": ("corpus:python-functions", {"architecture": "bag"}, 5),
    "gpt": (
        "corpus:python-topics",
        {"architecture": "gpt", "parameters": {"width": 32, "layers": 1, "length": 64, "vocabulary": 512}},
        1,
    ),
}


class _Context(FileJobContext):
    """Looks at a variable at each step, as the worker's own context does: a file would be felt."""

    stopping = False

    def __init__(self, context: FileJobContext) -> None:
        self.__dict__.update(context.__dict__)

    def should_stop(self) -> bool:
        return self.stopping


def _by_hand(prepared: Prepared, epochs: int, tokens: bool, *, fused: bool) -> float:
    """Seconds of the loop as torch's tutorials have it, without a DataLoader or a look at each loss."""
    model = prepared.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, fused=fused or None)
    every = torch.arange(len(prepared.train))
    x, y = prepared.train.batch(every)
    held_x, held_y = prepared.held_out.batch(torch.arange(len(prepared.held_out)))
    started = time.perf_counter()
    for _ in range(epochs):
        order, total = torch.randperm(len(x)), torch.zeros(())
        for rows in order.split(32):
            optimizer.zero_grad()
            outputs, targets = model(x[rows]), y[rows]
            if tokens:
                outputs, targets = outputs.flatten(0, 1), targets.flatten()
            loss = functional.cross_entropy(outputs, targets)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        model.eval()
        with torch.no_grad():
            lost, hits = 0.0, 0
            for rows in torch.arange(len(held_x)).split(512):
                outputs, targets = model(held_x[rows]), held_y[rows]
                if tokens:
                    outputs, targets = outputs.flatten(0, 1), targets.flatten()
                lost += float(functional.cross_entropy(outputs, targets, reduction="sum"))
                hits += int((outputs.argmax(1) == targets).sum())
        model.train()
        float(total)
    return time.perf_counter() - started


def _by_recipe(root: Path, dataset: Any, prepared: Prepared, recipe: dict[str, Any], epochs: int) -> float:
    """Seconds of the loop of a recipe, from its first step to its last measurement."""
    context = _Context(context_for(root, dataset, epochs=epochs, **recipe))
    work = context.job.train
    plan = plan_of(work.recipe)
    strategy = open_strategy(work.recipe.strategy, context, parts_of(work, plan, prepared, 1))
    try:
        loop = Loop(context, plan, strategy, prepared.train, prepared.held_out, prepared.score, 0)
        started = time.perf_counter()
        loop.run()
        return time.perf_counter() - started
    finally:
        strategy.close()


@pytest.mark.parametrize("fused", [False, True], ids=["plain AdamW by hand", "fused AdamW by hand"])
@pytest.mark.parametrize("case", CASES)
def test_an_epoch_of_a_recipe_takes_no_longer_than_by_hand(case: str, fused: bool, tmp_path: Path) -> None:
    name, recipe, epochs = CASES[case]
    torch.set_num_threads(1)
    dataset = example(tmp_path / "data", name)
    context = context_for(tmp_path / "plan", dataset, **recipe)
    plan = plan_of(context.job.train.recipe)
    prepared = prepare(open_dataset(dataset), plan, seed=0, device=torch.device("cpu"))
    tokens = prepared.blueprint.task == "language_model"
    hand, ours = [], []
    for turn in range(TURNS.get(case, 12)):
        for by_hand in (True, False) if turn % 2 else (False, True):
            if by_hand:
                hand.append(_by_hand(prepared, epochs, tokens, fused=fused))
            else:
                ours.append(_by_recipe(tmp_path / str(turn), dataset, prepared, recipe, epochs))
    steps = -(-len(prepared.train) // 32) * epochs
    # The fastest turn of each: what others do on the machine only ever adds.
    theirs, own = (1e6 * min(times) / steps for times in (hand, ours))
    ratio = own / theirs
    print(f"\n{case}: by hand {theirs:.0f} µs a step, recipe {own:.0f} µs, ratio {ratio:.3f}")
    assert ratio <= LIMIT
