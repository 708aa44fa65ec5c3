"""ONNX of scikit-learn's models, by skl2onnx: pipelines, linear models, trees and ensembles of them.

What comes out takes and gives the tensors of the version's signature: several inputs are put side by side as
the runtime sklearn does, and outputs have the signature's names, shapes and datatypes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto, helper
from sklearn.base import is_classifier
from sklearn.ensemble import IsolationForest
from sklearn.ensemble._forest import BaseForest
from sklearn.ensemble._gb import BaseGradientBoosting
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import BaseDecisionTree

from penstock.packaging.skops_types import load_skops
from penstock_kit.errors import PenstockError
from penstock_kit.oip import TensorSpec
from penstock_worker.adapters.conversion.hist_trees import HIST_BOOSTING, restored
from penstock_worker.adapters.conversion.source import Source
from penstock_worker.adapters.runtimes.sklearn_runtime import methods_of

MODEL_FILE = "model.onnx"
_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
# What skl2onnx's converters of trees write.
_ML_OPSET = 3
_JOINED, _CAST, _FEATURES = "penstock_joined", "penstock_cast", "penstock_features"
# scikit-learn's estimators that turn their input into fp32 (`sklearn.tree._tree.DTYPE`) first.
_SINGLE_PRECISION = (BaseDecisionTree, BaseForest, BaseGradientBoosting, IsolationForest)
_CLASS = re.compile(r"<class '([^']+)'>")


def sklearn_to_onnx(source: Source, directory: Path, *, opset: int, single: bool = False) -> None:
    """Write `model.onnx`.

    Args:
        source: A version of format skops.
        directory: Where to.
        opset: Version of ONNX's operators.
        single: Compute all in fp32 where the version takes fp64: ONNX Runtime lacks some operators in fp64.

    Raises:
        JobFailure: UNSUPPORTED: an estimator, datatype or output has no counterpart; the message names it.
    """
    try:
        model = load_skops(source.entrypoint)
        methods = methods_of(model, source.signature, source.manifest.parameters)
    except PenstockError as error:
        raise source.unsupported(error.message) from error
    converted = _convert(source, model, methods, opset, single=single)
    onnx.save(_with_signature(source, model, methods, converted), directory / MODEL_FILE)


def _convert(
    source: Source, model: Any, methods: Mapping[str, str], opset: int, *, single: bool
) -> onnx.ModelProto:
    from skl2onnx import convert_sklearn
    from skl2onnx.common import _container, data_types, exceptions

    options: dict[Any, dict[str, Any]] = {}
    last = model.steps[-1][1] if isinstance(model, Pipeline) else model
    if is_classifier(last):
        options[id(last)] = {} if isinstance(last, LinearSVC) else {"zipmap": False}
        if "decision_function" in methods.values():
            if "predict_proba" in methods.values():
                raise source.unsupported(
                    "in ONNX a classifier gives probabilities or scores, not both; leave one output out."
                )
            options[id(last)]["raw_scores"] = True
    for _, step in model.steps if isinstance(model, Pipeline) else ():
        if isinstance(step, StandardScaler):
            # By default a product with 1/scale: what differs in the last bit may be on the other side of the
            # threshold of a tree.
            options[id(step)] = {"div": "div"}
    name, kind, width = _joined_type(source)

    def part(estimator: Any, taken: str, datatype: Any, columns: int) -> onnx.ModelProto:
        here = {key: value for key, value in options.items() if key in _ids(estimator)}
        return convert_sklearn(
            estimator,
            initial_types=[(taken, datatype([None, columns]))],
            options=here,
            target_opset={"": opset, "ai.onnx.ml": _ML_OPSET},
        )

    try:
        with warnings.catch_warnings(), mock.patch.object(_container, "make_node", _make_node):
            warnings.simplefilter("ignore")
            if kind is data_types.DoubleTensorType and single:
                inner = part(model, _FEATURES, data_types.FloatTensorType, width)
                return _joined(_casting(name, kind, data_types.FloatTensorType, width, opset), inner)
            # Trees look at features in one precision, whatever they are given.
            seen = kind
            if kind in (data_types.FloatTensorType, data_types.DoubleTensorType):
                if isinstance(last, _SINGLE_PRECISION):
                    seen = data_types.FloatTensorType
                elif isinstance(last, HIST_BOOSTING):
                    seen = data_types.DoubleTensorType
            if seen is kind:
                whole = part(model, name, kind, width)
                return restored(whole, last) if seen is data_types.DoubleTensorType else whole
            trees = restored(part(last, _FEATURES, seen, last.n_features_in_), last)
            if last is model:
                return _joined(_casting(name, kind, seen, width, opset), trees)
            return _joined(_cast_output(part(Pipeline(model.steps[:-1]), name, kind, width), seen), trees)
    except (exceptions.MissingShapeCalculator, exceptions.MissingConverter) as error:
        named = _CLASS.search(str(error))
        raise source.unsupported(
            f"ONNX has nothing for {named[1] if named else type(last).__name__}."
        ) from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise source.unsupported(f"skl2onnx failed: {lines[0][:300]}") from error


def _make_node(*args: Any, **attributes: Any) -> onnx.NodeProto:
    """Make a node as onnx does: protobuf 7 takes no truth values as integers; skl2onnx 1.20 gives some."""
    whole = {
        key: [int(item) if isinstance(item, bool | np.bool_) else item for item in value]
        if isinstance(value, list)
        else value
        for key, value in attributes.items()
    }
    return helper.make_node(*args, **whole)


def _ids(estimator: Any) -> set[int]:
    steps = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else []
    return {id(estimator), *map(id, steps)}


def _casting(name: str, given: Any, wanted: Any, width: int, opset: int) -> onnx.ModelProto:
    """Return a model that casts its only tensor from one of skl2onnx's types to another."""
    before, after = _element(given), _element(wanted)
    node = helper.make_node("Cast", [name], [_CAST], to=after)
    graph = helper.make_graph(
        [node],
        "cast",
        [helper.make_tensor_value_info(name, before, [None, width])],
        [helper.make_tensor_value_info(_CAST, after, [None, width])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _cast_output(head: onnx.ModelProto, wanted: Any) -> onnx.ModelProto:
    """Add a cast of the first output to one of skl2onnx's types, and leave the others out."""
    given = head.graph.output[0].name
    head.graph.node.append(helper.make_node("Cast", [given], [_CAST], to=_element(wanted)))
    del head.graph.output[:]
    head.graph.output.append(helper.make_tensor_value_info(_CAST, _element(wanted), [None, None]))
    return head


def _element(kind: Any) -> int:
    """Return what ONNX calls the elements of a type of skl2onnx: fp32 or fp64."""
    return int(TensorProto.DOUBLE if kind.__name__ == "DoubleTensorType" else TensorProto.FLOAT)


def _joined(head: onnx.ModelProto, tail: onnx.ModelProto) -> onnx.ModelProto:
    tail.ir_version = head.ir_version = min(head.ir_version, tail.ir_version)
    # Each names the lowest versions that it needs.
    versions: dict[str, int] = {}
    for entry in (*head.opset_import, *tail.opset_import):
        versions[entry.domain] = max(entry.version, versions.get(entry.domain, 1))
    for model in (head, tail):
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(domain, number) for domain, number in versions.items())
    return onnx.compose.merge_models(
        head, tail, io_map=[(_CAST, _FEATURES)], prefix2="inner_", name="penstock"
    )


def _joined_type(source: Source) -> tuple[str, Any, int]:
    """Return name, type and columns of the one tensor that the model takes."""
    from skl2onnx.common import data_types as types

    specs = source.signature.inputs
    known = {
        "FP32": types.FloatTensorType,
        "FP64": types.DoubleTensorType,
        "INT64": types.Int64TensorType,
        "BYTES": types.StringTensorType,
        "BOOL": types.BooleanTensorType,
    }
    datatypes = {spec.datatype for spec in specs}
    if len(datatypes) > 1 or not datatypes <= known.keys() or any(spec.optional for spec in specs):
        raise source.unsupported(
            f"its inputs are {', '.join(sorted(datatypes))}; all must be one of {', '.join(known)}, and none "
            "optional."
        )
    widths = [_width(source, spec) for spec in specs]
    name = specs[0].name if _direct(source) else _JOINED
    return name, known[specs[0].datatype], sum(widths)


def _direct(source: Source) -> bool:
    """Whether the only input is already what the model takes."""
    specs = source.signature.inputs
    return len(specs) == 1 and len(specs[0].shape) == 2


def _width(source: Source, spec: TensorSpec) -> int:
    if len(spec.shape) == 1:
        return 1
    if len(spec.shape) != 2 or spec.shape[1] < 1:
        raise source.unsupported(
            f"its input {spec.name} has the shape {list(spec.shape)}; ONNX must know the columns."
        )
    return spec.shape[1]


def _with_signature(
    source: Source, model: Any, methods: Mapping[str, str], converted: onnx.ModelProto
) -> onnx.ModelProto:
    """Put nodes before and behind the graph until it takes and gives what the signature says."""
    graph = converted.graph
    given = [output.name for output in graph.output]
    before, behind, outputs = [], [], []
    if not _direct(source):
        columns = []
        for spec in source.signature.inputs:
            columns.append(spec.name)
            if len(spec.shape) == 1:
                columns[-1] = f"{spec.name}_column"
                shape = helper.make_tensor(f"{spec.name}_rows", TensorProto.INT64, [2], [-1, 1])
                graph.initializer.append(shape)
                before.append(helper.make_node("Reshape", [spec.name, shape.name], [columns[-1]]))
        before.append(helper.make_node("Concat", columns, [_JOINED], axis=1))
        del graph.input[:]
        graph.input.extend(_value(spec, batched=source.signature.batched) for spec in source.signature.inputs)
    for spec in source.signature.outputs:
        tensor = given[_place(source, methods[spec.name], model, given)]
        if methods[spec.name] == "decision_function" and len(spec.shape) == 1:
            # Two classes: scikit-learn gives the score of the second, skl2onnx one for each.
            index = helper.make_tensor(f"{spec.name}_second", TensorProto.INT64, [1], [-1])
            graph.initializer.append(index)
            behind.append(helper.make_node("Gather", [tensor, index.name], [f"{spec.name}_score"], axis=1))
            tensor = f"{spec.name}_score"
        shape = helper.make_tensor(
            f"{spec.name}_shape", TensorProto.INT64, [len(spec.shape)], [-1, *spec.shape[1:]]
        )
        graph.initializer.append(shape)
        behind.append(helper.make_node("Reshape", [tensor, shape.name], [f"{spec.name}_shaped"]))
        if spec.datatype == "BYTES":
            behind.append(helper.make_node("Identity", [f"{spec.name}_shaped"], [spec.name]))
        else:
            behind.append(
                helper.make_node("Cast", [f"{spec.name}_shaped"], [spec.name], to=_TYPES[spec.datatype])
            )
        outputs.append(_value(spec, batched=source.signature.batched))
    clash = {spec.name for spec in source.signature.outputs} & {
        name for node in graph.node for name in node.output
    }
    _rename(graph, {name: f"given_{name}" for name in clash})
    for node in behind:
        node.input[:] = [f"given_{name}" if name in clash else name for name in node.input]
    nodes = [*before, *graph.node, *behind]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.extend(outputs)
    onnx.checker.check_model(converted)
    return converted


def _place(source: Source, method: str, model: Any, given: list[str]) -> int:
    """Return which output of skl2onnx a method is: classes or values first, scores second."""
    if method in ("predict", "transform") and not (method == "transform" and hasattr(model, "predict")):
        return 0
    if method in ("predict_proba", "decision_function", "transform") and len(given) > 1:
        return 1
    raise source.unsupported(f"in ONNX {type(model).__name__} has no {method}; leave that output out.")


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _value(spec: TensorSpec, *, batched: bool) -> onnx.ValueInfoProto:
    sizes: list[str | int] = [
        size if size >= 0 else f"{spec.name}_{axis}" for axis, size in enumerate(spec.shape)
    ]
    if batched:
        sizes[0] = "batch"
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.datatype], sizes)
