"""A Triton model directory: `config.pbtxt` and numbered version directories."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import text_format

from penstock.common.v1 import tensor_pb2
from penstock.ensemble_messages import steps_to_proto
from penstock.ensembles import Step
from penstock.errors import InvalidArgument, Reason
from penstock.oip.v2 import inference_pb2 as oip
from penstock.packaging import onnx_model, torch_export, torchscript
from penstock.packaging.bundle import local_files
from penstock.packaging.draft import Draft, unreadable
from penstock.packaging.ensemble_file import RUNTIME, draft_of
from penstock.packaging.files import files_below
from penstock.packaging.specs import spec
from penstock.registry.v1 import manifest_pb2

CONFIG = "config.pbtxt"
# Backend (and the older "platform") → the file that Triton looks for.
_MODEL_FILES = {
    "onnxruntime": "model.onnx",
    "onnxruntime_onnx": "model.onnx",
    "pytorch": "model.pt",
    "pytorch_libtorch": "model.pt",
}
# Strings, comments, brackets, and whatever else stands between blanks, in protobuf's text format.
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|#[^\n]*|[{}\[\]<>:;,]|[^\s{}\[\]<>:;,"\'#]+')
_STARTS_FIELD = re.compile(r"\s*[:{\[<]")


def is_model_directory(path: Path) -> bool:
    """Whether a directory looks like one model of a Triton repository."""
    return (path / CONFIG).is_file() or any(
        (version / file).is_file() for version in _versions(path) for file in set(_MODEL_FILES.values())
    )


def inspect(path: Path, given: tensor_pb2.Signature) -> Draft:
    """Describe the newest version in a Triton model directory.

    Raises:
        InvalidArgument: The configuration cannot be read, or names a backend that is not served.
    """
    config = _config(path)
    if config.platform == "ensemble" or config.ensemble_scheduling.step:
        return _ensemble(path, config, given)
    versions = _versions(path)
    if not versions:
        raise InvalidArgument(f"{path} has no version directory; put the model file into {path / '1'}.")
    version = versions[-1]
    model = _model_file(path, version, config)
    wanted = tensor_pb2.Signature()
    wanted.CopyFrom(given)
    batches = config.max_batch_size > 0
    if not wanted.inputs:
        wanted.inputs.extend(_spec(tensor, batches=batches) for tensor in config.input)
    if not wanted.outputs:
        wanted.outputs.extend(_spec(tensor, batches=batches) for tensor in config.output)
    if model.suffix == ".onnx":
        draft = onnx_model.inspect(model, wanted)
        _check_names(path, wanted, draft.manifest.signature)
    elif _is_exported(model):
        draft = torch_export.inspect(model, wanted)
    else:
        draft = torchscript.inspect(model, wanted)
    for side in ("inputs", "outputs"):
        described = getattr(wanted, side)
        if described and not getattr(given, side):
            draft.manifest.signature.ClearField("inputs" if side == "inputs" else "outputs")
            getattr(draft.manifest.signature, side).extend(described)
    if batches:
        draft.batchable = True
        draft.manifest.batching.max_batch_size = config.max_batch_size
        delay = config.dynamic_batching.max_queue_delay_microseconds
        draft.manifest.batching.max_delay_microseconds = int(delay)
    elif (path / CONFIG).is_file():
        draft.batchable = False
    draft.name = config.name or path.name
    draft.manifest.entrypoint = model.relative_to(version).as_posix()
    draft.files = local_files(version, files_below(version))
    if len(versions) > 1:
        draft.notes.append(f"Only Triton's version {version.name}, the newest, was taken.")
    return draft


def _ensemble(path: Path, config: oip.ModelConfig, given: tensor_pb2.Signature) -> Draft:
    """Describe an ensemble: its steps are Triton's, and call deployments of the same names."""
    steps: list[Step] = []
    for step in config.ensemble_scheduling.step:
        name = step.model_name
        count = sum(other.deployment == name for other in steps)
        selected = f"{name}:{step.model_version}" if step.model_version > 0 else name
        steps.append(
            Step(
                f"{name}-{count + 1}" if count else name,
                selected,
                dict(step.input_map),
                dict(step.output_map),
            )
        )
    manifest = manifest_pb2.Manifest(runtime=RUNTIME, format=RUNTIME, entrypoint=CONFIG)
    manifest.signature.CopyFrom(given)
    batches = config.max_batch_size > 0
    if not given.inputs:
        manifest.signature.inputs.extend(_spec(tensor, batches=batches) for tensor in config.input)
    if not given.outputs:
        manifest.signature.outputs.extend(_spec(tensor, batches=batches) for tensor in config.output)
    manifest.batching.max_batch_size = config.max_batch_size
    manifest.ensemble.CopyFrom(steps_to_proto(steps))
    draft = draft_of(manifest, tuple(steps), path / CONFIG)
    draft.name = config.name or path.name
    return draft


def _config(path: Path) -> oip.ModelConfig:
    config = oip.ModelConfig()
    file = path / CONFIG
    if not file.is_file():
        return config
    try:
        # Triton's configuration says much that has no meaning here (instance placement, caches …).
        text = _known_fields(file.read_text(encoding="utf-8"), set(config.DESCRIPTOR.fields_by_name))
        text_format.Parse(text, config, allow_unknown_field=True)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise unreadable(str(file), "a Triton configuration", error) from error
    return config


def _known_fields(text: str, known: set[str]) -> str:
    """Return the text without top-level fields of other names.

    protobuf's parser skips unknown fields too, but stops at unknown lists of messages (model_warmup is one).
    """
    kept: list[str] = []
    depth = 0
    keep = True
    for match in _TOKEN.finditer(text):
        word = match.group()
        if word.startswith("#"):
            continue
        if depth == 0 and (word[0].isalpha() or word[0] == "_") and _STARTS_FIELD.match(text, match.end()):
            keep = word in known
        depth += (word in "{[<") - (word in "}]>")
        if keep:
            kept.append(word)
    return " ".join(kept)


def _versions(path: Path) -> list[Path]:
    numbered = [child for child in path.iterdir() if child.is_dir() and child.name.isdigit()]
    return sorted(numbered, key=lambda child: int(child.name))


def _model_file(path: Path, version: Path, config: oip.ModelConfig) -> Path:
    kind = config.backend or config.platform
    if kind and kind not in _MODEL_FILES:
        raise InvalidArgument(
            f"{path} is for Triton's backend {kind}, which is not served; onnxruntime and pytorch are. "
            + (
                "For code of your own, push a directory with model.py (python runtime)."
                if kind == "python"
                else "Export the model to ONNX."
            ),
            reason=Reason.UNKNOWN_RUNTIME,
        )
    names: Iterable[str] = [_MODEL_FILES[kind]] if kind else sorted(set(_MODEL_FILES.values()))
    for name in names:
        if (version / name).is_file():
            return version / name
    raise InvalidArgument(f"{version} lacks the model file {' or '.join(names)}.")


def _is_exported(model: Path) -> bool:
    """Whether a model.pt holds a torch.export program rather than TorchScript."""
    if not zipfile.is_zipfile(model):
        return False
    with zipfile.ZipFile(model) as archive:
        return any(name.endswith("archive_format") for name in archive.namelist())


def _check_names(path: Path, wanted: tensor_pb2.Signature, found: tensor_pb2.Signature) -> None:
    """Refuse a configuration whose names the graph does not have."""
    for side in ("inputs", "outputs"):
        known = {tensor.name for tensor in getattr(found, side)}
        unknown = [tensor.name for tensor in getattr(wanted, side) if known and tensor.name not in known]
        if unknown:
            raise InvalidArgument(
                f"{path / CONFIG} names the {side} {', '.join(unknown)}, "
                f"but the graph has {', '.join(sorted(known))}.",
                reason=Reason.MANIFEST_MISMATCH,
            )


def _spec(tensor: oip.ModelInput | oip.ModelOutput, *, batches: bool) -> tensor_pb2.TensorSpec:
    name = oip.ModelDataType.Name(tensor.data_type).removeprefix("TYPE_")
    if name == "INVALID":
        raise InvalidArgument(f"{CONFIG} gives no data_type for {tensor.name}.")
    shape = [-1, *tensor.dims] if batches else list(tensor.dims)
    described = spec(tensor.name, "BYTES" if name == "STRING" else name, shape)
    if isinstance(tensor, oip.ModelInput):
        described.optional = tensor.optional
    return described
