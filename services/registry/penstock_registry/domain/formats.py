"""Whether a bundle is what its manifest says, by looking at its bytes. Nothing is loaded or executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import BinaryIO

from penstock_kit.artifacts.torchscript import CODE_SUFFIX, LEGACY_MODEL, MAX_SOURCE_BYTES, unsafe_source
from penstock_kit.errors import InvalidArgument, Reason
from penstock_registry.domain.archives import Archive
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.onnx import check_onnx
from penstock_registry.domain.pickles import looks_like_pickle
from penstock_registry.domain.pt2 import check_pt2, unsafe
from penstock_registry.domain.safetensors import check_safetensors
from penstock_registry.domain.version import Version, unsafe_pickle

HEAD_BYTES = 64 * 1024
MAX_SCHEMA_BYTES = 256 * 1024 * 1024
# What a training recipe writes beside its weights.
ARCHITECTURE_FILE = "architecture.json"
_ZIP_MAGIC = b"PK\x03\x04"

Opener = Callable[[str], BinaryIO]


def inspect_bundle(version: Version, open_blob: Opener) -> None:
    """Return if the files are what the manifest says, and none of them could run code when loaded.

    A version of format python is the operator's own risk: only its entrypoint is looked at.

    Args:
        version: With all files complete.
        open_blob: Opens contents by their SHA-256.

    Raises:
        InvalidArgument: They are not (MANIFEST_MISMATCH), or one could (UNSAFE_FORMAT).
    """
    manifest = version.manifest
    entrypoint = version.file(manifest.entrypoint)
    if entrypoint is None:
        raise InvalidArgument(
            f"manifest.entrypoint {manifest.entrypoint!r} is not among the files.",
            reason=Reason.MANIFEST_MISMATCH,
        )
    if entrypoint.size_bytes == 0:
        raise InvalidArgument(
            f"manifest.entrypoint {manifest.entrypoint!r} is empty.",
            reason=Reason.MANIFEST_MISMATCH,
            metadata={"path": manifest.entrypoint},
        )
    if manifest.format == "python":
        if not manifest.entrypoint.endswith(".py"):
            raise InvalidArgument(
                f"manifest.entrypoint {manifest.entrypoint!r} of format python does not end in .py.",
                reason=Reason.MANIFEST_MISMATCH,
                metadata={"path": manifest.entrypoint},
            )
        return
    for file in version.files:
        if file.size_bytes:
            _refuse_pickles(file, open_blob, torchscript=_is_torchscript_entrypoint(version, file))
    with open_blob(entrypoint.sha256) as opened:
        _CHECKS[manifest.format](opened, entrypoint, version)


def _is_torchscript_entrypoint(version: Version, file: BundleFile) -> bool:
    return version.manifest.format == "torchscript" and file.path == version.manifest.entrypoint


def _refuse_pickles(file: BundleFile, open_blob: Opener, *, torchscript: bool) -> None:
    with open_blob(file.sha256) as opened:
        head = opened.read(HEAD_BYTES)
        if looks_like_pickle(head):
            raise unsafe_pickle(file.path)
        # A zip that holds a pickle is one of torch.save, unless it is the TorchScript that is announced.
        if head.startswith(_ZIP_MAGIC) and not torchscript:
            opened.seek(0)
            try:
                archive = Archive(opened, file.path, "a zip archive")
            except InvalidArgument:
                # Whether it should be one is said by the check of the entrypoint's format.
                return
            for name in archive.sizes:
                if name.casefold().endswith((".pkl", ".pickle", ".joblib")):
                    raise unsafe_pickle(file.path, f"an archive with the pickle {name!r}")


def _check_pt2(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    del version
    check_pt2(Archive(opened, file.path, "an exported program (.pt2)"))


def _check_safetensors(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    """Names, datatypes and places of tensors in JSON, then their bytes; the architecture lies beside it."""
    if version.file(ARCHITECTURE_FILE) is None:
        raise InvalidArgument(
            f"A version of format safetensors needs {ARCHITECTURE_FILE} beside its weights: what a training "
            "recipe built. Push anything else as .pt2 or .onnx.",
            reason=Reason.MANIFEST_MISMATCH,
            metadata={"path": ARCHITECTURE_FILE},
        )
    check_safetensors(opened, file.path, file.size_bytes)


def _check_aoti(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    """Compiled code, which the operator allowed; nothing in it can be checked but its frame."""
    del version
    archive = Archive(opened, file.path, "an AOTInductor package (.pt2)")
    if not any("/aotinductor/" in name and name.endswith(".so") for name in archive.sizes):
        raise archive.mismatch("has no shared library of AOTInductor")


def _check_torchscript(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    """TorchScript keeps code and constants beside its data; torch.save does not.

    Its `data.pkl` is read by the interpreter's own unpickler in C++, which makes TorchScript's types only.
    """
    del version
    archive = Archive(opened, file.path, "TorchScript")
    root = archive.root()
    names = {name.removeprefix(root) for name in archive.sizes}
    if "data.pkl" in names and "constants.pkl" not in names:
        raise unsafe_pickle(file.path, "a torch.save file, which is a pickle")
    if "constants.pkl" not in names or not any(name.startswith("code/") for name in names):
        raise archive.mismatch("has no code/ and constants.pkl")
    for name in archive.sizes:
        if name.casefold().endswith(CODE_SUFFIX):
            _check_source(archive, name)
        elif name.rpartition("/")[2] == LEGACY_MODEL:
            raise unsafe(archive, "a program of an older torch (model.json)")


def _check_source(archive: Archive, name: str) -> None:
    try:
        found = unsafe_source(archive.read(name, MAX_SOURCE_BYTES).decode())
    except UnicodeDecodeError as error:
        raise archive.mismatch(f"has a source {name!r} that is no UTF-8") from error
    if found:
        raise InvalidArgument(
            f"{archive.path!r} does more than compute: its source {name!r} has {found}. Files and other "
            "processes are no business of a served model; take it out and save the model anew.",
            reason=Reason.UNSAFE_FORMAT,
            metadata={"path": archive.path},
        )


def _check_skops(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    """A schema says how to build the estimator; arrays lie beside it. The worker trusts known types only."""
    del version
    archive = Archive(opened, file.path, "a skops file")
    if "schema.json" not in archive.sizes:
        raise archive.mismatch("has no schema.json")
    try:
        schema = json.loads(archive.read("schema.json", MAX_SCHEMA_BYTES))
    except (ValueError, RecursionError) as error:
        raise archive.mismatch("has a schema.json that is not JSON") from error
    if not isinstance(schema, dict) or not {"__class__", "__module__", "__loader__"} <= schema.keys():
        raise archive.mismatch("has a schema.json without __class__, __module__ and __loader__")
    for name, size in archive.sizes.items():
        if name.casefold().endswith(".npy") and size and looks_like_pickle(archive.head(name, HEAD_BYTES)):
            raise unsafe_pickle(file.path, f"a skops file with the pickled array {name!r}")


def _check_onnx(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    check_onnx(opened, file.path, file.size_bytes, {other.path for other in version.files})


def _check_ensemble(opened: BinaryIO, file: BundleFile, version: Version) -> None:
    """The manifest says it all, and was checked when the version was announced."""
    del opened, file, version


_CHECKS: dict[str, Callable[[BinaryIO, BundleFile, Version], None]] = {
    "aoti": _check_aoti,
    "pt2": _check_pt2,
    "safetensors": _check_safetensors,
    "torchscript": _check_torchscript,
    "skops": _check_skops,
    "onnx": _check_onnx,
    "ensemble": _check_ensemble,
}
