"""Linear layers in int8 of an exported program, on a CPU: oneDNN's kernels instead of the reference.

Quantized programs say what they compute in the operators of torch's `quantized_decomposed`: numbers are
brought to 8 bits and back before a plain `aten.linear`, whose weight is brought back from 8 bits as well.
Any processor computes that, but no faster than fp32, and the weights anew in each call. oneDNN, which torch
brings along, multiplies the 8-bit numbers themselves (AVX512-VNNI, AMX); torch.compile uses the same
operators, but needs a C++ compiler where it runs. Sums of products of integers are exact, so answers differ
by the rounding of fp32 alone.

On an AMD EPYC (Zen 4), one thread, three layers of 1024, 4096 and 4096 inputs, 32 rows: 4.9 ms a call, ONNX
Runtime's int8 kernels 5.9 ms, fp32 with packed weights 18.5 ms; with 8 rows 1.6 ms and 2.8 ms.
"""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

log = logging.getLogger(__name__)

# Between two orders of summing in fp32: of the largest number in the answer.
_TOLERANCE = 1e-3
_TRIED_ROWS = 2
# Rows that weights are packed for: packed for fewer they are slower for any number (for 8 rows by half), and
# for more nothing changes.
_LEAST_ROWS, _MOST_ROWS = 16, 256
_OPERATORS = "quantized_decomposed"
# Places among the arguments of onednn::qlinear_pointwise.
_OUT_SCALE, _OUT_ZERO, _OUT_DTYPE = 7, 8, 9


def register_operators() -> None:
    """Make the operators known that quantized programs are written in, before one is opened or made."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - it registers them


def register_operators_for(path: Path) -> None:
    """Do so if a .pt2 file needs them: the import takes longer than a small model takes to load."""
    with zipfile.ZipFile(path) as archive:
        graphs = [name for name in archive.namelist() if name.endswith(".json") and "/models/" in name]
        if any(_OPERATORS.encode() in archive.read(name) for name in graphs):
            register_operators()


def compute_in_int8(module: GraphModule, max_rows: int = 1) -> int:
    """Replace the quantized linear layers of an exported program; return how many there were.

    Where oneDNN cannot compute them (another processor, another build of torch) their weights are brought
    back to fp32 once, so that they are as fast as if they had not been quantized.

    Args:
        module: On the CPU; it is changed.
        max_rows: Rows in one call of the model at most.
    """
    found = 0
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = node.args[1]
        if not _is(weight, f"{_OPERATORS}.dequantize_per_channel.default"):
            continue
        found += 1
        if not _replace(module, node, weight, min(max(max_rows, _LEAST_ROWS), _MOST_ROWS)):
            _bring_back(module, node, weight)
    if found:
        module.graph.eliminate_dead_code()
        _drop_unused(module)
        module.recompile()
        log.info("linear layers compute in int8", extra={"layers": found})
    return found


def _is(node: Any, name: str) -> bool:
    """Whether a node calls an operator; by its name, as those of plain programs are all that may be known."""
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) == name


def _constant(module: GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value.detach() if isinstance(value, torch.Tensor) else None


def _replace(module: GraphModule, node: Node, weight: Node, rows: int) -> bool:
    """Put oneDNN's layer in the place of one in the reference form, if that works here."""
    back = node.args[0]
    if not _is(back, f"{_OPERATORS}.dequantize_per_tensor.default") or not isinstance(back, Node):
        return False
    quantized, scale, zero = back.args[0], back.args[1], back.args[2]
    stored, scales, zeros = (_constant(module, part) for part in weight.args[:3])
    bias_node = node.args[2] if len(node.args) > 2 else None
    bias = _constant(module, bias_node) if bias_node is not None else None
    if stored is None or scales is None or zeros is None or (bias_node is not None and bias is None):
        return False
    if not isinstance(scale, float) or not isinstance(zero, int):
        return False
    try:
        packed = torch.ops.onednn.qlinear_prepack(stored.contiguous(), [rows, stored.shape[1]])
        fits = _agrees(stored, scales, zeros, bias, packed, scale, zero)
    except (RuntimeError, AttributeError) as error:
        log.info("int8 cannot be computed by oneDNN", extra={"error": str(error)[:200]})
        return False
    if not fits:
        return False
    users = list(node.users)
    relu = users[0] if len(users) == 1 and users[0].target == torch.ops.aten.relu.default else None
    graph = module.graph
    number = sum(1 for known in vars(module) if known.startswith("_int8_"))
    # No buffer: what walks over those expects memory that it can look into.
    setattr(module, f"_int8_{number}", packed)
    quantized = _stay_in_int8(quantized, scale, zero)
    with graph.inserting_before(node):
        arguments: tuple[Any, ...] = (
            *(quantized, scale, zero, graph.create_node("get_attr", f"_int8_{number}")),
            *(weight.args[1], weight.args[2], bias_node, 1.0, 0, torch.float32),
            *("relu" if relu else "none", [], ""),
        )
        made = graph.call_function(torch.ops.onednn.qlinear_pointwise.default, arguments)
    made.meta = dict((relu or node).meta)
    (relu or node).replace_all_uses_with(made)
    if relu:
        graph.erase_node(relu)
    graph.erase_node(node)
    return True


def _stay_in_int8(quantized: Any, scale: float, zero: int) -> Any:
    """Let the layer before give 8-bit numbers at once, where nothing else looks at what it gives."""
    if not _is(quantized, f"{_OPERATORS}.quantize_per_tensor.default"):
        return quantized
    before = quantized.args[0]
    if not _is(before, "onednn.qlinear_pointwise.default") or len(before.users) != 1:
        return quantized
    for place, value in ((_OUT_SCALE, scale), (_OUT_ZERO, zero), (_OUT_DTYPE, torch.uint8)):
        before.update_arg(place, value)
    return before


def _agrees(
    stored: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    packed: torch.Tensor,
    scale: float,
    zero: int,
) -> bool:
    """Whether oneDNN gives what the reference gives, for a few rows of numbers all over the range."""
    generator = torch.Generator().manual_seed(0)
    shape = (_TRIED_ROWS, stored.shape[1])
    numbers = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    weight = (stored.float() - zeros[:, None].float()) * scales[:, None]
    wanted = torch.nn.functional.linear((numbers.float() - zero) * scale, weight, bias)
    given = torch.ops.onednn.qlinear_pointwise(
        numbers, scale, zero, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    most = max(float(wanted.abs().max()), 1e-30)
    return float((given - wanted).abs().max()) <= _TOLERANCE * most


def _bring_back(module: GraphModule, node: Node, weight: Node) -> None:
    """Let a layer have its weight in fp32."""
    stored, scales, zeros = (_constant(module, part) for part in weight.args[:3])
    if stored is None or scales is None or zeros is None:
        return
    number = sum(1 for known, _ in module.named_parameters() if known.startswith("fp32_"))
    plain = (stored.float() - zeros[:, None].float()) * scales[:, None]
    module.register_parameter(f"fp32_{number}", torch.nn.Parameter(plain, requires_grad=False))
    with module.graph.inserting_before(node):
        node.update_arg(1, module.graph.create_node("get_attr", f"fp32_{number}"))


def _drop_unused(module: GraphModule) -> None:
    """Let go of constants that the graph does not mention any more."""
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name, _ in list(module.named_buffers()):
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
