"""Finds out what kind of model lies at a path."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from penstock.common.v1 import tensor_pb2
from penstock.errors import InvalidArgument, Reason
from penstock.packaging import (
    ensemble_file,
    mlflow_dir,
    onnx_model,
    python_dir,
    skops_model,
    torch_export,
    torchscript,
    triton_dir,
)
from penstock.packaging.bundle import local_files
from penstock.packaging.draft import Draft, is_whole, unsafe
from penstock.packaging.files import files_below
from penstock.registry.v1 import manifest_pb2

Inspect = Callable[[Path, tensor_pb2.Signature], Draft]

_BY_SUFFIX: dict[str, Inspect] = {
    ".pt2": torch_export.inspect,
    ".pt": torchscript.inspect,
    ".pth": torchscript.inspect,
    ".ts": torchscript.inspect,
    ".torchscript": torchscript.inspect,
    ".onnx": onnx_model.inspect,
    ".skops": skops_model.inspect,
}
_PICKLES = {".pkl", ".pickle", ".joblib", ".cloudpickle", ".dill"}
_KNOWN = (
    ".pt2 (torch.export), .pt (TorchScript), .onnx, .skops (scikit-learn), a directory with model.py, "
    "an MLflow or Triton model directory, an ensemble.yaml, or a .zip or .tar.gz of one of these"
)


def find_draft(path: Path, wanted: manifest_pb2.Manifest) -> Draft:
    """Return what the files at a path say about themselves.

    Args:
        path: A file or directory.
        wanted: What is said about them from outside; a whole signature spares looking for one.

    Raises:
        InvalidArgument: It is no kind of model that is served.
    """
    return _directory(path, wanted) if path.is_dir() else _file(path, wanted.signature)


def _file(path: Path, given: tensor_pb2.Signature) -> Draft:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise unsafe(path.name, "it is a pickle")
    inspect = _BY_SUFFIX.get(suffix)
    # Whatever it is called; TorchScript's own check has better words for what torch.save wrote.
    if inspect is not torchscript.inspect and _is_pickle(path):
        raise unsafe(path.name, "it is a pickle")
    if inspect is not None:
        if inspect is torchscript.inspect and _is_exported(path):
            inspect = torch_export.inspect
        return inspect(path, given)
    if ensemble_file.describes_ensemble(path):
        return ensemble_file.inspect(path, given)
    if suffix == ".safetensors":
        raise InvalidArgument(
            f"{path.name} holds weights without the model that uses them. Export the whole model with "
            "torch.export.save or to ONNX.",
            reason=Reason.UNKNOWN_RUNTIME,
        )
    raise InvalidArgument(
        f"{path.name} is no kind of model that is known. Push {_KNOWN}.", reason=Reason.UNKNOWN_RUNTIME
    )


def _directory(path: Path, wanted: manifest_pb2.Manifest) -> Draft:
    given = wanted.signature
    if wanted.runtime and wanted.format and wanted.entrypoint and is_whole(given):
        draft = Draft(path.name, manifest_pb2.Manifest(), local_files(path, files_below(path)))
        _refuse_pickled_entrypoint(path / wanted.entrypoint)
        return draft
    if (path / mlflow_dir.DESCRIPTION).is_file():
        return mlflow_dir.inspect(path, given)
    if triton_dir.is_model_directory(path):
        return triton_dir.inspect(path, given)
    if (path / "config.json").is_file() and (
        any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    ):
        raise InvalidArgument(
            f"{path} is a Hugging Face model, which is not served yet. Export it to ONNX "
            "(optimum-cli export onnx --model DIR OUT) or with torch.export, and push that.",
            reason=Reason.UNKNOWN_RUNTIME,
        )
    if (path / python_dir.ENTRYPOINT).is_file():
        return python_dir.inspect(path, given)
    for name in ensemble_file.NAMES:
        if (path / name).is_file():
            return ensemble_file.inspect(path / name, given)
    return _only_model_in(path, wanted)


def _only_model_in(path: Path, wanted: manifest_pb2.Manifest) -> Draft:
    """Describe the one model file in a directory, and take the other files along."""
    files = list(files_below(path))
    models = [file for file in files if file.suffix.lower() in _BY_SUFFIX]
    if wanted.entrypoint:
        models = [path / wanted.entrypoint]
        if not models[0].is_file():
            raise InvalidArgument(
                f"manifest.yaml names the entrypoint {wanted.entrypoint}, which is not in {path}.",
                reason=Reason.MANIFEST_MISMATCH,
            )
    pickles = [file for file in files if file.suffix.lower() in _PICKLES]
    if not models and pickles:
        raise unsafe(pickles[0].name, "it is a pickle")
    if len(models) != 1:
        found = f"holds several models ({', '.join(m.name for m in models)})" if models else "holds no model"
        raise InvalidArgument(
            f"{path} {found}. Push one file, or name it as entrypoint in a manifest.yaml. "
            f"What is served: {_KNOWN}.",
            reason=Reason.UNKNOWN_RUNTIME,
        )
    draft = _file(models[0], wanted.signature)
    draft.name = path.name
    draft.manifest.entrypoint = models[0].relative_to(path).as_posix()
    draft.files = local_files(path, files)
    return draft


def _refuse_pickled_entrypoint(entrypoint: Path) -> None:
    if entrypoint.suffix.lower() in _PICKLES:
        raise unsafe(entrypoint.name, "it is a pickle")
    if (
        entrypoint.suffix.lower() in {".pt", ".pth", ".ts"}
        and entrypoint.is_file()
        and not _is_exported(entrypoint)
    ):
        torchscript.check_not_pickle(entrypoint)


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        head = stream.read(2)
    # Protocol 2 and later begin with this opcode and their number (pickletools.PROTO).
    return len(head) == 2 and head[0] == 0x80 and head[1] <= 5


def _is_exported(path: Path) -> bool:
    """Whether a .pt file holds a torch.export program under TorchScript's suffix."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[-1] == "archive_format" for name in archive.namelist())
