"""Loads `.skops` files without running code, decision trees included.

skops trusts scikit-learn's estimators but not the types below, for one of two reasons. Most it just does not
list: they hold numbers, or name a function of numpy's or scikit-learn's that only computes. The
compiled ones (trees) are left out because they follow indices in their arrays without looking: a crafted file
could make them read memory that is not theirs. Those are trusted here, and their indices are checked before
anything follows them. The client uses this to describe a model, the worker to serve it, so that both take the
same files.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penstock.errors import InvalidArgument, Reason

# Found by fitting and saving every estimator of scikit-learn 1.9; none calls what its state names, reads or
# writes files.
PLAIN_TYPES = frozenset(
    {
        "numpy.dtype",
        "numpy.mean",
        "scipy.interpolate._bsplines.BSpline",
        "scipy.sparse._csr.csr_matrix",
        "sklearn._loss.loss.HalfTweedieLossIdentity",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.cluster._bisect_k_means._BisectingTree",
        "sklearn.cluster._kmeans._kmeans_single_lloyd",
        "sklearn.feature_selection._univariate_selection.f_classif",
        "sklearn.feature_selection._univariate_selection.f_regression",
        "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
        "sklearn.gaussian_process.kernels.ConstantKernel",
        "sklearn.gaussian_process.kernels.DotProduct",
        "sklearn.gaussian_process.kernels.Matern",
        "sklearn.gaussian_process.kernels.Product",
        "sklearn.gaussian_process.kernels.RBF",
        "sklearn.gaussian_process.kernels.Sum",
        "sklearn.gaussian_process.kernels.WhiteKernel",
        "sklearn.metrics._dist_metrics.EuclideanDistance64",
        "sklearn.metrics._dist_metrics.ManhattanDistance64",
        "sklearn.metrics._dist_metrics.MinkowskiDistance64",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    }
)
CHECKED_TYPES = frozenset(
    {
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.neighbors._ball_tree.BallTree",
        "sklearn.neighbors._kd_tree.KDTree",
        "sklearn.tree._tree.Tree",
    }
)
_READS_FILES = frozenset({"filename", "file"})
# skops imports every package of scikit-learn to list its estimators, and this one imports torch: as long
# again, for nothing that is used here.
_DOOR_TO_TORCH = "sklearn.externals.array_api_compat.torch"


def import_skops() -> Any:
    """Import `skops.io`, without torch where nobody has imported that.

    Raises:
        ImportError: skops or scikit-learn is not installed.
    """
    shut = "torch" not in sys.modules and _DOOR_TO_TORCH not in sys.modules
    if shut:
        sys.modules[_DOOR_TO_TORCH] = None  # type: ignore[assignment] # an import of it fails, as it would
    try:
        return importlib.import_module("skops.io")
    finally:
        if shut:
            del sys.modules[_DOOR_TO_TORCH]


def load_skops(path: Path) -> Any:
    """Return the estimator in a `.skops` file.

    Raises:
        InvalidArgument: UNSAFE_FORMAT if it holds types that are not known to be safe, or would read files;
            BUNDLE_CORRUPT if a tree in it points outside of itself.
        ImportError: skops or scikit-learn is not installed.
        Exception: Whatever skops raises about a file that is none of its own.
    """
    skops_io = import_skops()
    allowed = PLAIN_TYPES | CHECKED_TYPES
    found = set(skops_io.get_untrusted_types(file=path))
    if unknown := sorted(found - allowed):
        raise InvalidArgument(
            f"{path.name} holds types that are not known to be safe: {', '.join(unknown)}. "
            "Use scikit-learn's own estimators and transformers, or export the model to ONNX.",
            reason=Reason.UNSAFE_FORMAT,
        )
    estimator = skops_io.load(path, trusted=sorted(found))
    for part in _parts(estimator):
        # Vectorizers of text, which skops trusts, can be told to open files that a request names.
        if isinstance(how := getattr(part, "input", None), str) and how in _READS_FILES:
            raise InvalidArgument(
                f"{path.name} holds a {type(part).__name__} with input={how!r}, which reads files. Make it "
                "with input='content', and send the text itself.",
                reason=Reason.UNSAFE_FORMAT,
            )
        if found & CHECKED_TYPES and not _is_sound(part):
            raise InvalidArgument(
                f"{path.name} holds a {type(part).__name__} whose nodes point out of it; save it anew.",
                reason=Reason.BUNDLE_CORRUPT,
            )
    return estimator


def _parts(root: Any) -> Iterator[Any]:
    """Yield everything that an estimator is made of, each once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        part = stack.pop()
        if id(part) in seen or isinstance(part, (str, bytes, int, float, type(None))):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            stack.extend(part.values())
        elif isinstance(part, (list, tuple, set, frozenset)):
            stack.extend(part)
        elif isinstance(part, np.ndarray):
            if part.dtype == object:
                stack.extend(part.ravel().tolist())
        else:
            stack.extend(getattr(part, "__dict__", {}).values())


def _is_sound(part: Any) -> bool:
    name = type(part).__name__
    if name == "Tree" and hasattr(part, "children_left"):
        return _is_sound_tree(part)
    if name == "TreePredictor":
        return _is_sound_predictor(part)
    if name in {"KDTree", "BallTree"}:
        return _is_sound_neighbour_tree(part)
    tree = getattr(part, "tree_", None)
    features = getattr(part, "n_features_in_", None)
    # scikit-learn checks the input's width against the estimator, and the tree relies on that.
    return tree is None or features is None or getattr(tree, "n_features", features) == features


def _is_sound_tree(tree: Any) -> bool:
    inner = np.flatnonzero(tree.children_left != -1)
    features = tree.feature[inner]
    return all(
        bool(((children[inner] > inner) & (children[inner] < tree.node_count)).all())
        for children in (tree.children_left, tree.children_right)
    ) and bool(((features >= 0) & (features < tree.n_features)).all())


def _is_sound_predictor(predictor: Any) -> bool:
    nodes = predictor.nodes
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    categorical = inner[nodes["is_categorical"][inner] != 0]
    bitsets = min(len(predictor.raw_left_cat_bitsets), len(predictor.binned_left_cat_bitsets))
    return (
        len(nodes) > 0
        and all(
            bool(((nodes[side][inner] > inner) & (nodes[side][inner] < len(nodes))).all())
            for side in ("left", "right")
        )
        and bool((nodes["feature_idx"][inner] >= 0).all())
        and bool((nodes["bitset_idx"][categorical] < bitsets).all())
    )


def _is_sound_neighbour_tree(tree: Any) -> bool:
    data, indices, nodes, bounds = (np.asarray(array) for array in tree.get_arrays())
    state = tree.__getstate__()
    count = int(state[6])  # n_nodes, as BinaryTree.__getstate__ orders its fields
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    return (
        count == len(nodes) == bounds.shape[-2]
        and count > 0
        and bounds.shape[-1] == data.shape[1]
        and bool(((indices >= 0) & (indices < len(data))).all())
        and bool(((nodes["idx_start"] >= 0) & (nodes["idx_end"] <= len(indices))).all())
        and bool((2 * inner + 2 < count).all())
    )
