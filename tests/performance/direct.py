"""The ideal of W2: torch called directly, in a process of its own, on one thread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from performance.workloads import WORKLOADS

BATCHES = (1, 16, 32)
_SCRIPT = """
import json, sys, time, torch
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1]).module()
rates = {}
for rows in json.loads(sys.argv[3]):
    x = torch.randn(rows, 1024)
    with torch.inference_mode():
        for _ in range(3):
            program(x)
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < float(sys.argv[2]):
            program(x)
            calls += 1
    rates[rows] = calls * rows / (time.perf_counter() - began)
print(json.dumps(rates))
"""


def measure(folder: Path, seconds: float) -> dict[int, float]:
    """Rows per second by batch size, measured for so many seconds each."""
    bundle = folder / "direct"
    if not bundle.exists():
        WORKLOADS["w2"].build(bundle)
    (program,) = bundle.glob("*.pt2")
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(program), str(seconds), json.dumps(BATCHES)],
        capture_output=True,
        text=True,
        timeout=60 + seconds * 2 * len(BATCHES),
        check=True,
    )
    return {int(rows): rate for rows, rate in json.loads(result.stdout).items()}
