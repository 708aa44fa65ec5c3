"""Strategies over nccl come to the model of one process on the CPU. Needs two GPUs in one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.strategy_ranks import Case, alone, difference, together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pipeline", "tensor_parallel", "parameter_server"])
def test_two_gpus_come_to_the_weights_of_one_process(name: str, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    first = Case(strategy={"name": name}, gpus=2, clip=1.0, save=checkpoint)
    then = Case(strategy={"name": name}, gpus=2, clip=1.0, load=checkpoint, steps=5)
    half = Case(strategy={"name": name}, gpus=2, precision="bf16", model="transformer", steps=60)
    results = together(tmp_path / "group", 2, [first, then, half])
    assert [result.failure for result in results] == [None] * 3
    # Products of matrices in TF32 or other orders: a part of 20 steps of a rate of 0.001.
    assert difference(results[0].weights, alone(Case(clip=1.0), tmp_path).weights) < 1e-3
    assert difference(results[1].weights, alone(Case(clip=1.0, steps=25), tmp_path).weights) < 1e-3
    assert results[2].accuracy > 0.3
