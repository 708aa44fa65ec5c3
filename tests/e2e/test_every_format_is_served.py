"""What `penstock push` makes of each kind of model is what the runtimes serve."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression
from skops import io as skops_io

from penstock import Client, PackageOptions
from penstock.errors import FailedPrecondition, InvalidArgument, PenstockError, Reason
from support.mesh_process import Mesh

X = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT.copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def torch_export(path: Path) -> Path:
    program = torch.export.export(
        Linear(), (torch.zeros(2, 4),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    )
    torch.export.save(program, path / "m.pt2")
    return path / "m.pt2"


def torchscript(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Linear().eval(), torch.zeros(2, 4)), path / "m.pt")
    return path / "m.pt"


def onnx_file(path: Path, *, external: bool = False) -> Path:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], WEIGHT.tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path / "model.onnx", save_as_external_data=external, location="w.bin", size_threshold=0)
    return path / "model.onnx"


def onnx_with_weights_beside_it(path: Path) -> Path:
    return onnx_file(path, external=True)


def mlflow(path: Path) -> Path:
    onnx_file(path)
    (path / "MLmodel").write_text(json.dumps({"flavors": {"onnx": {"data": "model.onnx"}}}))
    return path


def triton(path: Path) -> Path:
    (path / "1").mkdir()
    onnx_file(path / "1")
    (path / "config.pbtxt").write_text(
        'backend: "onnxruntime" max_batch_size: 4\n'
        'input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
        'output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]\n'
    )
    return path


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh]) -> Mesh:
    return shared_mesh()


@pytest.fixture(scope="module")
def client(mesh: Mesh) -> Iterator[Client]:
    with Client(mesh.address) as client:
        yield client


def serve(client: Client, name: str) -> None:
    deployment = client.deploy(name)
    client.wait_for_deployment(name, revision=deployment.revision)
    client.wait_ready(name)


@pytest.mark.parametrize(
    "make", [torch_export, torchscript, onnx_file, onnx_with_weights_beside_it, mlflow, triton]
)
def test_a_linear_model_of_this_kind_gives_the_right_product(
    client: Client, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    given = PackageOptions(inputs=["x:FP32:-1,4"], max_batch_size=8) if make is torchscript else None
    name = make.__name__.replace("_", "-")
    client.push(make(tmp_path), model=name, options=given)
    serve(client, name)
    np.testing.assert_allclose(client.predict(name, X[:3]).only, X[:3] @ WEIGHT, rtol=1e-5)


def test_a_classifier_gives_its_own_labels_and_probabilities(client: Client, tmp_path: Path) -> None:
    model = RandomForestClassifier(5, random_state=1).fit(X, ["cat", "dog"] * 3)
    skops_io.dump(model, tmp_path / "forest.skops")
    client.push(tmp_path / "forest.skops")
    serve(client, "forest")
    prediction = client.predict("forest", X)
    assert [label.decode() for label in prediction["label"]] == model.predict(X).tolist()
    np.testing.assert_allclose(prediction["probabilities"], model.predict_proba(X))


def test_a_regression_gives_its_numbers(client: Client, tmp_path: Path) -> None:
    model = LinearRegression().fit(X, X.sum(axis=1))
    skops_io.dump(model, tmp_path / "line.skops")
    client.push(tmp_path / "line.skops")
    serve(client, "line")
    np.testing.assert_allclose(client.predict("line", X).only, X.sum(axis=1), rtol=1e-5)


def test_code_is_refused_where_no_operator_allowed_it(client: Client, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text('INPUTS = ["x:FP32:-1,4"]\nOUTPUTS = ["y:FP32:-1,4"]\n')
    with pytest.raises(PenstockError) as caught:
        client.push(tmp_path, model="code")
    assert isinstance(caught.value, (FailedPrecondition, InvalidArgument))
    assert caught.value.reason is Reason.UNSAFE_FORMAT


def test_what_was_downloaded_can_be_pushed_again_without_sending_a_byte(
    client: Client, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    first = client.push(onnx_file(tmp_path / "one"), model="again")
    client.download("again:1", tmp_path / "two")
    second = client.push(tmp_path / "two", model="again")
    assert (second.number, second.digest) == (2, first.digest)
