"""The models as every peer runs them, in the peer's own interpreter.

`BENCH_WORKLOAD` in the environment says which. Needs numpy, and torch for the mlp.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WORKLOAD = os.environ.get("BENCH_WORKLOAD", "w1")
MAX_BATCH = int(os.environ.get("BENCH_MAX_BATCH", "64"))
WAIT_SECONDS = float(os.environ.get("BENCH_WAIT_SECONDS", "0"))
SLEEP_SECONDS = 0.020


def mlp() -> Any:
    """1024 → 4096 → 4096 → 1000 with ReLU; the weights are those of seed 0."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(1024, 4096),
        torch.nn.ReLU(),
        torch.nn.Linear(4096, 4096),
        torch.nn.ReLU(),
        torch.nn.Linear(4096, 1000),
    ).eval()


def load(workload: str = WORKLOAD) -> Callable[[Any], Any]:
    """Return a function from fp32 [rows, width] to fp32 [rows, outputs]."""
    if workload == "w1":
        return lambda rows: rows
    if workload == "sleep":

        def sleep(rows: Any) -> Any:
            time.sleep(SLEEP_SECONDS)
            return rows

        return sleep
    import torch

    torch.set_num_threads(1)
    model = mlp()

    def compute(rows: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(np.ascontiguousarray(rows))).numpy()

    compute(np.zeros((MAX_BATCH, 1024), np.float32))
    return compute
