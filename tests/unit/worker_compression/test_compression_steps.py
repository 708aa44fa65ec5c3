"""What single steps do to a module, without a job around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from penstock.registry.v1 import manifest_pb2
from penstock_kit.jobs.compress import step_of
from penstock_worker.adapters.compression.fitting import Plan, fit, loss_for
from penstock_worker.adapters.compression.layers import parameters_of, repeated_blocks, zeros_of
from penstock_worker.adapters.compression.pipeline import run_step
from penstock_worker.adapters.compression.steps.low_rank import rank_for
from penstock_worker.adapters.compression.steps.prune_2_4 import mask_2_4
from penstock_worker.adapters.compression.steps.prune_channels import free_layers
from penstock_worker.adapters.compression.structure import Change, apply_changes, state_of
from penstock_worker.adapters.compression.subject import Subject, load_subject
from penstock_worker.adapters.compression.teachers import ModuleTeacher
from penstock_worker.adapters.compression.tools import Facts, Tools
from penstock_worker.adapters.training.chain import Chain
from penstock_worker.adapters.training.rows import TensorRows
from penstock_worker.usecases.job_context import JobFailure, Stopped
from support.models import write_manifest

WIDTH, CLASSES = 16, 4


class Block(nn.Module):
    """A residual block, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


def build(blocks: int = 3) -> Chain:
    torch.manual_seed(0)
    parts = [nn.Linear(8, WIDTH), *(Block() for _ in range(blocks)), nn.Linear(WIDTH, CLASSES)]
    return Chain(parts)


def watch(done: int, total: int, phase: str) -> None:
    """Nobody looks."""


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    targets = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return Tools(
        manifest=manifest_pb2.Manifest(),
        questions=None,  # type: ignore[arg-type] # no step here asks a version
        rows=TensorRows(x, targets, torch.device("cpu")),
        loss=loss_for("classification"),
        teacher=lambda name: ModuleTeacher(name or "the source", build()),
        form=None,
        # "resnet" stands for one that answers otherwise.
        student=lambda name, parameters: Chain([nn.Linear(8, 7 if name == "resnet" else CLASSES)]),
        seed=0,
        scratch=tmp_path,
        watch=watch,
        log=lambda text: None,
    )


def run(subject: Subject, tools: Tools, name: str, **parameters: Any) -> Facts:
    return run_step(subject, step_of(name, parameters), tools)


def module_of(subject: Subject) -> nn.Module:
    assert subject.module is not None
    return subject.module


def linear_weights(subject: Subject) -> list[torch.Tensor]:
    parts = module_of(subject).modules()
    return [part.weight.detach() for part in parts if isinstance(part, nn.Linear)]


def accuracy(module: nn.Module, tools: Tools) -> float:
    inputs, targets = tools.rows.batch(torch.arange(len(tools.rows)))
    with torch.no_grad():
        return float((module(inputs).argmax(1) == targets).float().mean())


def learn(module: nn.Module, tools: Tools, epochs: float = 20) -> None:
    def loss_of(indices: torch.Tensor) -> torch.Tensor:
        inputs, targets = tools.rows.batch(indices)
        return tools.loss(module(inputs), targets)

    fit(module, tools.rows, Plan(epochs, 0.01), loss_of, watch, "learning")


def test_no_weight_is_beyond_its_bound_after_clipping(tools: Tools) -> None:
    subject = Subject(module=build())
    facts = run(subject, tools, "clip", absolute=0.1)
    weights = linear_weights(subject)
    assert max(float(weight.abs().max()) for weight in weights) == pytest.approx(0.1)
    assert 0 < facts["clipped"] < 1


def test_a_percentile_clips_so_many_weights_of_each_layer(tools: Tools) -> None:
    facts = run(Subject(module=build()), tools, "clip", percentile=90)
    assert facts["clipped"] == pytest.approx(0.1, abs=0.01)


def test_only_the_layers_that_were_named_are_changed(tools: Tools) -> None:
    subject, before = Subject(module=build()), build().state_dict()
    run(subject, tools, "clip", absolute=0.01, layers=["1"])
    changed = {
        name for name, value in module_of(subject).state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"1.up.weight", "1.down.weight"}


def test_a_layer_that_is_not_there_is_named_with_those_that_are(tools: Tools) -> None:
    with pytest.raises(JobFailure, match=r"'head'; there are 0, 1\.up"):
        run(Subject(module=build()), tools, "clip", layers=["head"])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_stay_zero_while_the_others_are_repaired(tools: Tools, scope: str) -> None:
    subject = Subject(module=build())
    learn(module_of(subject), tools)
    before = accuracy(module_of(subject), tools)
    facts = run(subject, tools, "prune", amount=0.6, scope=scope, repair_epochs=5, learning_rate=0.01)
    weights = linear_weights(subject)
    assert zeros_of(weights) == pytest.approx(0.6, abs=0.01)
    assert facts["zeros"] == zeros_of(weights)
    assert not any(name.endswith("_mask") for name in module_of(subject).state_dict())
    assert accuracy(module_of(subject), tools) >= before - 0.05


def test_two_of_four_weights_are_zero_and_the_larger_ones_are_kept(tools: Tools) -> None:
    weight = torch.tensor([[1.0, -5.0, 2.0, 3.0, 0.0, 0.1, -0.3, 0.2]])
    assert mask_2_4(weight).tolist() == [[0, 1, 0, 1, 0, 0, 1, 1]]
    subject = Subject(module=build())
    facts = run(subject, tools, "prune_2_4", repair_epochs=1)
    assert facts["zeros"] == pytest.approx(0.5, abs=0.01)
    groups = module_of(subject).get_submodule("1.up").weight.reshape(-1, 4)
    assert int((groups == 0).sum(1).min()) >= 2


def test_channels_that_go_make_the_tensors_smaller_and_the_answers_keep_their_shape(tools: Tools) -> None:
    subject = Subject(module=build())
    module = module_of(subject)
    learn(module, tools)
    before = parameters_of(module)
    # What the blocks add to is as wide as it was: only what is inside them may shrink.
    assert free_layers(module, tools.example()) == ["1.up", "2.up", "3.up"]
    facts = run(subject, tools, "prune_channels", amount=0.5, repair_epochs=5)
    assert module.get_submodule("1.up").weight.shape == (2 * WIDTH, WIDTH)
    assert module.get_submodule("1.down").weight.shape == (WIDTH, 2 * WIDTH)
    assert facts["parameters"] == parameters_of(module) / before < 0.6
    assert accuracy(module, tools) > 0.9


def test_a_low_rank_layer_is_two_that_compute_nearly_the_same(tools: Tools) -> None:
    chain = Chain([nn.Linear(32, 32), nn.Linear(32, CLASSES)])
    with torch.no_grad():
        chain.get_submodule("0").weight.copy_(torch.randn(32, 4) @ torch.randn(4, 32))
    x = torch.randn(10, 32)
    wanted = chain(x)
    subject = Subject(module=chain)
    facts = run(subject, tools, "low_rank", energy=0.999999, layers=["0"])
    pair = chain.get_submodule("0")
    assert [tuple(part.weight.shape) for part in pair.children()] == [(4, 32), (32, 4)]
    assert facts["layers"] == 1
    torch.testing.assert_close(chain(x), wanted, rtol=1e-3, atol=1e-3)


def test_a_layer_that_would_not_get_smaller_stays_one(tools: Tools) -> None:
    subject = Subject(module=build())
    assert run(subject, tools, "low_rank", energy=1.0)["layers"] == 0
    assert not subject.changes


def test_the_rank_follows_from_the_energy() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [rank_for(values, share) for share in (0.6, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("importance", ["loss", "similarity"])
def test_the_block_that_does_nothing_is_the_first_to_go(tools: Tools, importance: str) -> None:
    subject = Subject(module=build())
    learn(module_of(subject), tools)
    idle = module_of(subject).get_submodule("2.down")
    nn.init.zeros_(idle.weight)
    nn.init.zeros_(idle.bias)
    x, _ = tools.rows.batch(torch.arange(8))
    wanted = module_of(subject)(x)
    run(subject, tools, "drop_layers", importance=importance, repair_epochs=0)
    assert [name for name, _ in module_of(subject).named_children()] == ["0", "1", "3", "4"]
    assert module_of(subject)(x).equal(wanted)


def test_more_blocks_than_there_are_cannot_go(tools: Tools) -> None:
    with pytest.raises(JobFailure, match="one must stay"):
        run(Subject(module=build()), tools, "drop_layers", layers=3)
    with pytest.raises(JobFailure, match="no repeated blocks"):
        run(Subject(module=Chain([nn.Linear(8, CLASSES)])), tools, "drop_layers")


def test_blocks_are_what_repeats(tools: Tools) -> None:
    found = repeated_blocks(build())
    assert found is not None
    assert (found.container, found.names) == ("", ("1", "2", "3"))
    assert repeated_blocks(Chain([nn.Linear(4, 4), nn.Linear(4, 4)])) is None


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_a_student_with_fewer_layers_learns_its_teachers_answers(tools: Tools, hidden: float) -> None:
    teacher = build()
    learn(teacher, tools)
    taught = _with_teacher(tools, teacher)
    subject = Subject(module=build())
    run(subject, taught, "distill", keep_layers=1, epochs=25, learning_rate=0.01, hidden=hidden, alpha=1.0)
    assert [name for name, _ in module_of(subject).named_children()] == ["0", "1", "4"]
    assert accuracy(module_of(subject), tools) > 0.9


def test_a_student_of_another_architecture_takes_the_place_of_the_model(tools: Tools) -> None:
    subject = Subject(module=build())
    facts = run(subject, tools, "distill", student="linear", epochs=1)
    assert facts["parameters"] < 0.05
    assert subject.changes[0]["architecture"] == "linear"


def test_a_teacher_and_a_student_that_answer_differently_are_refused(tools: Tools) -> None:
    subject = Subject(module=build())
    with pytest.raises(JobFailure, match=r"\[4\] numbers, the student with \[7\]") as refused:
        run(subject, tools, "distill", student="resnet")
    assert refused.value.cause == "INVALID_RECIPE"


def test_a_loss_that_is_no_number_ends_the_step(tools: Tools) -> None:
    subject = Subject(module=build())
    with torch.no_grad():
        module_of(subject).get_submodule("0").weight.fill_(torch.nan)
    with pytest.raises(JobFailure) as diverged:
        run(subject, tools, "prune", repair_epochs=1)
    assert diverged.value.cause == "DIVERGED"


def test_a_step_stops_when_the_job_shall_stop(tools: Tools) -> None:
    def stop(done: int, total: int, phase: str) -> None:
        if "repair" in phase:
            raise Stopped

    stopping = Tools(**{**_fields(tools), "watch": stop})
    with pytest.raises(Stopped):
        run(Subject(module=build()), stopping, "prune", repair_epochs=1)


@pytest.mark.parametrize(
    "steps",
    [
        [("prune_channels", {"amount": 0.5, "repair_epochs": 0})],
        [("drop_layers", {"repair_epochs": 0}), ("low_rank", {"rank": 3})],
        [("low_rank", {"rank": 2}), ("prune_channels", {"amount": 0.25, "repair_epochs": 0})],
    ],
)
def test_what_was_saved_is_what_is_loaded(tools: Tools, steps: list[tuple[str, Mapping[str, Any]]]) -> None:
    subject = Subject(module=build())
    for name, parameters in steps:
        run(subject, tools, name, **parameters)
    directory = tools.scratch / "saved"
    directory.mkdir()
    subject.save(directory)
    loaded = load_subject(directory, lambda changes: build(), tools.scratch)
    x, _ = tools.rows.batch(torch.arange(8))
    assert module_of(loaded)(x).equal(module_of(subject)(x))
    assert loaded.changes == subject.changes


def test_a_change_nobody_knows_is_refused() -> None:
    changes: list[Change] = [{"change": "mystery"}]
    with pytest.raises(ValueError, match="mystery"):
        apply_changes(build(), changes, state_of(build()))


def test_weights_of_a_pushed_onnx_file_are_clipped_and_nothing_else_is(tools: Tools, tmp_path: Path) -> None:
    weight = torch.randn(6, 4).numpy()
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["h"]),
            onnx.helper.make_node("Add", ["h", "b"], ["y"]),
        ],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[:1] * 9, "b")],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "given.onnx")
    subject = Subject(graph=tmp_path / "given.onnx")
    run(subject, tools, "clip", absolute=0.5)
    assert subject.graph is not None
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(subject.graph).graph.initializer
    }
    assert abs(stored["w"]).max() == pytest.approx(0.5)
    assert (stored["b"] == weight[:1] * 9).all()


def test_a_pushed_graph_cannot_be_taken_apart(tools: Tools, tmp_path: Path) -> None:
    write_manifest(tmp_path, runtime="onnx", kind="onnx", entrypoint="m.onnx", inputs=[], outputs=[])
    for name in ("prune_channels", "distill", "drop_layers", "low_rank"):
        with pytest.raises(JobFailure, match="only our recipes say how") as refused:
            run(Subject(graph=tmp_path / "m.onnx"), tools, name)
        assert refused.value.cause == "UNSUPPORTED"


def _fields(tools: Tools) -> dict[str, Any]:
    return {name: getattr(tools, name) for name in Tools.__slots__}


def _with_teacher(tools: Tools, teacher: nn.Module) -> Tools:
    return Tools(**{**_fields(tools), "teacher": lambda name: ModuleTeacher(name, teacher)})
