"""What the framework costs data parallel training at 2 ranks: a recipe's epochs beside plain DDP by hand.

Both run in the same two processes and take turns; the ratio is the median of the turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from performance.ddp_ranks import CASES
from support.training import example

pytestmark = [pytest.mark.performance, pytest.mark.timeout(300)]

TURNS = 12
RANKS = 2


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_at_two_ranks_takes_no_longer_than_plain_ddp(case: str, tmp_path: Path) -> None:
    (tmp_path / "format").write_text(example(tmp_path / "data", CASES[case][0]).artifact.format)
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(TURNS)]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PORTS": json.dumps([store.port for store in stores]),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "performance.ddp_ranks", str(tmp_path), case]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(RANKS)]
    try:
        assert [rank.wait(280) for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    found = json.loads((tmp_path / "seconds.json").read_text())
    ratios = [ours / hand for ours, hand in zip(found["recipe"], found["hand"], strict=True)]
    ratio = statistics.median(ratios)
    micros = {name: 1e6 * statistics.median(found[name]) / found["steps"] for name in ("hand", "recipe")}
    print(
        f"\n{case}: plain DDP {micros['hand']:.0f} µs a step, recipe {micros['recipe']:.0f} µs, ratio "
        f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    assert ratio <= 1.05
