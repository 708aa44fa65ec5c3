"""Models as people have them, made into bundles with a manifest.

=====================  ============  =========================  ============
what lies there        format        signature                  module
=====================  ============  =========================  ============
``*.pt2``              pt2           in the program             torch_export
``*.pt *.pth *.ts``    torchscript   inputs to be given         torchscript
``*.onnx``             onnx          in the graph               onnx_model
``*.skops``            skops         features, classes          skops_model
directory, model.py    python        manifest.yaml, constants   python_dir
directory, MLmodel     of its file   of its file, or MLmodel    mlflow_dir
directory, 1/model.*   of its file   config.pbtxt               triton_dir
``ensemble.yaml``      ensemble      of its steps' models       ensemble_file
``*.zip *.tar.gz`` …   of what is inside                        archive
=====================  ============  =========================  ============

A `manifest.yaml` beside the files, and then the options of the push, go before what the files say. Pickles
are refused: they may run any code when they are loaded. Nothing heavy is imported before a file needs it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from penstock.common.v1 import tensor_pb2
from penstock.errors import InvalidArgument, NotFound, Reason
from penstock.packaging.archive import archive_stem, extract, is_archive
from penstock.packaging.bundle import Bundle, LocalFile
from penstock.packaging.draft import DEFAULT_BATCH_SIZE, Draft
from penstock.packaging.kinds import find_draft
from penstock.packaging.manifest import FILE_NAME, overlay, read_manifest
from penstock.packaging.options import PackageOptions
from penstock.packaging.specs import format_spec, missing_signature
from penstock.registry.v1 import manifest_pb2

__all__ = ["Bundle", "LocalFile", "PackageOptions", "open_bundle"]


@contextmanager
def open_bundle(path: Path, options: PackageOptions | None = None) -> Iterator[Bundle]:
    """Look into a model file or directory; yield its bundle, not hashed yet.

    An archive is unpacked for as long as the context lasts.

    Raises:
        NotFound: There is nothing at `path`.
        InvalidArgument: It is no model that could be served safely, or lacks a signature; the words say
            what to do.
        FailedPrecondition: A library is needed to read it.
    """
    wishes = options or PackageOptions()
    path = path.expanduser()
    if not path.exists():
        raise NotFound(f"There is no file or directory {path}.", reason=Reason.RESOURCE_NOT_FOUND)
    if path.is_file() and is_archive(path):
        with tempfile.TemporaryDirectory(prefix="penstock-push-") as scratch:
            inside = extract(path, Path(scratch))
            yield replace(_bundle(inside, wishes), name=archive_stem(path))
    else:
        yield _bundle(path, wishes)


def _bundle(path: Path, options: PackageOptions) -> Bundle:
    given = options.to_manifest()
    stored = _stored_manifest(path)
    wanted = manifest_pb2.Manifest()
    overlay(wanted, stored)
    overlay(wanted, given)
    draft = find_draft(path, wanted)
    if not draft.files:
        raise InvalidArgument(f"{path} holds no files.")
    manifest = draft.manifest
    overlay(manifest, wanted)
    signature = manifest.signature
    missing = [side for side in ("inputs", "outputs") if not getattr(signature, side)]
    if draft.finds_outputs and "inputs" in missing:
        missing = ["inputs"]
    if missing:
        why = draft.missing or f"{path.name} does not say its signature."
        raise missing_signature(why, missing, known=signature, names=draft.input_names)
    if manifest.ensemble.steps:
        # What is still open is asked of its steps' models, once there is a connection.
        _check_entrypoint(path, manifest, draft)
    else:
        _settle_batching(draft, manifest, options)
        _check(path, manifest, draft)
    if not manifest.lineage.operation:
        manifest.lineage.operation = "push"
    return Bundle(draft.name, manifest, draft.files, tuple(draft.notes))


def _stored_manifest(path: Path) -> manifest_pb2.Manifest:
    """Return the manifest.yaml of a directory, or the one beside a file if it is about that file."""
    if path.is_dir():
        file = path / FILE_NAME
        return read_manifest(file) if file.is_file() else manifest_pb2.Manifest()
    file = path.parent / FILE_NAME
    if not file.is_file():
        return manifest_pb2.Manifest()
    stored = read_manifest(file)
    about_another = stored.entrypoint and stored.entrypoint != path.name
    return manifest_pb2.Manifest() if about_another else stored


def _settle_batching(draft: Draft, manifest: manifest_pb2.Manifest, options: PackageOptions) -> None:
    """Decide whether requests may be joined, where nobody said it."""
    if options.max_batch_size is not None:
        manifest.batching.max_batch_size = options.max_batch_size
    elif draft.batchable and not manifest.batching.max_batch_size:
        manifest.batching.max_batch_size = DEFAULT_BATCH_SIZE
    elif draft.batchable is None and not manifest.batching.max_batch_size and _all_free(manifest.signature):
        draft.notes.append(
            "Requests are not joined. If the first dimension of every tensor is the batch, add "
            f"--batch {DEFAULT_BATCH_SIZE}."
        )


def _all_free(signature: tensor_pb2.Signature) -> bool:
    return all(tensor.shape and tensor.shape[0] == -1 for tensor in [*signature.inputs, *signature.outputs])


def _check(path: Path, manifest: manifest_pb2.Manifest, draft: Draft) -> None:
    """Refuse a manifest that its own registry would refuse, before any byte is sent."""
    signature = manifest.signature
    for side, tensors in (("input", signature.inputs), ("output", signature.outputs)):
        names = [tensor.name for tensor in tensors]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or "" in names:
            raise InvalidArgument(
                f"Every {side} needs a name of its own; there is {', '.join(twice) or 'one without'}."
            )
        for tensor in tensors:
            if not tensor.data_type:
                raise InvalidArgument(
                    f"The {side} {tensor.name} has no datatype; add dataType: FP32 or another."
                )
    if manifest.batching.max_batch_size < 0:
        raise InvalidArgument("The batch size must be 0 (requests are not joined) or more.")
    if manifest.batching.max_batch_size > 0 and not _all_free(signature):
        fixed = next(t for t in [*signature.inputs, *signature.outputs] if not t.shape or t.shape[0] != -1)
        raise InvalidArgument(
            f"With a batch size of {manifest.batching.max_batch_size} every shape begins with -1, the batch; "
            f"{format_spec(fixed)} does not. Give --batch 0 if the model takes exactly these shapes.",
            reason=Reason.MANIFEST_MISMATCH,
        )
    _check_entrypoint(path, manifest, draft)


def _check_entrypoint(path: Path, manifest: manifest_pb2.Manifest, draft: Draft) -> None:
    if manifest.entrypoint not in {file.path for file in draft.files}:
        raise InvalidArgument(
            f"The entrypoint {manifest.entrypoint or '(none)'} is not among the files of {path}.",
            reason=Reason.MANIFEST_MISMATCH,
        )
