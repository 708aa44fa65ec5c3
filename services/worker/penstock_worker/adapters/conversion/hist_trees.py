"""Trees of histogram gradient boosting in ONNX, in the precision that scikit-learn has them in.

scikit-learn's other trees look at features in fp32. These look at them in fp64, and their thresholds are
often numbers of the training data: rounded to fp32, as skl2onnx writes them, a threshold may lie on the other
side of a row. ONNX can hold them in fp64 since version 3 of its operators for machine learning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

HIST_BOOSTING = (HistGradientBoostingClassifier, HistGradientBoostingRegressor)
_ML_DOMAIN, _ML_OPSET = "ai.onnx.ml", 3
_OPERATORS = {"TreeEnsembleClassifier": "class", "TreeEnsembleRegressor": "target"}


def restored(converted: onnx.ModelProto, model: Any) -> onnx.ModelProto:
    """Put thresholds and values in fp64 in the place of those that skl2onnx has rounded.

    Args:
        converted: What skl2onnx made of a model or pipeline whose last step takes fp64; is changed if that is
            one of `HIST_BOOSTING`.
        model: That last step.

    Raises:
        ValueError: The graph has other trees than the model.
    """
    if not isinstance(model, HIST_BOOSTING):
        return converted
    found = [node for node in converted.graph.node if node.op_type in _OPERATORS]
    if len(found) != 1:
        raise ValueError(f"{len(found)} nodes have trees, not one")
    (node,) = found
    given = {attribute.name: attribute for attribute in node.attribute}
    leaf = _OPERATORS[node.op_type]
    # A tree for each class of each round, in this order.
    trees = [predictor.nodes for each in model._predictors for predictor in each]
    places = zip(given["nodes_treeids"].ints, given["nodes_nodeids"].ints, strict=True)
    thresholds = [
        0.0 if mode == b"LEAF" else float(trees[tree][place]["num_threshold"])
        for (tree, place), mode in zip(places, given["nodes_modes"].strings, strict=True)
    ]
    leaves = zip(given[f"{leaf}_treeids"].ints, given[f"{leaf}_nodeids"].ints, strict=True)
    exact = {
        "nodes_values": thresholds,
        f"{leaf}_weights": [float(trees[tree][place]["value"]) for tree, place in leaves],
        "base_values": np.asarray(model._baseline_prediction, dtype=np.float64).ravel().tolist(),
    }
    for name, values in exact.items():
        _require_same(name, values, given[name].floats)
        node.attribute.remove(given[name])
        tensor = helper.make_tensor(name, TensorProto.DOUBLE, [len(values)], values)
        node.attribute.append(helper.make_attribute(f"{name}_as_tensor", tensor))
    for entry in converted.opset_import:
        if entry.domain == _ML_DOMAIN:
            entry.version = max(entry.version, _ML_OPSET)
    return converted


def _require_same(name: str, exact: list[float], rounded: Iterable[float]) -> None:
    wanted = np.array(exact, dtype=np.float32)
    given = np.array(list(rounded), dtype=np.float32)
    if name == "nodes_values":
        given = np.where(wanted == 0.0, 0.0, given)  # what leaves have there means nothing
    if wanted.shape != given.shape or not np.array_equal(wanted, given):
        raise ValueError(f"{name} are not those of the model")
