"""Weights by name in safetensors, which every framework reads and no reader executes.

Weights alone are no model. So there are two results:

- Of a version that a recipe made (it has `architecture.json`): a version of format safetensors. The runtime
  torch builds the model from the two files.
- Of any other: the version as it is, program and format, with `model.safetensors` beside the program: the
  weights are there for whoever wants them, and what is served stays the program.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from penstock.registry.v1 import manifest_pb2
from penstock_worker.adapters.conversion.source import Source, exported_program, quietly
from penstock_worker.adapters.training.architectures.blueprint import ARCHITECTURE_FILE
from penstock_worker.adapters.training.rebuild import WEIGHTS_FILE


def to_safetensors(source: Source, directory: Path, manifest: manifest_pb2.Manifest) -> None:
    """Write the bundle and say in the manifest what it is.

    Args:
        source: What is converted.
        directory: Where to.
        manifest: Of the result; is changed.

    Raises:
        JobFailure: UNSUPPORTED: it has no tensors that safetensors can hold.
    """
    if (source.directory / ARCHITECTURE_FILE).exists() and (source.directory / WEIGHTS_FILE).exists():
        shutil.copy(source.directory / WEIGHTS_FILE, directory)
        manifest.runtime, manifest.format, manifest.entrypoint = "torch", "safetensors", WEIGHTS_FILE
        return
    weights = _weights(source)
    if not weights:
        raise source.unsupported("it has no weights.")
    strange = sorted(name for name, value in weights.items() if type(value) is not torch.Tensor)
    if strange:
        raise source.unsupported(
            f"{', '.join(strange[:5])} are no plain tensors (packed by a quantization); safetensors has no "
            "form for them."
        )
    for path in source.directory.rglob("*"):
        if path.is_file() and path.name != "manifest.yaml":
            target = directory / path.relative_to(source.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    written = load_file(directory / WEIGHTS_FILE)
    if any(not torch.equal(written[name], value) for name, value in weights.items() if not _has_nan(value)):
        raise source.unsupported("the weights could not be written as they are.")


def _weights(source: Source) -> dict[str, torch.Tensor]:
    kind = source.manifest.format
    found: dict[str, Any] = {}
    if kind == "onnx":
        import onnx

        model = onnx.load(str(source.entrypoint))
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if array.dtype.kind in "fiub":
                found[tensor.name] = torch.from_numpy(array.copy())
    elif kind == "torchscript":
        with quietly():
            found = torch.jit.load(str(source.entrypoint), map_location="cpu").state_dict()
    else:
        program = exported_program(source)
        found = {**program.state_dict, **program.constants}
        found = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    # Tensors that share memory are written once each: a reader must not need the others.
    return {
        name: value.detach().contiguous().clone()
        if type(value) in (torch.Tensor, torch.nn.Parameter)
        else value
        for name, value in found.items()
    }


def _has_nan(value: torch.Tensor) -> bool:
    return value.is_floating_point() and bool(value.isnan().any())
