"""Ensembles through a whole mesh: several models that answer as one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from penstock import Client, PackageOptions
from penstock.errors import InvalidArgument, Reason
from support.digits_ensemble import Digits, train
from support.mesh_process import Mesh


@pytest.fixture(scope="module")
def client(mesh: Mesh) -> Iterator[Client]:
    with Client(mesh.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def digits(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """The parts of the digits ensemble and the ensemble itself, deployed."""
    folder = tmp_path_factory.mktemp("digits")
    trained = train()
    paths = trained.save(folder)
    opinions = PackageOptions(inputs=["first:FP64:-1,10", "second:FP64:-1,10"])
    for name, path in paths.items():
        client.push(path, options=opinions if name == "weigh" else None)
        client.deploy(name)
    for name in paths:
        client.wait_for_deployment(name)
    client.push(folder / "ensemble.yaml", model="digits")
    client.deploy("digits")
    client.wait_for_deployment("digits")
    return trained


def test_an_ensemble_answers_what_its_models_answer_one_after_the_other(
    client: Client, digits: Digits
) -> None:
    found = client.predict("digits", digits.images[:200])
    np.testing.assert_array_equal(found["label"], digits.by_hand(digits.images[:200]))
    np.testing.assert_allclose(found["probabilities"], digits.probabilities_by_hand(digits.images[:200]))


def test_its_signature_follows_from_its_models(client: Client, digits: Digits) -> None:
    manifest = client.get_version("digits").manifest
    assert [(spec.name, list(spec.shape)) for spec in manifest.signature.inputs] == [("image", [-1, 64])]
    assert [(spec.name, list(spec.shape)) for spec in manifest.signature.outputs] == [
        ("label", [-1]),
        ("probabilities", [-1, 10]),
    ]
    assert list(manifest.signature.outputs[1].labels) == [str(digit) for digit in range(10)]
    assert manifest.batching.max_batch_size == 32


def test_every_way_to_ask_reaches_it(mesh: Mesh, client: Client, digits: Digits) -> None:
    image = digits.images[0]
    expected = int(digits.by_hand(digits.images[:1])[0])
    body = {"inputs": [{"name": "image", "datatype": "FP64", "shape": [1, 64], "data": image.tolist()}]}
    answer = httpx.post(f"{mesh.url}/v2/models/digits/infer", json=body)
    assert answer.status_code == 200, answer.text
    assert {one["name"]: one["data"] for one in answer.json()["outputs"]}["label"] == [expected]
    answer = httpx.post(f"{mesh.url}/predict", json={"model_name": "digits", "input_data": [image.tolist()]})
    assert answer.json()["output_data"]["label"] == [expected]


def test_a_wrong_request_is_the_callers_mistake(client: Client, digits: Digits) -> None:
    with pytest.raises(InvalidArgument, match=r"image takes the shape \[-1, 64\]"):
        client.predict("digits", digits.images[:, :60])


def test_a_description_that_cannot_work_is_refused_with_what_was_meant(
    client: Client, digits: Digits, tmp_path: Path
) -> None:
    path = tmp_path / "ensemble.yaml"
    path.write_text(
        "outputs: [label]\ninputs: [image]\nsteps:\n"
        "- {model: project, inputs: {input: image}, outputs: {transformed: projected}}\n"
        "- {model: forest, inputs: {input: projectd}, outputs: {label: label}}\n"
    )
    with pytest.raises(InvalidArgument, match="Did you mean 'projected'"):
        client.push(path)


def test_models_that_do_not_fit_are_refused_before_anything_is_pushed(
    client: Client, digits: Digits, tmp_path: Path
) -> None:
    path = tmp_path / "ensemble.yaml"
    path.write_text(
        "steps:\n"
        "- {model: project, inputs: {input: image}, outputs: {transformed: projected}}\n"
        "- {name: again, model: project, inputs: {input: projected}, outputs: {transformed: twice}}\n"
    )
    with pytest.raises(Exception, match=r"'projected'.*does not fit step again.*\[-1, 24\]") as caught:
        client.push(path)
    assert caught.value.reason is Reason.MANIFEST_MISMATCH  # type: ignore[attr-defined]
