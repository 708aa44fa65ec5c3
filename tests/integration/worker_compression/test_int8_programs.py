"""Programs with linear layers in int8: what they give, and what the runtime makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock.common.v1 import tensor_pb2
from penstock.registry.v1 import manifest_pb2
from penstock_worker.adapters.compression.quantization_torch import quantize_program
from penstock_worker.adapters.measuring import open_version
from penstock_worker.adapters.runtimes import cpu_int8
from penstock_worker.adapters.runtimes.cpu_int8 import compute_in_int8

WIDTH = 32


def quantized(module: nn.Module) -> tuple[Any, int]:
    """A module in int8, with rows of 1 to 16."""
    generator = torch.Generator().manual_seed(0)
    dimensions = {0: torch.export.Dim("batch", min=1, max=16)}
    feeds = [(torch.randn(16, WIDTH, generator=generator),) for _ in range(16)]
    program = torch.export.export(module.eval(), (feeds[0][0][:2],), dynamic_shapes=(dimensions,))
    return quantize_program(program, feeds, dimensions)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def x() -> torch.Tensor:
    torch.set_num_threads(1)
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def test_the_reference_form_gives_nearly_what_fp32_gives(x: torch.Tensor) -> None:
    module = mlp()
    program, layers = quantized(module)
    assert layers == 3
    with torch.no_grad():
        wanted, given = module(x), program.module()(x)
    assert float((wanted - given).abs().max()) < 0.1 * float(wanted.abs().max())
    stored = [value for name, value in program.state_dict.items() if "weight" in name]
    assert {value.dtype for value in stored} == {torch.int8}


def test_onednn_gives_what_the_reference_form_gives(x: torch.Tensor) -> None:
    program, _ = quantized(mlp())
    reference, fast = program.module(), program.module()
    assert compute_in_int8(fast) == 3
    names = {str(node.target) for node in fast.graph.nodes}
    assert "onednn.qlinear_pointwise.default" in names
    # Between the first two layers numbers stay in 8 bits: brought to them are the input, and what tanh gives.
    assert sum("quantize_per_tensor" in str(node.target) for node in fast.graph.nodes) == 2
    assert not list(fast.named_parameters()) or all("bias" in name for name, _ in fast.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), reference(x), rtol=0.02, atol=0.01)
        assert fast(x[:1]).shape == (1, 4)


def test_without_onednn_weights_are_brought_back_once(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = quantized(mlp())
    reference, plain = program.module(), program.module()
    monkeypatch.setattr(cpu_int8, "_replace", lambda module, node, weight, rows: False)
    assert compute_in_int8(plain) == 3
    assert not any("dequantize_per_channel" in str(node.target) for node in plain.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), reference(x), rtol=1e-4, atol=1e-4)


def test_a_program_without_quantized_layers_stays_as_it_is(x: torch.Tensor) -> None:
    program = torch.export.export(mlp().eval(), (x,))
    module = program.module()
    before = str(module.graph)
    assert compute_in_int8(module) == 0
    assert str(module.graph) == before


def test_it_is_served_from_its_file(x: torch.Tensor, tmp_path: Path) -> None:
    module = mlp()
    program, _ = quantized(module)
    torch.export.save(program, tmp_path / "model.pt2")
    manifest = manifest_pb2.Manifest(runtime="torch", format="pt2", entrypoint="model.pt2")
    manifest.batching.max_batch_size = 16
    signature, kind = manifest.signature, tensor_pb2.DATA_TYPE_FP32
    signature.inputs.add(name="x", data_type=kind, shape=[-1, WIDTH])
    signature.outputs.add(name="y", data_type=kind, shape=[-1, 4])
    with open_version(tmp_path, manifest) as opened:
        given = opened.predict({"x": x.numpy()})["y"]
    with torch.no_grad():
        wanted = module(x).numpy()
    assert np.abs(given - wanted).max() < 0.1 * np.abs(wanted).max()
