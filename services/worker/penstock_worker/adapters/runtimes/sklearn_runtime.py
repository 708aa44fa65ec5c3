"""scikit-learn models in skops files, which hold no pickle.

Inputs: one [-1, features] tensor, or one tensor per group of columns in the signature's order ([-1] or
[-1, k]), which are put side by side. Columns of BYTES are given to the model as strings.

Outputs are methods of the model. The manifest's parameter `outputs` names them ("label=predict,
scores=decision_function"); without it the name of the output does (see `_METHODS`), and a single output of
another name is `predict` (`transform` where there is no `predict`).
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penstock.packaging.skops_types import load_skops
from penstock_kit.errors import FailedPrecondition, InvalidArgument, Reason
from penstock_kit.oip import Array, Signature
from penstock_worker.domain.runtime import Batch, Bundle, Servable

if importlib.util.find_spec("skops") is None:
    raise ModuleNotFoundError("No module named 'skops'", name="skops")

_METHODS = {
    "label": "predict",
    "labels": "predict",
    "prediction": "predict",
    "predictions": "predict",
    "predict": "predict",
    "probabilities": "predict_proba",
    "probability": "predict_proba",
    "predict_proba": "predict_proba",
    "log_probabilities": "predict_log_proba",
    "predict_log_proba": "predict_log_proba",
    "scores": "decision_function",
    "decision_function": "decision_function",
    "transformed": "transform",
    "transform": "transform",
}
_ALLOWED = frozenset(_METHODS.values()) | {"score_samples", "apply"}


def warm_up() -> None:
    """Import what takes seconds; a fork server calls it when it has nothing else to do."""
    importlib.import_module("skops.io")


class SklearnRuntime:
    """Loads .skops files."""

    formats = frozenset({"skops"})
    runs_bundle_code = False

    def load(self, bundle: Bundle, devices: Sequence[str]) -> Servable:
        """Open a bundle; it computes on the CPU.

        Raises:
            FailedPrecondition: UNSAFE_FORMAT if the file has types that are not known to be safe;
                BUNDLE_CORRUPT if a tree in it points outside of itself; LOAD_FAILED if the model cannot give
                the signature's outputs.
        """
        try:
            model = load_skops(bundle.entrypoint)
        except InvalidArgument as error:
            raise FailedPrecondition(error.message, reason=error.reason) from error
        return SklearnServable(model, methods_of(model, bundle.signature, bundle.parameters))


class SklearnServable:
    """A fitted model.

    Args:
        model: Of scikit-learn.
        methods: Output name → method.
    """

    def __init__(self, model: Any, methods: dict[str, str]) -> None:
        self._model = model
        self._methods = methods
        # Tensors have no column names; the signature's order is the model's.
        warnings.filterwarnings("ignore", message="X does not have valid feature names")

    def predict(self, batch: Batch) -> Batch:
        """Compute one batch.

        Raises:
            Exception: Whatever scikit-learn raises.
        """
        features = _join(batch)
        given: dict[str, Array] = {}
        for name, method in self._methods.items():
            # Transformers made with copy=False write to what they are given.
            value = getattr(self._model, method)(features.copy())
            given[name] = np.asarray(value.toarray() if hasattr(value, "toarray") else value)
        return given

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


def methods_of(model: Any, signature: Signature, parameters: Mapping[str, str]) -> dict[str, str]:
    """Return which method of a model gives each output.

    Raises:
        FailedPrecondition: LOAD_FAILED: it cannot give one of them.
    """
    named = _parse(parameters.get("outputs", ""))
    outputs = signature.outputs
    methods: dict[str, str] = {}
    for spec in outputs:
        method = named.get(spec.name) or _METHODS.get(spec.name)
        if method is None and len(outputs) == 1:
            method = "predict" if hasattr(model, "predict") else "transform"
        if method not in _ALLOWED or not hasattr(model, method):
            raise FailedPrecondition(
                f"{type(model).__name__} does not give the output {spec.name}; name its method in the "
                f"manifest's parameter outputs, such as {spec.name}=predict. There are: "
                f"{', '.join(sorted(name for name in _ALLOWED if hasattr(model, name)))}.",
                reason=Reason.LOAD_FAILED,
            )
        methods[spec.name] = method
    return methods


def _parse(text: str) -> dict[str, str]:
    pairs = (item.partition("=") for item in text.split(",") if item.strip())
    return {name.strip(): method.strip() for name, _, method in pairs}


def _join(batch: Batch) -> Array:
    columns = [array if array.ndim > 1 else array.reshape(-1, 1) for array in batch.values()]
    columns = [_strings(array) if array.dtype == object else array for array in columns]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def _strings(array: Array) -> Array:
    texts = np.empty(array.size, dtype=object)
    texts[:] = [element.decode() for element in array.ravel().tolist()]
    return texts.reshape(array.shape)
