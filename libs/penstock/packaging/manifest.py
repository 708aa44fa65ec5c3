"""manifest.yaml: the standard model description, in the JSON mapping of registry/v1/manifest.proto.

::

    runtime: torch
    format: torchscript
    entrypoint: model.pt
    signature:
      inputs:
      - {name: x, dataType: FP32, shape: [-1, 64]}
      outputs:
      - {name: logits, dataType: FP32, shape: [-1, 10]}
    batching: {maxBatchSize: 32}
    metrics: {accuracy: 0.97}

Whatever it says goes before what the files themselves say. Datatypes may be written without their prefix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format

from penstock.errors import InvalidArgument, Reason
from penstock.packaging.specs import data_type
from penstock.registry.v1 import manifest_pb2

FILE_NAME = "manifest.yaml"
_MAX_BYTES = 1 << 20


def read_manifest(path: Path) -> manifest_pb2.Manifest:
    """Return what a manifest.yaml says; fields it leaves out stay empty.

    Raises:
        InvalidArgument: It is not YAML, or says something that a manifest cannot.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise _wrong(path, f"it is larger than {_MAX_BYTES} bytes")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f"it is not YAML: {error}") from error
    if loaded is None:
        return manifest_pb2.Manifest()
    if not isinstance(loaded, dict):
        raise _wrong(path, "it must hold fields such as runtime, signature, metrics")
    return parse_manifest(path, loaded)


def parse_manifest(path: Path, fields: dict[str, Any]) -> manifest_pb2.Manifest:
    """Return the manifest of fields that were read from a file.

    Raises:
        InvalidArgument: A field says something that a manifest cannot.
    """
    try:
        return json_format.ParseDict(_with_prefixes(fields), manifest_pb2.Manifest())
    except json_format.ParseError as error:
        raise _wrong(path, str(error)) from error


def to_yaml(manifest: manifest_pb2.Manifest) -> str:
    """Return a manifest as `read_manifest` takes it."""
    fields = json_format.MessageToDict(manifest)
    for tensors in fields.get("signature", {}).values():
        for tensor in tensors:
            tensor["dataType"] = str(tensor.get("dataType", "")).removeprefix("DATA_TYPE_")
            # int64 is a string in the JSON mapping, for JavaScript's sake; here a number reads better.
            tensor["shape"] = [int(dimension) for dimension in tensor.get("shape", [])]
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def overlay(base: manifest_pb2.Manifest, over: manifest_pb2.Manifest) -> None:
    """Put what `over` says in place of what `base` says; inputs and outputs are replaced as wholes."""
    replacement = manifest_pb2.Manifest()
    replacement.CopyFrom(over)
    if replacement.signature.inputs:
        base.signature.ClearField("inputs")
    if replacement.signature.outputs:
        base.signature.ClearField("outputs")
    base.MergeFrom(replacement)


def _with_prefixes(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with datatypes as the enum spells them."""
    signature = fields.get("signature")
    if not isinstance(signature, dict):
        return fields
    spelled: dict[str, Any] = {}
    for side, tensors in signature.items():
        spelled[side] = (
            [_spelled(tensor) if isinstance(tensor, dict) else tensor for tensor in tensors]
            if isinstance(tensors, list)
            else tensors
        )
    return {**fields, "signature": spelled}


def _spelled(tensor: dict[str, Any]) -> dict[str, Any]:
    return {
        key: int(data_type(value)) if key in {"dataType", "data_type"} and isinstance(value, str) else value
        for key, value in tensor.items()
    }


def _wrong(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"{path} is not right: {why}.", reason=Reason.INVALID_REQUEST)
