"""Four ranks of one node on a dataset of 410 MB: what they have in memory of their own, and when they begin.

Beside it stands what one process pays that reads the rows into memory of its own.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock_kit.jobs.train import plan_of
from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.training.preparation import prepare
from penstock_worker.domain.sampling import epoch_order, rank_batches
from penstock_worker.usecases.job_context import FetchedDataset
from support.training import arrays, context_for

pytestmark = [pytest.mark.performance, pytest.mark.timeout(300)]

RANKS, ROWS, COLUMNS, BATCH = 4, 100_000, 1024, 1024
SIZE_MIB = ROWS * COLUMNS * 4 / 2**20


def _own_mib(pid: int) -> float:
    """Memory that belongs to no file, of which others have no part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _rank(at: int, root: Path, fetched: FetchedDataset, began: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    plan = plan_of(context_for(root / str(at), fetched, architecture="linear").job.train.recipe)
    prepared = prepare(open_dataset(fetched), plan, seed=0, device=torch.device("cpu"))
    seconds = []
    for epoch in range(3):
        started = time.monotonic()
        for rows in rank_batches(epoch_order(len(prepared.train), epoch, 0), BATCH, at, RANKS):
            prepared.train.batch(torch.from_numpy(rows))
            if not seconds:
                pipe.send(time.monotonic() - began)
                seconds.append(0.0)
        seconds.append(time.monotonic() - started)
    pipe.send(seconds[1:])
    pipe.recv()


def test_the_ranks_of_a_node_have_a_dataset_in_memory_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    fetched = arrays(tmp_path / "data", x=x, y=np.arange(ROWS) % 10)
    fetched = dataclasses.replace(fetched, decoded=tmp_path / "decoded")
    held = torch.from_numpy(x)
    started = time.monotonic()
    for rows in rank_batches(epoch_order(int(ROWS * 0.8), 1, 0), BATCH, 0, RANKS):
        held.index_select(0, torch.from_numpy(rows))
    in_memory = time.monotonic() - started
    del x, held
    fork = multiprocessing.get_context("fork")
    began = time.monotonic()
    ranks: list[tuple[Any, Any]] = []
    for at in range(RANKS):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_rank, args=(at, tmp_path, fetched, began, theirs))
        process.start()
        ranks.append((process, ours))
    most, firsts, epochs = 0.0, [], []
    while len(epochs) < RANKS:
        most = max(most, sum(_own_mib(process.pid) for process, _ in ranks))
        for _, pipe in ranks:
            if pipe.poll(0.01):
                said = pipe.recv()
                (firsts if isinstance(said, float) else epochs).append(said)
    for process, pipe in ranks:
        pipe.send(None)
        process.join(30)
    load = os.getloadavg()[0]
    print(
        f"\n{SIZE_MIB:.0f} MiB, {RANKS} ranks: {most:.0f} MiB of their own at most, first batch after "
        f"{max(firsts):.1f} s, gathering a part of an epoch "
        f"{', '.join(f'{max(times):.2f}' for times in zip(*epochs, strict=True))} s "
        f"(alone, from memory of its own: {in_memory:.2f} s); load {load:.1f}"
    )
    assert most < 1.5 * SIZE_MIB
