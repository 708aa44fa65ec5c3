"""What is served: the same models, with the same weights, on every server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from penstock.registry.v1.manifest_pb2 import Manifest
from support.models import ECHO_WIDTH, MLP_INPUT, MLP_OUTPUT, build_echo_python, build_mlp_pt2, build_python

Array = np.ndarray[Any, np.dtype[np.float32]]

SLEEP_SECONDS = 0.020
_SLEEP = f'''import time


class Model:
    """A model of {SLEEP_SECONDS * 1000:g} ms, whatever the rows, that takes no processor."""

    def predict(self, inputs):
        time.sleep({SLEEP_SECONDS})
        return {{"y": inputs["x"]}}
'''


@dataclass(frozen=True)
class Workload:
    """One model.

    Attributes:
        key: How it is chosen on the command line.
        model: Name under which it is served.
        title: For people.
        width: Numbers (fp32) of one row.
        outputs: Numbers of one answer.
        max_batch: Rows that a server may join.
        wait_seconds: How long a server that needs to be told may wait for more rows.
        rates: Requests per second of the open loop: a light load and a heavy one that most can bear.
        build: Writes our bundle.
    """

    key: str
    model: str
    title: str
    width: int
    outputs: int
    max_batch: int
    wait_seconds: float
    rates: tuple[float, ...]
    build: Callable[[Path], Manifest]

    def row(self) -> Array:
        """One input, the same each time."""
        return np.random.default_rng(7).standard_normal((1, self.width), dtype=np.float32)

    def expected(self, row: Array) -> Array:
        """What the model makes of a row."""
        if self.key != "w2":
            return row
        import torch

        with torch.inference_mode():
            result: Array = _mlp()(torch.from_numpy(row)).numpy()
        return result


@cache
def _mlp() -> Any:
    from performance.peers.compute import mlp

    return mlp()


def _build_sleep(folder: Path) -> Manifest:
    return build_python(folder, _SLEEP, max_batch_size=8)


def _build_mlp(folder: Path) -> Manifest:
    return build_mlp_pt2(folder)


WORKLOADS = {
    workload.key: workload
    for workload in (
        Workload("w1", "echo", "W1 echo", ECHO_WIDTH, ECHO_WIDTH, 64, 0.0, (500, 4000), build_echo_python),
        Workload("w2", "mlp", "W2 mlp", MLP_INPUT, MLP_OUTPUT, 32, 0.002, (100, 600), _build_mlp),
        # Not a speed test: its capacity is known, 400 rows a second for each copy.
        Workload("sleep", "sleep", "20 ms model", ECHO_WIDTH, ECHO_WIDTH, 8, 0.0, (200,), _build_sleep),
    )
}
