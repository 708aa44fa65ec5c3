"""What people write to describe an ensemble, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.ensemble_types import ModelType, TensorType
from penstock.errors import InvalidArgument, PenstockError
from penstock.packaging import Bundle, PackageOptions, open_bundle
from penstock.packaging.ensemble_signature import completed
from penstock.packaging.specs import format_spec

CHAIN = """\
steps:
- {model: one, inputs: {x: image}, outputs: {y: middle}}
- {name: second, model: two@good, inputs: {x: middle}, outputs: {y: label}}
"""


def opened(folder: Path, text: str, name: str = "ensemble.yaml", **options: object) -> Bundle:
    (folder / name).write_text(text)
    with open_bundle(folder / name, PackageOptions(**options)) as bundle:  # type: ignore[arg-type]
        return bundle


def model(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 4), batch: int = 8) -> ModelType:
    kind = TensorType(datatype, shape)
    return ModelType({"x": kind}, {"y": kind}, batch, "m:1")


def signature(bundle: Bundle) -> list[list[str]]:
    found = bundle.manifest.signature
    return [[format_spec(tensor) for tensor in side] for side in (found.inputs, found.outputs)]


def test_inputs_and_outputs_are_what_no_step_gives_and_none_takes(tmp_path: Path) -> None:
    bundle = opened(tmp_path, CHAIN)
    manifest = bundle.manifest
    assert [tensor.name for tensor in manifest.signature.inputs] == ["image"]
    assert [tensor.name for tensor in manifest.signature.outputs] == ["label"]
    assert [(one.name, one.model) for one in manifest.ensemble.steps] == [
        ("one", "one"),
        ("second", "two@good"),
    ]
    assert (manifest.runtime, manifest.format, manifest.entrypoint) == (
        "ensemble",
        "ensemble",
        "ensemble.yaml",
    )
    assert [file.path for file in bundle.files] == ["ensemble.yaml"]
    assert bundle.name == tmp_path.name


def test_json_a_manifest_and_another_name_are_taken_too(tmp_path: Path) -> None:
    inner = '{"steps": [{"model": "one", "inputs": ["x"], "outputs": ["y"]}]}'
    assert opened(tmp_path, inner, "ensemble.json").manifest.ensemble.steps[0].inputs == {"x": "x"}
    whole = f'{{"ensemble": {inner}, "signature": {{"outputs": [{{"name": "y"}}]}}, "license": "MIT"}}'
    bundle = opened(tmp_path, whole, "pipeline.yaml")
    assert bundle.manifest.license == "MIT"
    assert bundle.name == "pipeline"
    with open_bundle(tmp_path) as found:
        assert found.manifest.entrypoint == "ensemble.json"


def test_the_models_complete_the_signature(tmp_path: Path) -> None:
    bundle = opened(tmp_path, CHAIN)
    whole = completed(bundle, {"one": model(batch=8), "second": model(batch=4)})
    assert signature(whole) == [["image:FP32:-1,4"], ["label:FP32:-1,4"]]
    assert whole.manifest.batching.max_batch_size == 4
    assert signature(bundle)[0] != signature(whole)[0]  # the one before is left as it was


def test_what_is_described_is_kept_and_compared(tmp_path: Path) -> None:
    text = CHAIN + "inputs: [{name: image, dataType: FP32, shape: [-1, 4], description: grey}]\n"
    bundle = opened(tmp_path, text, max_batch_size=2)
    whole = completed(bundle, {"one": model(), "second": model()})
    assert whole.manifest.signature.inputs[0].description == "grey"
    assert whole.manifest.batching.max_batch_size == 2
    with pytest.raises(PenstockError, match=r"'image', the ensemble's input, does not fit.*FP32, not FP64"):
        completed(bundle, {"one": model("FP64")})


def test_a_model_without_batches_makes_the_ensemble_one_without(tmp_path: Path) -> None:
    bundle = opened(tmp_path, CHAIN)
    assert completed(bundle, {"one": model(), "second": model(batch=0)}).manifest.batching.max_batch_size == 0
    fixed = model(shape=(3, 4), batch=0)
    assert completed(bundle, {"one": fixed, "second": fixed}).manifest.batching.max_batch_size == 0
    with pytest.raises(InvalidArgument, match=r"every shape begins with -1.*image:FP32:3,4"):
        completed(opened(tmp_path, CHAIN, max_batch_size=4), {"one": fixed, "second": fixed})


def test_what_nobody_knows_must_be_described(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match="'label' is like is not known; two@good would tell once deployed"
    ):
        completed(opened(tmp_path, CHAIN), {"one": model()})
    described = opened(tmp_path, CHAIN, outputs=["label:INT64:-1"])
    whole = completed(described, {"one": model()})
    assert signature(whole) == [["image:FP32:-1,4"], ["label:INT64:-1"]]
    assert whole.notes[-1] == "Step second was not checked: two@good is not deployed yet."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step: []\nsteps: []", "there is no field 'step'. Did you mean 'steps'"),
        ("steps: [{modle: m}]", "there is no field 'modle'. Did you mean 'model'"),
        ("steps: [{model: m, inputs: {x: a}, output: {y: b}}]", "step m: .*'output'. Did you mean 'outputs'"),
        ("steps: {}", "`steps` must be a list of steps"),
        ("steps: [m]", "`steps` must be a list of steps"),
        ("steps: [{name: m}]", "step m: `model` must name the deployment"),
        ("steps: [{model: m, inputs: x, outputs: {y: b}}]", "`inputs` must map the model's inputs"),
        ("steps: [{model: m, inputs: {x: 1}, outputs: {y: b}}]", "`inputs` must map the model's inputs"),
        ("steps: [{model: m, inputs: {x: a}, outputs: {y: b}}]\ninputs: a", "`inputs` must be a list"),
        ("steps: [{model: m, inputs: {x: a}, outputs: {y: b}}]\nsignature: a", "`signature` must have"),
        ("[]", "it must hold `steps`"),
        ("steps: [", "neither YAML nor JSON"),
        ("steps: [{model: m, inputs: {x: a}, outputs: {y: b}}]\nbatching: {max: 1}", 'no field named "max"'),
    ],
)
def test_a_wrong_description_is_refused_with_what_was_meant(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        opened(tmp_path, text)


def test_an_ensemble_of_triton_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text(
        'name: "pipeline" platform: "ensemble" max_batch_size: 8\n'
        'input [ { name: "IMAGE" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
        'output [ { name: "LABEL" data_type: TYPE_INT64 dims: [ ] reshape: { shape: [ ] } } ]\n'
        "ensemble_scheduling { step [\n"
        '  { model_name: "prepare" model_version: -1 input_map { key: "x" value: "IMAGE" }\n'
        '    output_map { key: "y" value: "middle" } },\n'
        '  { model_name: "prepare" model_version: 3 input_map { key: "x" value: "middle" }\n'
        '    output_map { key: "y" value: "again" } },\n'
        '  { model_name: "read" model_version: -1 input_map [ { key: "x" value: "again" } ]\n'
        '    output_map { key: "y" value: "LABEL" } }\n'
        "] }\n"
    )
    with open_bundle(tmp_path) as bundle:
        manifest = bundle.manifest
    steps = [(one.name, one.model, dict(one.inputs), dict(one.outputs)) for one in manifest.ensemble.steps]
    assert steps == [
        ("prepare", "prepare", {"x": "IMAGE"}, {"y": "middle"}),
        ("prepare-2", "prepare:3", {"x": "middle"}, {"y": "again"}),
        ("read", "read", {"x": "again"}, {"y": "LABEL"}),
    ]
    assert signature(bundle) == [["IMAGE:FP32:-1,4"], ["LABEL:INT64:-1"]]
    assert (bundle.name, manifest.entrypoint, manifest.batching.max_batch_size) == (
        "pipeline",
        "config.pbtxt",
        8,
    )
