"""Is a bundle that cannot be served refused with words that say why?"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from google.protobuf import json_format

from penstock.registry.v1.manifest_pb2 import Manifest
from penstock_kit.errors import InvalidArgument, PenstockError, Reason
from penstock_worker.domain.replica import BatchingPolicy, ReplicaConfig
from penstock_worker.hotpath.loading import Loaded, load
from support import models


@pytest.fixture(autouse=True)
def _the_process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica has its process for itself; these tests have not."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)


def loaded(directory: Path, manifest: Manifest, **more: Any) -> Loaded:
    fields: dict[str, Any] = {"allow_python_runtime": True, **more}
    return load(
        ReplicaConfig(
            replica="r1",
            consumer="r1.1",
            queue="q:1:a",
            redis_url="unix:///nowhere",
            bundle_dir=str(directory),
            manifest=json_format.MessageToJson(manifest),
            model="m",
            version=1,
            **fields,
        )
    )


def refusal(directory: Path, manifest: Manifest, **more: Any) -> PenstockError:
    with pytest.raises(PenstockError) as caught:
        loaded(directory, manifest, **more)
    return caught.value


def test_code_of_a_bundle_runs_only_where_an_operator_allowed_it(tmp_path: Path) -> None:
    touch = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    code = touch + "class Model:\n    def predict(self, inputs): return inputs\n"
    manifest = models.build_python(tmp_path / "b", code)
    error = refusal(tmp_path / "b", manifest, allow_python_runtime=False)
    assert error.reason is Reason.UNSAFE_FORMAT
    assert not (tmp_path / "ran").exists()


def test_compiled_code_is_loaded_only_where_an_operator_allowed_it_and_on_its_own_kind_of_machine(
    tmp_path: Path,
) -> None:
    manifest = models.build_echo_pt2(tmp_path)
    manifest.format = "aoti"
    error = refusal(tmp_path, manifest)
    assert error.reason is Reason.UNSAFE_FORMAT
    assert "PENSTOCK_ALLOW_COMPILED_MODELS" in error.message
    manifest.parameters["compiled_for"] = "PDP-11 (pdp11)"
    error = refusal(tmp_path, manifest, allow_compiled_models=True)
    assert error.reason is Reason.LOAD_FAILED
    assert "was compiled for PDP-11 (pdp11), and this is " in error.message


def test_an_unknown_runtime_or_format_is_named_with_those_that_exist(tmp_path: Path) -> None:
    manifest = models.build_echo_python(tmp_path)
    manifest.runtime = "tensorflow"
    error = refusal(tmp_path, manifest)
    assert error.reason is Reason.UNKNOWN_RUNTIME
    assert "onnx, python, sklearn, torch" in error.message
    manifest.runtime = "torch"
    assert "opens aoti, pt2, safetensors, torchscript, not python" in refusal(tmp_path, manifest).message


@pytest.mark.parametrize("entrypoint", ["other.py", "../model.py", "/etc/passwd", ""])
def test_an_entrypoint_outside_the_bundle_is_refused(entrypoint: str, tmp_path: Path) -> None:
    manifest = models.build_echo_python(tmp_path / "b")
    (tmp_path / "model.py").write_text("")
    manifest.entrypoint = entrypoint
    assert refusal(tmp_path / "b", manifest).reason in (Reason.MANIFEST_MISMATCH, Reason.LOAD_FAILED)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = ", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("Model = 3", "needs a class Model with a method predict"),
        ("class Model: pass", "needs a class Model with a method predict"),
        ("class Model:\n    def predict(self, inputs): return {'z': 1}", "gave no output y; it gave z"),
        (
            "class Model:\n    def predict(self, inputs): return inputs['x'][:, :3]",
            "its signature says [-1, 16]",
        ),
        ("class Model:\n    def predict(self, inputs): return 1, 2", "gave 2 arrays, the signature has 1"),
        (
            "class Model:\n    def predict(self, inputs): 1 / 0",
            "with 1 row failed: The model raised ZeroDivision",
        ),
    ],
)
def test_a_model_that_fails_its_warm_up_is_not_served(code: str, words: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, models.build_python(tmp_path, code))
    assert error.reason is Reason.LOAD_FAILED
    assert words in error.message


def test_the_warm_up_runs_one_row_and_a_full_batch(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nclass Model:\n    sizes = ''\n"
        "    def load(self, directory): self.path = Path(directory).parent / 'sizes'\n"
        "    def predict(self, inputs):\n        self.sizes += f\"{len(inputs['x'])} \"\n"
        "        self.path.write_text(self.sizes)\n        return inputs['x']\n"
    )
    manifest = models.build_python(tmp_path / "b", code)
    loaded(tmp_path / "b", manifest, batching=BatchingPolicy(max_batch_size=5))
    assert (tmp_path / "sizes").read_text() == "1 1 5 5 "


def test_a_guess_that_the_model_rightly_refuses_does_not_keep_it_from_serving(tmp_path: Path) -> None:
    code = "class Model:\n    def predict(self, inputs):\n        raise ValueError('at least 3 columns')\n"
    free = [("x", "FP32", (-1, -1))]
    loaded(tmp_path, models.build_python(tmp_path, code, inputs=free, outputs=free))


def test_a_graph_with_other_names_than_the_signature_is_refused(tmp_path: Path) -> None:
    manifest = models.build_echo_onnx(tmp_path)
    manifest.signature.inputs[0].name = "q"
    assert "names the inputs q; the graph has x" in refusal(tmp_path, manifest).message
    manifest = models.build_echo_onnx(tmp_path)
    manifest.signature.outputs[0].name = "q"
    assert "the graph has y" in refusal(tmp_path, manifest).message


def test_bytes_that_are_no_text_are_the_callers_fault_and_not_the_models(tmp_path: Path) -> None:
    executor = loaded(tmp_path, models.build_identity_onnx(tmp_path, "BYTES", rank=1)).executor
    with pytest.raises(InvalidArgument, match="Input x holds bytes that are no UTF-8") as caught:
        executor.call({"x": np.array([b"text", b"\xff"], dtype=object)}, 2)
    assert caught.value.reason is Reason.INVALID_TENSOR


@pytest.mark.parametrize("data", [b"", b"not a model"])
@pytest.mark.parametrize("build", [models.build_echo_onnx, models.build_tree_skops, models.build_echo_pt2])
def test_a_file_that_is_no_model_is_refused(data: bytes, build: Any, tmp_path: Path) -> None:
    manifest = build(tmp_path)
    (tmp_path / manifest.entrypoint).write_bytes(data)
    assert refusal(tmp_path, manifest).reason is Reason.LOAD_FAILED


def test_a_skops_file_with_unknown_types_is_refused(tmp_path: Path) -> None:
    from sklearn.preprocessing import FunctionTransformer

    manifest = models.build_tree_skops(tmp_path)
    skops.io.dump(FunctionTransformer(func=print), tmp_path / "model.skops")
    error = refusal(tmp_path, manifest)
    assert error.reason is Reason.UNSAFE_FORMAT
    assert "print" in error.message


def test_outputs_of_scikit_learn_can_be_named_in_the_manifest(tmp_path: Path) -> None:
    manifest = models.build_tree_skops(tmp_path)
    manifest.signature.outputs[0].name = "species"
    assert "name its method" in refusal(tmp_path, manifest).message
    manifest.parameters["outputs"] = "species=predict"
    executor = loaded(tmp_path, manifest).executor
    answer = executor.call({"x": np.array([[5.1, 3.5, 1.4, 0.2]], dtype=np.float32)}, 1)
    assert answer["species"].tolist() == [0]
    assert answer["probabilities"].tolist() == [[1, 0, 0]]


def test_a_torch_model_with_strings_is_refused(tmp_path: Path) -> None:
    manifest = models.build_echo_pt2(tmp_path)
    manifest.signature.inputs[0].data_type = 14  # type: ignore[assignment]
    assert "which torch does not have" in refusal(tmp_path, manifest).message


def test_a_deployment_may_lower_the_batch_size_and_zero_leaves_it_to_the_manifest(tmp_path: Path) -> None:
    manifest = models.build_echo_python(tmp_path)
    assert loaded(tmp_path, manifest).executor.max_rows == 64
    assert loaded(tmp_path, manifest, batching=BatchingPolicy(3)).executor.max_rows == 3
