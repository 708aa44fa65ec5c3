"""What the registry takes and keeps of an ensemble's manifest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock_kit.ensembles import Step
from penstock_kit.errors import InvalidArgument, Reason
from penstock_registry.api.convert import manifest_from_proto, manifest_to_proto
from penstock_registry.domain.manifest import Batching, Manifest, Signature, TensorSpec, check_manifest

STEPS = (
    Step("scale", "scaler", {"x": "image"}, {"y": "scaled"}),
    Step("read", "reader@good", {"x": "scaled"}, {"y": "label"}),
)
ENSEMBLE = Manifest(
    runtime="ensemble",
    format="ensemble",
    entrypoint="ensemble.yaml",
    signature=Signature(
        (TensorSpec("image", "FP32", (-1, 64)),),
        (TensorSpec("label", "INT64", (-1,)),),
    ),
    batching=Batching(8),
    steps=STEPS,
)


def test_an_ensemble_is_taken_and_kept_as_it_is() -> None:
    check_manifest(ENSEMBLE, allow_python_runtime=False)
    assert manifest_from_proto(manifest_to_proto(ENSEMBLE)) == ENSEMBLE
    assert Manifest.from_dict(ENSEMBLE.to_dict()) == ENSEMBLE


def test_what_is_no_ensemble_is_kept_as_before() -> None:
    plain = replace(ENSEMBLE, runtime="onnx", format="onnx", entrypoint="m.onnx", steps=())
    check_manifest(plain, allow_python_runtime=False)
    assert "ensemble" not in plain.to_dict()
    assert not manifest_to_proto(plain).HasField("ensemble")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (replace(ENSEMBLE, runtime="onnx", format="onnx"), "is for the runtime ensemble, not for onnx"),
        (replace(ENSEMBLE, steps=()), r"manifest\.ensemble: An ensemble has 1 to 64 steps, not 0"),
        (replace(ENSEMBLE, steps=STEPS[1:]), "takes 'scaled' as its input x, but no step gives that"),
        (replace(ENSEMBLE, steps=STEPS[:1]), "'label' is given by no step"),
    ],
)
def test_an_ensemble_that_cannot_be_served_is_refused(manifest: Manifest, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        check_manifest(manifest, allow_python_runtime=False)
    assert caught.value.reason is Reason.MANIFEST_MISMATCH
