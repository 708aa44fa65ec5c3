"""`.skops`: scikit-learn estimators saved by skops.io.dump, loadable without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.common.v1 import tensor_pb2
from penstock.errors import InvalidArgument
from penstock.packaging.bundle import local_files
from penstock.packaging.draft import Draft, is_whole, missing_library, unreadable
from penstock.packaging.skops_types import load_skops
from penstock.packaging.specs import spec
from penstock.registry.v1 import manifest_pb2


def inspect(path: Path, given: tensor_pb2.Signature) -> Draft:
    """Describe a fitted estimator: features and classes come out of it.

    Raises:
        InvalidArgument: It cannot be read, or holds types that skops does not trust.
        FailedPrecondition: skops or scikit-learn is not installed and the signature was not given.
    """
    manifest = manifest_pb2.Manifest(runtime="sklearn", format="skops", entrypoint=path.name)
    draft = Draft(path.stem, manifest, local_files(path.parent, [path]), batchable=True)
    if is_whole(given):
        draft.batchable = None
        return draft
    estimator = _load(path)
    if not hasattr(estimator, "predict") and not hasattr(estimator, "transform"):
        raise InvalidArgument(
            f"{path.name} holds a {type(estimator).__name__}, which can neither predict nor transform."
        )
    features = getattr(estimator, "n_features_in_", None)
    if features is None:
        draft.batchable = None
        draft.missing = f"{path.name} holds a {type(estimator).__name__} that does not say its features."
    else:
        manifest.signature.inputs.append(spec("input", "FP64", [-1, int(features)]))
    manifest.signature.outputs.extend(_outputs(path, estimator))
    return draft


def _load(path: Path) -> Any:
    try:
        return load_skops(path)
    except ImportError as error:
        raise missing_library(path.name, "skops", "sklearn") from error
    except InvalidArgument:
        raise
    except Exception as error:
        raise unreadable(path.name, "skops", error) from error


def _outputs(path: Path, estimator: Any) -> list[tensor_pb2.TensorSpec]:
    if not hasattr(estimator, "predict"):
        return [spec("transformed", "FP64", [-1, _columns(estimator)])]
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        shape = [-1, int(estimator.n_outputs_)] if getattr(estimator, "n_outputs_", 1) > 1 else [-1]
        return [spec("prediction", "FP64", shape)]
    if isinstance(classes, list):
        raise InvalidArgument(
            f"{path.name} classifies into several outputs at once, which is not served yet."
        )
    kind = classes.dtype.kind
    label = spec("label", "INT64" if kind in "iub" else "FP64" if kind == "f" else "BYTES", [-1])
    outputs = [label]
    if hasattr(estimator, "predict_proba"):
        names = [str(name) for name in classes.tolist()]
        outputs.append(spec("probabilities", "FP64", [-1, len(names)], labels=names))
    return outputs


def _columns(transformer: Any) -> int:
    """Return how many columns a transformer gives; -1 if it does not say."""
    try:
        return len(transformer.get_feature_names_out())
    except (AttributeError, ValueError, TypeError):
        return -1
