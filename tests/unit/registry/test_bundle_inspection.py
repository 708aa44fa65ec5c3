"""What is taken as which format, and everything that could run code when loaded is not."""

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import helper

from penstock_kit.errors import InvalidArgument, Reason
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.formats import inspect_bundle
from penstock_registry.domain.manifest import Manifest, Signature
from penstock_registry.domain.version import Version
from support.registry_world import skops_bytes

# torch's own notices while it exports; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


class Evil:
    """Unpickling it would run a command."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("true",)


def inspect(data: bytes, fmt: str, path: str = "model", more: Mapping[str, bytes] | None = None) -> None:
    contents = {path: data, **(more or {})}
    files = tuple(
        BundleFile(name, len(body), hashlib.sha256(body).hexdigest(), len(body))
        for name, body in contents.items()
    )
    by_digest = {hashlib.sha256(body).hexdigest(): body for body in contents.values()}
    manifest = Manifest("runtime", fmt, path, Signature())
    inspect_bundle(Version("m", 1, manifest, files), lambda digest: io.BytesIO(by_digest[digest]))


def refused(data: bytes, fmt: str, more: Mapping[str, bytes] | None = None) -> Reason:
    with pytest.raises(InvalidArgument) as error:
        inspect(data, fmt, more=more)
    return error.value.reason


def test_weights_of_a_recipe_need_their_architecture_and_are_then_taken() -> None:
    weights = safetensors.torch.save({"a": torch.zeros(2)})
    assert refused(weights, "safetensors") is Reason.MANIFEST_MISMATCH
    inspect(weights, "safetensors", "model.safetensors", {"architecture.json": b"{}"})


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))
        self.weights = torch.ones(3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        scores = self.head(features) * self.scale + self.weights.sum()
        return {"scores": scores.reshape(x.shape[0], -1), "twice": torch.cat([features, features], 0)}


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,)), x.nonzero()[:, 0]


class Text(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(100, 32)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.layers(self.words(x)), approximate="tanh")


def exported(module: torch.nn.Module, *inputs: torch.Tensor, dynamic: Any = None) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pt2() -> bytes:
    batch = torch.export.Dim("batch", min=1, max=64)
    return exported(Net(), torch.ones(4, 1, 8, 8), dynamic=({0: batch},))


def rewritten(
    archive: bytes, change: Callable[[str, bytes], bytes], add: Mapping[str, bytes] | None = None
) -> bytes:
    """The zip archive with its members changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
        root = source.namelist()[0].partition("/")[0]
        for name, data in (add or {}).items():
            target.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


def keep(name: str, data: bytes) -> bytes:
    return data


def test_exported_programs_of_many_kinds_are_taken(pt2: bytes) -> None:
    inspect(pt2, "pt2")
    inspect(exported(Branch(), torch.ones(4, 7)), "pt2")
    auto = torch.export.Dim.AUTO
    tokens = torch.ones(4, 7, dtype=torch.long)
    inspect(exported(Text(), tokens, dynamic=({0: auto, 1: auto},)), "pt2")
    inspect(rewritten(pt2, keep), "pt2")


def test_weights_architecture_and_tokenizer_may_lie_beside_an_exported_program(pt2: bytes) -> None:
    weights = safetensors.torch.save({"head.weight": torch.ones(2, 4)})
    # A header of 640 bytes: the file then begins like a pickle of protocol 2.
    like_pickle = (640).to_bytes(8, "little") + b'{"w": 1}'.ljust(640)
    texts = {"architecture.json": b'{"name": "cnn"}', "tokenizer.json": b'{"version": "1.0"}'}
    inspect(
        pt2,
        "pt2",
        path="model.pt2",
        more={"model.safetensors": weights, "w2.safetensors": like_pickle, **texts},
    )
    binfloat = b"\x80\x02G00\0\0\0{00" + pickle.dumps(Evil(), 2)[2:]
    for evil in (pickle.dumps(Evil()), binfloat):
        assert refused(pt2, "pt2", more={"model.safetensors": evil, **texts}) is Reason.UNSAFE_FORMAT


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.hub.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.add.__globals__",
        "torch.ops.higher_order.call_torchbind",
        "_operator.methodcaller",
        "_operator.call",
        "#extension",
        "math.__loader__",
    ],
)
def test_an_exported_program_with_a_foreign_operator_is_refused(pt2: bytes, target: str) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        graph = json.loads(data)
        graph["graph_module"]["graph"]["nodes"][0]["target"] = target
        return json.dumps(graph).encode()

    assert refused(rewritten(pt2, change), "pt2") is Reason.UNSAFE_FORMAT


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "exec(chr(97))",
        "().__class__",
        "[x for x in (1,)]",
        "lambda: 1",
        "Symbol('s0', evaluate=print)",
        "s0.__class__",
        "1 if s0 else 2",
    ],
)
def test_an_exported_program_with_code_in_a_shape_or_guard_is_refused(pt2: bytes, expression: str) -> None:
    def shape(name: str, data: bytes) -> bytes:
        text = data.decode("latin1")
        if name.endswith("models/model.json"):
            assert '"expr_str": "' in text
            text = text.replace('"expr_str": "', f'"expr_str": "{expression} + ', 1)
        return text.encode("latin1")

    def guard(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return json.dumps({**json.loads(data), "guards_code": [expression]}).encode()

    def bounds(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return json.dumps({**json.loads(data), "range_constraints": {expression: {}}}).encode()

    for change in (shape, guard, bounds):
        assert refused(rewritten(pt2, change), "pt2") is Reason.UNSAFE_FORMAT


def test_guards_as_torch_writes_them_are_taken(pt2: bytes) -> None:
    guards = [
        "L['x'].size()[0] >= 2",
        "Eq(Mod(L['x'].size()[0], 2), 0)",
        "L['args'][0]['k'].stride()[1] != 1 and not L['x'].size()[0] // 2 > 3",
        "2 <= L['x'].size()[0] <= 64",
    ]

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return json.dumps({**json.loads(data), "guards_code": guards}).encode()

    inspect(rewritten(pt2, change), "pt2")


def test_an_exported_program_with_pickled_parts_is_refused(pt2: bytes) -> None:
    def pickled(name: str, data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true')

    def opaque(name: str, data: bytes) -> bytes:
        return data.replace(b'"path_name": "weight_0"', b'"path_name": "opaque_obj_0"')

    def inputs(payload: object) -> Callable[[str, bytes], bytes]:
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        return lambda name, data: buffer.getvalue() if "sample_inputs" in name else data

    def legacy(name: str, data: bytes) -> bytes:
        return pickle.dumps(Evil()) if "sample_inputs" in name else data

    assert refused(rewritten(pt2, pickled), "pt2") is Reason.UNSAFE_FORMAT
    assert refused(rewritten(pt2, opaque), "pt2") is Reason.UNSAFE_FORMAT
    assert refused(rewritten(pt2, inputs(((Evil(),), {}))), "pt2") is Reason.UNSAFE_FORMAT
    assert refused(rewritten(pt2, legacy), "pt2") in (Reason.UNSAFE_FORMAT, Reason.MANIFEST_MISMATCH)
    inspect(rewritten(pt2, inputs(((torch.ones(4, 1, 8, 8, dtype=torch.bfloat16),), {}))), "pt2")
    for name in ("data/aotinductor/model/a.so", "extra/lib.so", "data/weights/model.pt", "models/other.bin"):
        assert refused(rewritten(pt2, keep, {name: b"x"}), "pt2") is Reason.UNSAFE_FORMAT


def test_an_archive_that_two_readers_may_see_differently_is_refused(pt2: bytes) -> None:
    mismatch = Reason.MANIFEST_MISMATCH
    assert refused(rewritten(pt2, keep, {"Models/Model.json": b"{}"}), "pt2") is mismatch
    assert refused(rewritten(pt2, keep, {"../escape": b"x"}), "pt2") is mismatch
    assert refused(b"#!/bin/sh\n" + pt2, "pt2") is mismatch
    assert refused(pt2 + b"trailing", "pt2") is mismatch
    assert refused(pt2[: len(pt2) // 2], "pt2") is mismatch


def test_torchscript_is_taken_and_torch_save_is_not() -> None:
    script, whole, state, legacy = (io.BytesIO() for _ in range(4))
    module = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.script(module), script)
    torch.save(module, whole)
    torch.save(module.state_dict(), state)
    torch.save(module.state_dict(), legacy, _use_new_zipfile_serialization=False)
    inspect(script.getvalue(), "torchscript")
    for data in (whole, state, legacy):
        for fmt in ("torchscript", "pt2"):
            assert refused(data.getvalue(), fmt) is Reason.UNSAFE_FORMAT
    assert refused(skops_bytes(), "torchscript") is Reason.MANIFEST_MISMATCH


def onnx_model(location: str = "") -> bytes:
    tensor = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    if location:
        weight.ClearField("float_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [tensor], [result], [weight])
    return helper.make_model(graph).SerializeToString()


def test_onnx_is_taken_with_its_external_data_in_the_bundle_only() -> None:
    inspect(onnx_model(), "onnx")
    inspect(onnx_model("weights.bin"), "onnx", more={"weights.bin": b"1234"})
    assert refused(onnx_model("weights.bin"), "onnx") is Reason.MANIFEST_MISMATCH
    assert refused(onnx_model("../weights.bin"), "onnx") is Reason.INVALID_REQUEST
    assert refused(onnx_model()[:-5], "onnx") is Reason.MANIFEST_MISMATCH
    for data in (b"hello", b"\x08\x07", b"{}", bytes(1000)):
        assert refused(data, "onnx") is Reason.MANIFEST_MISMATCH


def outside(name: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def with_outside(where: str) -> bytes:
    """A model with a tensor outside of its bundle, in one of the places where ONNX lets tensors stand."""
    model = onnx.ModelProto.FromString(onnx_model())
    constant = helper.make_node("Constant", [], ["c"], value=outside("c"))
    branch = helper.make_graph([constant], "b", [], [], [outside("d")] if where == "branch" else [])
    match where:
        case "node":
            model.graph.node.append(constant)
        case "branch" | "node of a branch":
            model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch))
        case "function":
            model.functions.append(helper.make_function("d", "f", [], ["c"], [constant], []))
        case "default of a function":
            function = model.functions.add(name="f")
            function.attribute_proto.append(helper.make_attribute("a", outside("a")))
        case "list":
            node = model.graph.node.add(op_type="Op")
            node.attribute.append(helper.make_attribute("all", [outside("a")]))
        case "sparse":
            model.graph.sparse_initializer.add(values=outside("values"))
        case "training":
            model.training_info.add(algorithm=branch)
    return model.SerializeToString()


@pytest.mark.parametrize(
    "where",
    [
        *("node", "branch", "node of a branch", "function"),
        *("default of a function", "list", "sparse", "training"),
    ],
)
def test_no_tensor_of_onnx_lies_outside_wherever_it_stands(where: str) -> None:
    assert refused(with_outside(where), "onnx") is Reason.INVALID_REQUEST


def test_onnx_graphs_nested_without_end_are_refused() -> None:
    def within(body: bytes, *fields: int) -> bytes:
        for field in fields:
            size = len(body)
            body = bytes([field << 3 | 2, size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + body
        return body

    graph = b""
    for _ in range(120):
        graph = within(graph, 6, 5, 1)  # graph of an attribute of a node of a graph
    assert refused(onnx_model() + within(graph, 7), "onnx") is Reason.MANIFEST_MISMATCH


def test_skops_is_taken_and_pickles_in_it_are_not() -> None:
    plain, objects = io.BytesIO(), io.BytesIO()
    np.save(plain, np.arange(3))
    np.save(objects, np.array([Path("/")], dtype=object), allow_pickle=True)
    inspect(skops_bytes(extra={"1.npy": plain.getvalue()}), "skops")
    unsafe = Reason.UNSAFE_FORMAT
    assert refused(skops_bytes(extra={"1.npy": objects.getvalue()}), "skops") is unsafe
    assert refused(skops_bytes(extra={"model.pkl": b"x"}), "skops") is unsafe
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("schema.json", "[]")
    assert refused(other.getvalue(), "skops") is Reason.MANIFEST_MISMATCH


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_hidden_beside_the_entrypoint_is_refused(protocol: int) -> None:
    hidden = {"weights.bin": pickle.dumps(Evil(), protocol=protocol)}
    assert refused(onnx_model(), "onnx", more=hidden) is Reason.UNSAFE_FORMAT


def test_ordinary_files_beside_the_entrypoint_are_taken() -> None:
    array = io.BytesIO()
    np.save(array, np.ones(3, dtype=np.float32))
    inspect(
        onnx_model(),
        "onnx",
        more={
            "labels.txt": b"cat\ndog.\n",
            "config.json": b'{"a": [1, 2.5]}',
            "poem.txt": b"(I wandered lonely as a cloud.)",
            "data.npy": array.getvalue(),
            "empty": b"",
        },
    )


def test_an_empty_entrypoint_is_refused() -> None:
    assert refused(b"", "onnx") is Reason.MANIFEST_MISMATCH


def test_nothing_of_a_malicious_bundle_ever_runs(monkeypatch: pytest.MonkeyPatch, pt2: bytes) -> None:
    ran: list[str] = []
    monkeypatch.setattr("os.system", ran.append)
    for fmt in ("pt2", "torchscript", "onnx", "skops"):
        refused(pickle.dumps(Evil()), fmt)
    buffer = io.BytesIO()
    torch.save(((Evil(),), {}), buffer)
    change = rewritten(pt2, lambda name, data: buffer.getvalue() if "sample_inputs" in name else data)
    refused(change, "pt2")
    assert ran == []
