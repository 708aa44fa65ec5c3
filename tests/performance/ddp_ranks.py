"""One rank of data parallel training by hand and by recipe, in turns.

`python -m performance.ddp_ranks ROOT CASE`. By hand is what torch's tutorials have for torchrun:
DistributedDataParallel as it comes, each rank its part of each batch, no DataLoader, no look at each loss,
held-out rows measured in parts after each epoch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from penstock_kit.jobs.train import plan_of
from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.training.job import parts_of
from penstock_worker.adapters.training.loop import Loop
from penstock_worker.adapters.training.preparation import Prepared, prepare
from penstock_worker.adapters.training.strategies import open_strategy
from support.job_context import FileJobContext
from support.training import dataset_of, job_for

BATCH = 64
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp": (
        "sklearn:digits",
        {"task": "image", "architecture": "mlp", "parameters": {"hidden": [512, 512]}},
        6,
    ),
    "cnn": ("sklearn:digits", {"architecture": "cnn"}, 4),
    "gpt": (
        "corpus:python-topics",
        {"architecture": "gpt", "parameters": {"width": 64, "layers": 2, "heads": 2, "length": 32}},
        1,
    ),
}


def by_hand(prepared: Prepared, epochs: int, rank: int, ranks: int) -> float:
    """Seconds from the first step to the last measurement."""
    dist.init_process_group("gloo")
    model = prepared.build().train()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    x, y = prepared.train.batch(torch.arange(len(prepared.train)))
    held_x, held_y = prepared.held_out.batch(torch.arange(len(prepared.held_out)))

    def loss_of(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction=reduction)

    dist.barrier()
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        total = torch.zeros(())
        for rows in order.split(BATCH):
            own = rows[rank::ranks]
            optimizer.zero_grad()
            loss = loss_of(replica(x[own]), y[own], "mean")
            loss.backward()
            optimizer.step()
            total += loss.detach()
        model.eval()
        found = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for rows in torch.arange(len(held_x)).split(512)[rank::ranks]:
                outputs = model(held_x[rows])
                found[0] += loss_of(outputs, held_y[rows], "sum")
                found[1] += (outputs.argmax(-1) == held_y[rows]).sum()
        dist.all_reduce(found)
        model.train()
    dist.barrier()
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    return seconds


def by_recipe(context: FileJobContext, prepared: Prepared) -> float:
    """Likewise, by the loop of recipes."""
    work = context.job.train
    plan = plan_of(work.recipe)
    strategy = open_strategy(
        work.recipe.strategy, context, parts_of(work, plan, prepared, context.world_size)
    )
    try:
        loop = Loop(context, plan, strategy, prepared.train, prepared.held_out, prepared.score, 0)
        strategy.group.barrier()
        started = time.perf_counter()
        loop.run()
        strategy.group.barrier()
        return time.perf_counter() - started
    finally:
        strategy.close()


def main() -> None:
    """Take turns; rank 0 writes the seconds of both."""
    root, case = Path(sys.argv[1]), sys.argv[2]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    _, recipe, epochs = CASES[case]
    dataset = dataset_of(root / "data", format=(root / "format").read_text())
    job = job_for(dataset, epochs=epochs, batch_size=BATCH, strategy="ddp", **recipe)
    plan = plan_of(job.train.recipe)
    prepared = prepare(open_dataset(dataset), plan, seed=0, device=torch.device("cpu"))
    found: dict[str, list[float]] = {"hand": [], "recipe": []}
    ports = iter(json.loads(os.environ["PORTS"]))
    for turn, port in enumerate(ports):
        os.environ["MASTER_PORT"] = str(port)
        # Which comes first changes each two turns.
        if (turn + turn // 2) % 2:
            found["hand"].append(by_hand(prepared, epochs, rank, ranks))
        else:
            context = FileJobContext(
                root / str(turn), job, rank=rank, local_rank=rank, world_size=ranks, checkpoint_seconds=1e6
            )
            found["recipe"].append(by_recipe(context, prepared))
    if rank == 0:
        steps = -(-len(prepared.train) // BATCH) * epochs
        (root / "seconds.json").write_text(json.dumps({**found, "steps": steps}))


if __name__ == "__main__":
    main()
