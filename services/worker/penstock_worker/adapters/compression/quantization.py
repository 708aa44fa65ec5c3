"""ONNX graphs in fewer bits: what ONNX Runtime's tools do, put together.

Activations are unsigned and weights signed 8-bit numbers (U8S8), which processors with VNNI multiply without
saturation; on an x86 processor without it weights keep to 7 bits (`reduce_range`), as sums of two products
would not fit.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from penstock_worker.adapters.compression.export import quiet

# Operators that compute with few bits, or read what is stored in few.
_QUANTIZED = frozenset(
    {
        *("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "QLinearConv", "QLinearMatMul", "QGemm"),
        *("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"),
    }
)
_EMBEDDING_ELEMENTS = 4096


def prepare(path: Path) -> None:
    """Fold what is constant and fuse what belongs together, as the quantization finds more then."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _silent():
        quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(model, path)


def dynamic_int8(source: Path, target: Path, *, per_channel: bool, embeddings: bool) -> None:
    """Store weights in 8 bits, and bring activations to 8 bits in each call, by their range in it.

    For linear layers. Convolutions stay as they are: ONNX Runtime has no fast kernel for them in this form.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    operators = ["MatMul", "Gemm", *(["Gather"] if embeddings else [])]
    with _silent():
        quantize_dynamic(
            str(source),
            str(target),
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=_saturates(),
            op_types_to_quantize=operators,
            nodes_to_exclude=_other_gathers(onnx.load(source)),
            extra_options={"MatMulConstBOnly": True},
        )


def static_int8(
    source: Path,
    target: Path,
    feeds: Sequence[Mapping[str, Any]],
    *,
    method: str,
    per_channel: bool,
    embeddings: bool,
) -> None:
    """Store weights and activations in 8 bits, with the ranges that activations had on some rows.

    Args:
        source: The graph in fp32.
        target: Where the quantized one goes.
        feeds: Inputs to calibrate with.
        method: minmax, entropy or percentile.
        per_channel: A scale for each output channel of a weight.
        embeddings: Tables, too.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self._left, None)
            return None if found is None else dict(found)

    model = onnx.load(source)
    kinds = {node.op_type for node in model.graph.node}
    operators = ["Conv", "MatMul", "Gemm", *(["Gather"] if embeddings else [])]
    if "Conv" in kinds:
        # Between convolutions numbers stay in 8 bits.
        operators += [
            "Relu",
            "MaxPool",
            "AveragePool",
            "GlobalAveragePool",
            "Add",
            "Concat",
            "Clip",
            "Flatten",
        ]
        operators += ["Reshape", "Transpose"]
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    with _silent():
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=per_channel,
            reduce_range=_saturates(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*_other_gathers(model), *_products_of_activations(model)],
            calibrate_method=methods[method],
            extra_options={"MatMulConstBOnly": True},
        )


def weight_only(source: Path, target: Path, *, bits: int, group_size: int, embeddings: bool) -> None:
    """Store weights of linear layers in 4 or 8 bits by groups that share a scale; those of convolutions in 8.

    Activations stay in fp32 from layer to layer (inside a layer the kernel may bring them to 8 bits by
    groups).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    _split_gemms(model)
    # Level 4: the products themselves are of 8 bits, which is what makes it fast.
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=group_size, is_symmetric=True, accuracy_level=4
    )
    with _silent():
        quantizer.process()
    model = quantizer.model.model
    _store_convolutions(model)
    onnx.save(model, target)
    if embeddings and (tables := _tables(model)):
        kept = [
            node.name for node in model.graph.node if node.op_type == "Gather" and node.name not in tables
        ]
        with _silent():
            quantize_dynamic(
                str(target),
                str(target),
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Gather"],
                nodes_to_exclude=kept,
            )


def count(path: Path) -> int:
    """Return how many operators of a file compute with few bits or read what is stored in few."""
    return sum(node.op_type in _QUANTIZED for node in onnx.load(path).graph.node)


def _tables(model: onnx.ModelProto) -> list[str]:
    """Return the names of Gather nodes that look up a large table of fp32 constants."""
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and int(np.prod(tensor.dims)) >= _EMBEDDING_ELEMENTS
    }
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] in large]


def _other_gathers(model: onnx.ModelProto) -> list[str]:
    """Return the names of Gather nodes that pick from something else than a large table."""
    tables = set(_tables(model))
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.name not in tables]


def _products_of_activations(model: onnx.ModelProto) -> list[str]:
    """Return the names of MatMul nodes without a constant: an attention's own, which lose most by 8 bits."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not constants.intersection(node.input)
    ]


def _split_gemms(model: onnx.ModelProto) -> None:
    """Turn Gemm with a constant weight into MatMul and Add, which the tools for few bits know."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
        if (
            node.op_type != "Gemm"
            or not plain
            or attributes.get("transA", 0)
            or node.input[1] not in constants
        ):
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        if attributes.get("transB", 0):
            weight = np.ascontiguousarray(weight.T)
        name = f"{node.output[0]}/weight"
        graph.initializer.append(numpy_helper.from_array(weight, name))
        bias = list(node.input[2:3])
        product = f"{node.output[0]}/product" if bias else node.output[0]
        nodes.append(
            helper.make_node("MatMul", [node.input[0], name], [product], name=f"{node.output[0]}/matmul")
        )
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], [node.output[0]], name=f"{product}/add"))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)


def _store_convolutions(model: onnx.ModelProto) -> None:
    """Store constant weights of convolutions in 8 bits, with a scale for each output channel."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        tensor = constants.get(node.input[1]) if node.op_type == "Conv" else None
        if tensor is not None and tensor.data_type == TensorProto.FLOAT:
            weight = numpy_helper.to_array(tensor)
            highest = np.abs(weight).reshape(len(weight), -1).max(1)
            scale = np.maximum(highest / 127.0, np.finfo(np.float32).tiny).astype(np.float32)
            stored = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
            base = node.input[1]
            graph.initializer.extend(
                [
                    numpy_helper.from_array(stored, f"{base}/int8"),
                    numpy_helper.from_array(scale, f"{base}/scale"),
                ]
            )
            nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [f"{base}/int8", f"{base}/scale"],
                    [f"{base}/fp32/{len(nodes)}"],
                    name=f"{base}/dequantize/{len(nodes)}",
                    axis=0,
                )
            )
            node.input[1] = f"{base}/fp32/{len(nodes) - 1}"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    kept = list({tensor.name: tensor for tensor in graph.initializer if tensor.name in used}.values())
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _saturates() -> bool:
    """Whether this processor adds products of U8 and S8 in 16 bits."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return not any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the advice that the tools write to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        root.setLevel(level)


__all__ = ["count", "dynamic_int8", "prepare", "static_int8", "weight_only"]
