"""Exported programs with linear layers in int8: weights by output channel, activations by the range they had.

What comes out is a plain .pt2 in the operators of `quantized_decomposed`; the runtime computes it with oneDNN
(`adapters/runtimes/cpu_int8.py`). Convolutions and embeddings stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from penstock_worker.adapters.compression.export import quiet
from penstock_worker.adapters.runtimes.cpu_int8 import register_operators
from penstock_worker.usecases.job_context import JobFailure

_HIGHEST, _WEIGHT_HIGHEST = 255, 127


def quantize_program(
    program: Any, feeds: Sequence[tuple[torch.Tensor, ...]], dimensions: dict[int, Any]
) -> tuple[Any, int]:
    """Quantize the linear layers of an exported program.

    Args:
        program: In fp32.
        feeds: Inputs to calibrate with.
        dimensions: Free dimensions of every input, as torch.export takes them.

    Returns:
        The quantized program, and how many layers were.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be exported again.
    """
    register_operators()
    module: GraphModule = program.module(check_guards=False)
    layers = [
        node
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if _weight(module, node) is not None
    ]
    ranges = _ranges(module, layers, feeds)
    for number, node in enumerate(layers):
        _quantize(module, node, number, *ranges[node])
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name in [name for name, _ in module.named_parameters() if name not in used]:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
    module.recompile()
    example = tuple(part[:2].clone() for part in feeds[0])
    with quiet(), torch.no_grad():
        try:
            made = torch.export.export(module, example, dynamic_shapes=tuple(dimensions for _ in example))
        except Exception as error:
            raise JobFailure(
                f"The quantized model cannot be exported: {str(error)[:500]}", "UNSUPPORTED"
            ) from error
    return made, len(layers)


def _weight(module: GraphModule, node: Node) -> torch.Tensor | None:
    source = node.args[1]
    if not isinstance(source, Node) or source.op != "get_attr":
        return None
    value: Any = module
    for name in str(source.target).split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else None


class _Ranges(Interpreter):
    """Computes a graph, and notes the range of what its linear layers take."""

    def __init__(self, module: GraphModule, layers: Sequence[Node]) -> None:
        super().__init__(module)
        self._layers = set(layers)
        self.found: dict[Node, tuple[float, float]] = {}

    def run_node(self, n: Node) -> Any:
        """Compute one node."""
        if n in self._layers:
            (taken, *_), _ = self.fetch_args_kwargs_from_env(n)
            low, high = self.found.get(n, (0.0, 0.0))
            self.found[n] = (min(low, float(taken.min())), max(high, float(taken.max())))
        return super().run_node(n)


def _ranges(
    module: GraphModule, layers: Sequence[Node], feeds: Sequence[tuple[torch.Tensor, ...]]
) -> dict[Node, tuple[float, float]]:
    watched = _Ranges(module, layers)
    with torch.no_grad():
        for inputs in feeds:
            watched.run(*inputs)
    return watched.found


def _quantize(module: GraphModule, node: Node, number: int, low: float, high: float) -> None:
    """Put a layer into its reference form: real = scale · (stored - zero), 0 ≤ stored ≤ 255."""
    operators = torch.ops.quantized_decomposed
    scale = max((high - low) / _HIGHEST, 1e-12)
    zero = round(-low / scale)
    weight = _weight(module, node)
    if weight is None:
        return
    scales = (weight.abs().amax(1) / _WEIGHT_HIGHEST).clamp_min(1e-12)
    stored = (weight / scales[:, None]).round().clamp(-_WEIGHT_HIGHEST, _WEIGHT_HIGHEST).to(torch.int8)
    names = [f"layer{number}_{part}" for part in ("weight", "scales", "zeros")]
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    for name, value in zip(names, (stored, scales, zeros), strict=True):
        module.register_buffer(name, value)
    graph = module.graph
    with graph.inserting_before(node):
        bits = graph.call_function(
            operators.quantize_per_tensor.default,
            (node.args[0], scale, zero, 0, _HIGHEST, torch.uint8),
        )
        real = graph.call_function(
            operators.dequantize_per_tensor.default, (bits, scale, zero, 0, _HIGHEST, torch.uint8)
        )
        constants = [graph.create_node("get_attr", name) for name in names]
        plain = graph.call_function(
            operators.dequantize_per_channel.default,
            (*constants, 0, -_WEIGHT_HIGHEST, _WEIGHT_HIGHEST, torch.int8),
        )
    node.update_arg(0, real)
    node.update_arg(1, plain)
