"""Ensembles through a whole mesh: several models that answer as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from penstock import Client, PackageOptions
from penstock.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Reason, Unavailable
from support.digits_ensemble import Digits, train
from support.mesh_process import Mesh


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh]) -> Mesh:
    return shared_mesh()


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


def test_the_graph_is_shown(mesh: Mesh, digits: Digits) -> None:
    shown = cli(mesh, "show", "digits:1").partition("STAGE")[2]
    assert shown.index("project ") < shown.index("forest ") < shown.index("weigh ")
    assert "image → input" in shown
    assert "probabilities → by_neighbours" in shown


def test_it_says_what_it_is_to_clients_of_other_servers(mesh: Mesh, digits: Digits) -> None:
    found = httpx.get(f"{mesh.url}/v2/models/digits").json()
    assert found["platform"] == "ensemble"
    assert [tensor["name"] for tensor in found["outputs"]] == ["label", "probabilities"]


def test_what_an_ensemble_calls_cannot_be_deleted(client: Client, digits: Digits) -> None:
    with pytest.raises(FailedPrecondition, match="step forest of deployment digits calls it") as caught:
        client.undeploy("forest")
    assert caught.value.reason is Reason.IN_USE


def test_a_deadline_is_kept_across_the_steps(client: Client, digits: Digits) -> None:
    with pytest.raises(DeadlineExceeded):
        client.predict("digits", digits.images[:1], timeout=0.0005)


def test_an_ensemble_deployed_before_its_steps_waits_for_them(
    mesh: Mesh, client: Client, digits: Digits, tmp_path: Path
) -> None:
    (tmp_path / "ensemble.yaml").write_text(
        "inputs: [{name: image, dataType: FP64, shape: [-1, 64]}]\n"
        "outputs: [{name: label, dataType: INT64, shape: [-1]}]\n"
        "steps:\n"
        "- {model: project, inputs: {input: image}, outputs: {transformed: projected}}\n"
        "- {name: read, model: reader, inputs: {input: projected}, outputs: {label: label}}\n"
    )
    client.push(tmp_path, model="early")
    client.deploy("early")
    missing = "Step read: there is no deployment reader; deploy it."
    mesh.wait(lambda: missing in client.get_deployment("early").message, "it says what it waits for")
    assert not client.is_ready("early")
    with (
        Client(mesh.address, retry_seconds=0) as impatient,
        pytest.raises(Unavailable, match="Step read") as caught,
    ):
        impatient.predict("early", digits.images[:1])
    assert caught.value.reason is Reason.NOT_READY
    client.deploy("reader", "forest")
    client.wait_for_deployment("early")
    np.testing.assert_array_equal(
        client.predict("early", digits.images[:9])["label"],
        digits.forest.predict(digits.project.transform(digits.images[:9])),
    )
    # A model that takes something else now: the ensemble does not fit it any more, and says so.
    client.deploy("reader", "weigh")
    mesh.wait(lambda: serving(client, "reader") == {"models/weigh"}, "reader serves another model")
    misfit = "Step read: weigh:1 has no input 'input'"
    mesh.wait(lambda: misfit in client.get_deployment("early").message, "it says what does not fit")
    assert not client.is_ready("early")
    # A request is passed on for a moment, as replicas may come back; then it is refused at once.
    with pytest.raises((FailedPrecondition, Unavailable), match=r"Step read: .*no input 'input'"):
        client.predict("early", digits.images[:1])
    client.undeploy("early")


def test_an_ensemble_may_call_another(client: Client, digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "ensemble.yaml").write_text(
        "outputs: [label, second_opinion]\n"
        "steps:\n"
        "- {model: digits, inputs: {image: picture}, outputs: {label: label}}\n"
        "- {model: project, inputs: {input: picture}, outputs: {transformed: projected}}\n"
        "- {model: 'forest:1', inputs: {input: projected}, outputs: {label: second_opinion}}\n"
    )
    client.push(tmp_path, model="twice")
    client.deploy("twice")
    client.wait_for_deployment("twice")
    found = client.predict("twice", digits.images[:20])
    np.testing.assert_array_equal(found["label"], digits.by_hand(digits.images[:20]))
    np.testing.assert_array_equal(
        found["second_opinion"], digits.forest.predict(digits.project.transform(digits.images[:20]))
    )
    only = client.predict("twice", digits.images[:2], outputs=["second_opinion"])
    assert list(only) == ["second_opinion"]
    client.undeploy("twice")


def test_no_request_is_lost_when_replicas_of_steps_and_ensemble_are_killed(
    mesh: Mesh, client: Client, digits: Digits
) -> None:
    images = digits.images[:40]
    expected = digits.by_hand(images)
    stop = threading.Event()

    def ask(first: int) -> int:
        answered = 0
        with Client(mesh.address) as own:
            while not stop.is_set():
                at = (first + answered) % len(images)
                found = own.predict("digits", images[at : at + 1], timeout=30)
                assert found["label"].tolist() == [expected[at]]
                answered += 1
        return answered

    def kill(deployment: str) -> None:
        (victim,) = client.list_replicas(deployment=deployment)
        os.kill(victim.pid, signal.SIGKILL)
        mesh.wait(
            lambda: (
                [each.pid for each in client.list_replicas(deployment=deployment) if each.pid]
                not in ([], [victim.pid])
                and client.is_ready("digits")
            ),
            f"{deployment} answers again",
        )

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, first) for first in range(8)]
        try:
            for deployment in ("forest", "digits", "project", "digits", "weigh"):
                kill(deployment)
        finally:
            stop.set()
        assert sum(one.result(timeout=60) for one in asking) > 50


def cli(mesh: Mesh, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "penstock_cli", *words],
        env={**os.environ, "PENSTOCK_ENDPOINT": mesh.address, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def serving(client: Client, name: str) -> set[str]:
    return {target.model for target in client.get_deployment(name).serving}
