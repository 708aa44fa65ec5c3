"""Linear layers whose weights are packed at load: the same answers, no more memory, and only on request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx import GraphModule

from penstock_kit.errors import FailedPrecondition
from penstock_worker.adapters.runtimes import cpu_packing
from penstock_worker.adapters.runtimes.cpu_packing import PackMode, mode_of, pack_linear_layers

PACKED = torch.ops.mkldnn._linear_pointwise.default
PLAIN = torch.ops.aten.linear.default

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


class Perceptron(torch.nn.Module):
    """Two answers: the hidden numbers are looked at beside the last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(128, 256)
        self.second = torch.nn.Linear(256, 256, bias=False)
        self.third = torch.nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.first(x)
        return self.third(torch.relu(self.second(torch.relu(hidden)))), hidden


class Tied(torch.nn.Module):
    """One weight for a table of rows and for a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.table(x), self.table.weight)


@pytest.fixture(autouse=True)
def _every_layer_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way is faster differs between processors; that both give the same does not."""
    monkeypatch.setattr(cpu_packing, "_GAIN", 0.0)


def exported(model: torch.nn.Module, example: torch.Tensor) -> GraphModule:
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


def targets(module: GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33])
def test_a_packed_model_answers_as_before_for_any_number_of_rows(rows: int) -> None:
    model = Perceptron()
    module = exported(model, torch.randn(2, 128))
    assert pack_linear_layers(module, 32) == 3
    x = torch.randn(rows, 128)
    with torch.inference_mode():
        for got, expected in zip(module(x), model(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_relu_goes_into_its_layer_unless_the_layer_is_looked_at_before_it() -> None:
    module = exported(Perceptron(), torch.randn(2, 128))
    pack_linear_layers(module, 32)
    functions = [node.args[3] for node in module.graph.nodes if node.target == PACKED]
    assert functions == ["none", "relu", "none"]
    assert targets(module).count(torch.ops.aten.relu.default) == 1


def test_the_plain_weights_are_let_go_of() -> None:
    module = exported(Perceptron(), torch.randn(2, 128))
    pack_linear_layers(module, 32)
    assert PLAIN not in targets(module)
    # Biases are what is left.
    assert sum(parameter.numel() for parameter in module.parameters()) == 256 + 128


def test_a_weight_that_something_else_uses_stays() -> None:
    model = Tied()
    module = exported(model, torch.tensor([1, 2]))
    assert pack_linear_layers(module, 32) == 1
    x = torch.arange(5)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_inputs_may_lie_where_no_compiler_would_put_them() -> None:
    model = Perceptron()
    module = exported(model, torch.randn(2, 128))
    pack_linear_layers(module, 32)
    raw = np.zeros(4 * 128 * 4 + 4, np.uint8)
    raw[4:] = np.random.default_rng(0).random(4 * 128, np.float32).view(np.uint8)
    shifted = torch.from_numpy(raw[4:].view(np.float32).reshape(4, 128))
    turned = torch.rand(128, 4).T
    with torch.inference_mode():
        for x in (shifted, turned):
            torch.testing.assert_close(module(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


def test_layers_of_sequences_are_packed_even_where_a_batch_is_one_row() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    module = exported(model, torch.randn(2, 9, 128))
    assert pack_linear_layers(module, 1) == 2
    x = torch.randn(3, 9, 128)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_single_rows_small_layers_and_other_precisions_stay_as_they_are() -> None:
    assert pack_linear_layers(exported(Perceptron(), torch.randn(2, 128)), 1) == 0
    assert pack_linear_layers(exported(torch.nn.Linear(16, 16), torch.randn(2, 16)), 32) == 0
    double = torch.nn.Linear(256, 256).double()
    assert pack_linear_layers(exported(double, torch.randn(2, 256).double()), 32) == 0


def test_a_layer_that_would_not_be_faster_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packing, "_GAIN", float("inf"))
    module = exported(Perceptron(), torch.randn(2, 128))
    assert pack_linear_layers(module, 32) == 0
    assert targets(module).count(PLAIN) == 3


def test_a_layer_that_would_give_something_else_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packing, "_packed_linear", lambda x, _: x.new_ones(len(x), 1))
    assert pack_linear_layers(exported(Perceptron(), torch.randn(2, 128)), 32) == 0


def test_a_mode_that_does_not_exist_is_refused_with_those_that_do() -> None:
    assert mode_of({}) is PackMode.AUTO
    assert mode_of({"pack_weights": "off"}) is PackMode.OFF
    with pytest.raises(FailedPrecondition, match="pack_weights is 'yes'; it may be auto, off"):
        mode_of({"pack_weights": "yes"})
