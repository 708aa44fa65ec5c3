"""What callers send, and what the models of these tests must answer to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from penstock.registry.v1.manifest_pb2 import Manifest
from support.models import build_python

# Whole numbers up to here are exact in FP32.
_EXACT = 1 << 24
# Rows of the deployment that die begin with this number, which no `Payload` holds.
POISON = -13.0


@dataclass(frozen=True, slots=True)
class Payload:
    """Rows of consecutive whole numbers, so that any two requests of a test differ.

    Attributes:
        first: The first number; what would not be exact in FP32 begins again at 0.
        rows: How many rows.
        width: Numbers in a row.
    """

    first: int
    rows: int
    width: int

    def array(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """FP32 [rows, width]."""
        count = self.rows * self.width
        first = self.first % (_EXACT - count)
        return np.arange(first, first + count, dtype=np.float32).reshape(self.rows, self.width)

    def digest(self) -> str:
        """What the answer to it must have."""
        return digest([self.rows, self.width], self.array().tobytes())


def digest(shape: list[int], data: bytes | memoryview) -> str:
    """A fingerprint of a tensor."""
    return hashlib.blake2b(data, digest_size=8, key=repr(shape).encode()).hexdigest()


def save_echo(path: Path, version: int) -> Path:
    """Write an ONNX model with `input` FP32 [-1, -1].

    It answers `output`, the same tensor, and `version` FP32 [-1, 1], its number in each row.
    """
    batch, helper = onnx.TensorProto.FLOAT, onnx.helper
    constants = [
        helper.make_tensor(name, kind, [1], [value])
        for name, kind, value in (
            ("zero", onnx.TensorProto.INT64, 0),
            ("one", onnx.TensorProto.INT64, 1),
            ("nothing", batch, 0.0),
            ("number", batch, float(version)),
        )
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["input"], ["output"]),
            helper.make_node("Slice", ["input", "zero", "one", "one"], ["column"]),
            helper.make_node("Mul", ["column", "nothing"], ["blank"]),
            helper.make_node("Add", ["blank", "number"], ["version"]),
        ],
        "echo",
        [helper.make_tensor_value_info("input", batch, ["batch", "width"])],
        [
            helper.make_tensor_value_info("output", batch, ["batch", "width"]),
            helper.make_tensor_value_info("version", batch, ["batch", 1]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


_PYTHON = """
import os
import time

import numpy as np


class Model:
    def load(self, directory):
        self.seconds = {seconds}
        if {first_seconds}:
            try:
                open({token!r}, "x").close()
            except FileExistsError:
                return
            self.seconds = {first_seconds}

    def predict(self, inputs):
        rows = inputs["input"]
        if (rows[:, 0] == {poison}).any():
            os.abort()
        time.sleep(self.seconds)
        return {{"output": rows, "version": np.full((len(rows), 1), {version}, np.float32)}}
"""


def build_python_echo(
    directory: Path,
    *,
    version: int = 1,
    seconds: float = 0.0,
    first_seconds: float = 0.0,
    width: int = 16,
    max_batch_size: int = 64,
) -> Manifest:
    """The same in Python. It dies of a row that begins with `POISON`.

    Args:
        directory: Where.
        version: Its number.
        seconds: What a batch takes.
        first_seconds: What a batch takes in the first replica that ever loads it, if that differs.
        width: Numbers in a row.
        max_batch_size: Rows in a batch.
    """
    code = _PYTHON.format(
        poison=POISON,
        seconds=seconds,
        first_seconds=first_seconds,
        token=str(directory.with_suffix(".loaded").absolute()),
        version=version,
    )
    return build_python(
        directory,
        code,
        inputs=(("input", "FP32", (-1, width)),),
        outputs=(("output", "FP32", (-1, width)), ("version", "FP32", (-1, 1))),
        max_batch_size=max_batch_size,
    )
