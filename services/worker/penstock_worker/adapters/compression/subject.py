"""What is compressed: a module of a recipe, or a graph that somebody pushed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from penstock_worker.adapters.compression.layers import choose
from penstock_worker.adapters.compression.structure import CHANGES_FILE, Change, apply_changes, state_of
from penstock_worker.adapters.runtimes.cpu_int8 import register_operators_for
from penstock_worker.adapters.runtimes.pt2_safety import refuse_unsafe_pt2
from penstock_worker.usecases.job_context import JobFailure

# Operators of ONNX whose constant operand is a layer's weight.
_ONNX_LAYERS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_STATE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of a layer, as torch.nn.utils.prune names them.

    Attributes:
        name: Of the layer, or of the tensor in a graph.
        owner: The module that has it.
        attribute: What the module calls it.
    """

    name: str
    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> torch.Tensor:
        """The numbers themselves."""
        found: torch.Tensor = getattr(self.owner, self.attribute)
        return found


@dataclass(slots=True)
class Subject:
    """What is compressed, as far as it has come.

    Attributes:
        module: The model, if it can be trained and taken apart; else None.
        graph: The file of its graph, if it cannot: .pt2 or .onnx.
        changes: What was done to the module since its recipe built it.
    """

    module: nn.Module | None = None
    graph: Path | None = None
    changes: list[Change] = field(default_factory=list)

    @property
    def format(self) -> str:
        """pt2 or onnx: what a bundle of it will be."""
        return "pt2" if self.graph is None else self.graph.suffix.removeprefix(".")

    def need_module(self, step: str) -> nn.Module:
        """Return the module.

        Raises:
            JobFailure: UNSUPPORTED if there is none.
        """
        if self.module is None:
            raise JobFailure(
                f"The step {step} takes a model apart or trains it, and only our recipes say how their "
                "models are built. A pushed graph can be clipped, pruned without repair, and quantized.",
                "UNSUPPORTED",
            )
        return self.module

    def need_graph(self) -> Path:
        """Return the file of the graph, where the caller knows that there is one."""
        if self.graph is None:
            raise ValueError("it is a module")
        return self.graph

    def save(self, directory: Path) -> None:
        """Write all that `load_subject` needs."""
        if self.graph is not None:
            shutil.copyfile(self.graph, directory / f"model.{self.format}")
            return
        save_file(state_of(self.need_module("save")), directory / _STATE)
        (directory / CHANGES_FILE).write_text(json.dumps(self.changes))


def load_subject(directory: Path, build: Callable[[Sequence[Change]], nn.Module], scratch: Path) -> Subject:
    """Return what `Subject.save` wrote.

    Args:
        directory: Where it is; is left alone.
        build: Returns a fresh module: of the source, or of the student that the changes name.
        scratch: Where a graph is copied to.
    """
    for name in ("model.pt2", "model.onnx"):
        if (directory / name).exists():
            scratch.mkdir(parents=True, exist_ok=True)
            return Subject(graph=Path(shutil.copyfile(directory / name, scratch / name)))
    changes: list[Change] = json.loads((directory / CHANGES_FILE).read_text())
    module = apply_changes(build(changes), changes, load_file(directory / _STATE))
    module.eval()
    return Subject(module=module, changes=changes)


class GraphWeights(nn.Module):
    """The weights of the layers of a graph, as parameters that can be changed and put back.

    Args:
        path: A .pt2 or .onnx file.

    Raises:
        JobFailure: UNSUPPORTED for another format.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._names: dict[str, str] = {}
        if path.suffix == ".pt2":
            refuse_unsafe_pt2(path)
            self._program = load_program(path)
            tensors = {
                name: tensor
                for name, tensor in self._program.state_dict.items()
                if name in self._program.graph_signature.parameters and tensor.dim() >= 2
            }
        elif path.suffix == ".onnx":
            self._model = onnx.load(path)
            tensors = _onnx_weights(self._model)
        else:
            raise JobFailure(f"Weights of {path.name} cannot be changed.", "UNSUPPORTED")
        for index, (name, tensor) in enumerate(sorted(tensors.items())):
            if tensor.is_floating_point():
                self.register_parameter(f"p{index}", nn.Parameter(tensor.detach().clone()))
                self._names[f"p{index}"] = name

    def weights(self, chosen: Sequence[str]) -> list[Weight]:
        """Return them by the names that the graph has for them."""
        wanted = set(choose(self._names.values(), chosen))
        return [Weight(name, self, key) for key, name in self._names.items() if name in wanted]

    def store(self, target: Path) -> None:
        """Write the graph with the weights as they are now."""
        values = {name: getattr(self, key).detach() for key, name in self._names.items()}
        if self._path.suffix == ".pt2":
            for name, value in values.items():
                with torch.no_grad():
                    self._program.state_dict[name].copy_(value)
            save_program(self._program, target)
            return
        for tensor in self._model.graph.initializer:
            if tensor.name in values:
                tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name].numpy(), tensor.name))
        onnx.save(self._model, target)


def weights_of(module: nn.Module, chosen: Sequence[str]) -> list[Weight]:
    """Return the weights of linear and convolutional layers and of torch's attention."""
    found = {
        name: Weight(name, part, attribute)
        for name, part in module.named_modules()
        for attribute in ("weight", "in_proj_weight")
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.MultiheadAttention)
        and isinstance(getattr(part, attribute, None), torch.Tensor)
    }
    return [found[name] for name in choose(found, chosen)]


def load_program(path: Path) -> Any:
    """Open a .pt2 file, which must have been looked at by `refuse_unsafe_pt2` if it came from outside."""
    register_operators_for(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(str(path))


def save_program(program: Any, path: Path) -> None:
    """Write a .pt2 file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, str(path))


def _onnx_weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    used = {name for node in model.graph.node if node.op_type in _ONNX_LAYERS for name in node.input}
    return {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
        if tensor.name in used and len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
