"""Linear layers on a CPU with their weights packed once, at load, instead of in each call.

A matrix product reads its weights in blocks. Plain `aten.linear` brings them into that order in each call,
which for few rows takes as long as the product itself: on an AMD EPYC (Zen 4), one thread, fp32, three layers
of 1024, 4096 and 4096 inputs take 25 ms for 16 rows so, and 13 ms with the weights packed. oneDNN, which
torch brings along, can keep them packed; torch.compile uses the same operators when it freezes a model, but
needs a C++ compiler where it runs.

Sums are taken in another order, so that answers differ in the last bits of fp32. What pays depends on the
processor and the shape, so each shape is tried both ways before it is changed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch.fx import GraphModule, Node

from penstock_kit.errors import FailedPrecondition, Reason

log = logging.getLogger(__name__)

PARAMETER = "pack_weights"
# Smaller weights stay in the processor's caches whatever their order.
_SMALLEST = 1 << 14
# A packed layer must be so much faster to be worth other last bits.
_GAIN = 1.1
_TRIES = 2
# For a dimension of the input that is not known before the call, beside the batch.
_USUAL_LENGTH = 16
# Nobody needs more to see which way is faster.
_MOST_ROWS = 256
# Between two orders of summing: of the largest number in the answer.
_TOLERANCE = 1e-4


class PackMode(StrEnum):
    """Which weights are packed."""

    AUTO = "auto"
    """Those of layers that a trial shows to be faster with it."""
    OFF = "off"


def mode_of(parameters: Mapping[str, str]) -> PackMode:
    """Return what a bundle's parameters ask for.

    Raises:
        FailedPrecondition: LOAD_FAILED if there is no such mode.
    """
    word = parameters.get(PARAMETER, PackMode.AUTO)
    try:
        return PackMode(word)
    except ValueError as error:
        raise FailedPrecondition(
            f"The parameter {PARAMETER} is {word!r}; it may be {', '.join(PackMode)}.",
            reason=Reason.LOAD_FAILED,
        ) from error


def pack_linear_layers(module: GraphModule, max_rows: int) -> int:
    """Replace linear layers of an exported program where that is faster; return how many were.

    The weights that nothing else uses are let go of, so that memory does not grow.

    Args:
        module: On the CPU; it is changed.
        max_rows: Rows in one call of the model at most.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    verdicts: dict[tuple[int, ...], bool] = {}
    replaced: list[str] = []
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        source = node.args[1]
        weight = _parameter(module, source)
        if weight is None or not isinstance(source, Node) or not _packable(weight):
            continue
        rows = min(_rows(node, max_rows), _MOST_ROWS)
        shape = (rows, *weight.shape)
        if shape not in verdicts:
            verdicts[shape] = rows > 1 and _pays(weight, rows)
        if verdicts[shape]:
            replaced.append(str(source.target))
            _replace(module, node, weight, rows)
    if replaced:
        module.graph.eliminate_dead_code()
        _drop_unused(module, replaced)
        module.recompile()
        log.info("packed the weights of linear layers", extra={"layers": len(replaced)})
    return len(replaced)


def _packable(weight: torch.Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.layout == torch.strided
    return bool(plain and weight.device.type == "cpu" and weight.dim() == 2 and weight.numel() >= _SMALLEST)


def _parameter(module: GraphModule, node: Any) -> torch.Tensor | None:
    """Return the parameter that a node of the graph stands for."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, torch.nn.Parameter) else None


def _rows(node: Node, max_rows: int) -> int:
    """Return how many rows the layer computes in a call of the model that is full."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(value, torch.Tensor):
        return max_rows
    sizes = []
    for axis, size in enumerate(value.shape[:-1]):
        unknown = max_rows if axis == 0 else _USUAL_LENGTH
        sizes.append(size if isinstance(size, int) else unknown)
    return math.prod(sizes)


def _pays(weight: torch.Tensor, rows: int) -> bool:
    """Try a layer both ways: is it faster packed, and the same?"""
    with torch.inference_mode():
        x = torch.rand(rows, weight.shape[1]) - 0.5
        try:
            packed = _pack(weight, rows)
            plain, before = _best(lambda: torch.nn.functional.linear(x, weight))
            other, after = _best(lambda: _packed_linear(x, packed))
        except RuntimeError as error:  # oneDNN does not do this on this processor
            log.info("weights cannot be packed", extra={"error": str(error)[:200]})
            return False
        scale = max(float(plain.abs().max()), 1e-30)
        same = float((plain - other).abs().max()) <= _TOLERANCE * scale
    return same and before > _GAIN * after


def _best(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return what a call gives, and the seconds of the fastest of a few."""
    best = math.inf
    result = call()  # the first one prepares
    for _ in range(_TRIES):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def _pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return packed


def _packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return result


def _replace(module: GraphModule, node: Node, weight: torch.Tensor, rows: int) -> None:
    """Put the packed form in a layer's place, and the ReLU behind it, if there is one, into it."""
    graph = module.graph
    name = f"_packed_{sum(1 for known in vars(module) if known.startswith('_packed_'))}"
    # No buffer and no parameter: what walks over those expects memory that it can look into.
    setattr(module, name, _pack(weight, rows))
    users = list(node.users)
    relu = users[0] if len(users) == 1 and users[0].target == torch.ops.aten.relu.default else None
    bias = node.args[2] if len(node.args) > 2 else None
    with graph.inserting_before(node):
        packed = graph.create_node("get_attr", name)
        arguments: tuple[Any, ...] = (node.args[0], packed, bias, "relu" if relu else "none", [], "")
        made = graph.call_function(torch.ops.mkldnn._linear_pointwise.default, arguments)
    made.meta = dict((relu or node).meta)
    (relu or node).replace_all_uses_with(made)
    if relu:
        graph.erase_node(relu)
    graph.erase_node(node)


def _drop_unused(module: GraphModule, names: Sequence[str]) -> None:
    """Let go of those parameters that the graph does not mention any more."""
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name in set(names) - used:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
