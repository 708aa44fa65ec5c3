"""CONVERT: a version in another format, published once it answers as its source."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from penstock.registry.v1 import manifest_pb2
from penstock_kit.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from penstock_kit.jobs import convert
from penstock_worker.adapters.conversion.comparison import Comparison, compare, require_alike
from penstock_worker.adapters.conversion.source import COMPANIONS, Source, exported_program
from penstock_worker.adapters.conversion.to_aoti import torch_to_aoti
from penstock_worker.adapters.conversion.to_onnx import torch_to_onnx
from penstock_worker.adapters.conversion.to_safetensors import to_safetensors
from penstock_worker.adapters.measuring.loading import OpenedVersion, open_version
from penstock_worker.adapters.measuring.opening import Inputs, check_stop, open_fetched
from penstock_worker.adapters.runtimes.torch_runtime import COMPILED_FOR, compiled_for
from penstock_worker.hotpath.execution import ModelError
from penstock_worker.usecases.job_context import JobContext, JobFailure

LEARNT_BYTES = 1 << 30
"""A dataset that nobody named is fetched up to this size."""
# From which formats a format can be had.
SOURCES: Mapping[str, frozenset[str]] = {
    "pt2": frozenset({"torchscript", "safetensors"}),
    "onnx": frozenset({"pt2", "torchscript", "safetensors", "skops"}),
    "aoti": frozenset({"pt2", "torchscript", "safetensors"}),
    "safetensors": frozenset({"pt2", "torchscript", "onnx"}),
}
# Parameters of a manifest that mean the same in every format.
_KEPT_PARAMETERS = frozenset({"threads", "task", "architecture", "warmup"})


def run(context: JobContext) -> None:
    """Convert the version of the job; rank 0 does it alone.

    Raises:
        JobFailure: UNSUPPORTED: this source cannot be had in this format, with the operator or estimator that
            has no counterpart; NUMERICS: it answers differently from its source; INVALID_DATA: the dataset
            does not fit the version.
    """
    if context.rank:
        return
    work = context.job.convert
    try:
        plan = convert.plan(work)
    except InvalidArgument as error:
        raise JobFailure(error.message, "INVALID_RECIPE") from error
    context.progress(0, 0, "rows", "loading")
    fetched = context.version(work.version)
    _require_possible(context, fetched.version.name, fetched.version.manifest.format, plan.format)
    directory = context.scratch / "result"
    with open_fetched(context, fetched) as opened:
        check_stop(context)
        inputs, dataset = _inputs(context, opened, fetched.version.manifest)
        context.progress(0, 0, "rows", f"converting to {plan.format}")
        source = Source.of(opened)
        try:
            manifest, found, size = _convert(context, plan, opened, inputs, source, directory)
        except JobFailure:
            if not _has_second_way(source):
                raise
            manifest, found, size = _convert(context, plan, opened, inputs, source, directory, single=True)
        before = opened.size_bytes
    _describe(manifest, source, plan, dataset)
    context.progress(found.rows, found.rows, "rows", "publishing")
    model = work.model or fetched.version.name.partition("/versions/")[0]
    name = context.publish_version(model, directory, manifest)
    context.report(
        {
            "kind": "conversion",
            "format": plan.format,
            "result": name,
            "rows": found.rows,
            "dataset": dataset,
            "difference": found.difference,
            "tolerance": plan.tolerance,
            "output": found.output,
            "row": found.row,
            "size_bytes": size,
            "source_size_bytes": before,
        }
    )


def _convert(
    context: JobContext,
    plan: convert.Plan,
    opened: OpenedVersion,
    inputs: Inputs,
    source: Source,
    directory: Path,
    *,
    single: bool = False,
) -> tuple[manifest_pb2.Manifest, Comparison, int]:
    """Write the result and compare it; return its manifest, how alike it is, and its bytes."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    device = torch.device(context.devices[0] if context.devices else "cpu")
    manifest = write_result(source, plan, directory, scratch=context.scratch, device=device, single=single)
    check_stop(context)
    with _open_result(context, plan.format, directory, manifest) as result:
        found = _compare(context, plan, opened, inputs, result)
        size = result.size_bytes
    require_alike(found, plan.tolerance, f"{source.name} as {plan.format}")
    return manifest, found, size


def _has_second_way(source: Source) -> bool:
    """Whether the source may still be had in single precision: not all of ONNX is there in double."""
    return source.manifest.format == "skops" and all(
        spec.datatype == "FP64" for spec in source.signature.inputs
    )


def write_result(
    source: Source,
    plan: convert.Plan,
    directory: Path,
    *,
    scratch: Path,
    device: torch.device,
    single: bool = False,
) -> manifest_pb2.Manifest:
    """Write the bundle of the result and return its manifest, without lineage.

    Args:
        source: What is converted.
        plan: To what.
        directory: Where to; empty.
        scratch: Where compilers may write.
        device: What compiled code is for.
        single: Compute scikit-learn's models in fp32.

    Raises:
        JobFailure: UNSUPPORTED.
    """
    manifest = manifest_pb2.Manifest(
        runtime=source.manifest.runtime,
        format=source.manifest.format,
        entrypoint=source.manifest.entrypoint,
        signature=source.manifest.signature,
        license=source.manifest.license,
        description=source.manifest.description,
    )
    for field in ("batching", "resources"):
        if source.manifest.HasField(field):
            getattr(manifest, field).CopyFrom(getattr(source.manifest, field))
    for key, value in source.manifest.parameters.items():
        if key in _KEPT_PARAMETERS or plan.format == "safetensors":
            manifest.parameters[key] = value
    for name in COMPANIONS:
        if (source.directory / name).exists():
            shutil.copy(source.directory / name, directory)
    if plan.format == "safetensors":
        to_safetensors(source, directory, manifest)
    elif plan.format == "onnx":
        manifest.runtime, manifest.format, manifest.entrypoint = "onnx", "onnx", "model.onnx"
        opset = int(plan.parameters["opset"])
        if source.manifest.format == "skops":
            # Imported here: conversions of torch's models need nothing of scikit-learn.
            from penstock_worker.adapters.conversion.sklearn_to_onnx import sklearn_to_onnx

            sklearn_to_onnx(source, directory, opset=opset, single=single)
        else:
            torch_to_onnx(source, directory, opset=opset)
    elif plan.format == "aoti":
        manifest.runtime, manifest.format, manifest.entrypoint = "torch", "aoti", "model.pt2"
        manifest.parameters[COMPILED_FOR] = compiled_for(device)
        threads = max(1, int(source.manifest.parameters.get("threads", "1")))
        freezing = bool(plan.parameters["freezing"])
        torch_to_aoti(source, directory, threads=threads, freezing=freezing, scratch=scratch)
    else:
        manifest.runtime, manifest.format, manifest.entrypoint = "torch", "pt2", "model.pt2"
        torch.export.save(exported_program(source), directory / "model.pt2")
        if source.manifest.format == "safetensors":
            # With it the result is what a training made, which can be trained on.
            shutil.copy(source.entrypoint, directory)
    return manifest


def _require_possible(context: JobContext, name: str, kind: str, wanted: str) -> None:
    possible = sorted(target for target, sources in SOURCES.items() if kind in sources)
    if kind == wanted:
        raise JobFailure(
            f"{name} is {kind} already; it can be converted to {', '.join(possible) or 'nothing'}.",
            "UNSUPPORTED",
        )
    if kind not in SOURCES[wanted]:
        raise JobFailure(
            f"{name} is {kind}, which cannot be converted to {wanted}; it can to "
            f"{', '.join(possible) or 'nothing'}.",
            "UNSUPPORTED",
        )
    if wanted == "aoti" and not context.allow_compiled_models:
        raise JobFailure(
            "The result would be compiled code, which runs unconfined, and this mesh does not allow it. Have "
            "an operator set PENSTOCK_ALLOW_COMPILED_MODELS on registry and workers, or convert to onnx.",
            "UNSUPPORTED",
        )


def _open_result(
    context: JobContext, kind: str, directory: Path, manifest: manifest_pb2.Manifest
) -> OpenedVersion:
    return open_version(
        directory,
        manifest,
        name=f"the result ({kind})",
        devices=context.devices,
        allow_compiled_models=context.allow_compiled_models,
    )


def _inputs(
    context: JobContext, opened: OpenedVersion, manifest: manifest_pb2.Manifest
) -> tuple[Inputs, str]:
    """Return what both are asked, and the dataset that it is of.

    Without a dataset in the job it is the one that the version learnt from, if that can be had.
    """
    given = context.job.convert.dataset
    if given:
        return Inputs(context, opened, given), given
    for learnt in manifest.lineage.datasets[:1]:
        try:
            inputs = Inputs(context, opened, learnt, most_bytes=LEARNT_BYTES)
            inputs(1)
            return inputs, learnt
        except (FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, JobFailure) as error:
            context.log(f"Inputs are drawn from the signature, as {learnt} cannot be asked: {error}")
    return Inputs(context, opened, ""), ""


def _compare(
    context: JobContext, plan: convert.Plan, opened: OpenedVersion, inputs: Inputs, result: OpenedVersion
) -> Comparison:
    rows = int(plan.parameters["rows"])

    def progress(done: int, total: int) -> None:
        check_stop(context)
        context.progress(done, total, "rows", "comparing")

    try:
        return compare(
            opened,
            result,
            inputs,
            min(rows, inputs.rows) if inputs.rows else rows,
            tolerance=plan.tolerance,
            progress=progress,
        )
    except ModelError as error:
        raise JobFailure(
            f"{opened.name} and its conversion cannot both be asked these rows: {error.message} Give a "
            "dataset whose rows the version takes, if rows drawn from its signature are none.",
            "NUMERICS",
        ) from error


def _describe(manifest: manifest_pb2.Manifest, source: Source, plan: convert.Plan, dataset: str) -> None:
    manifest.lineage.operation = "convert"
    manifest.lineage.parents.append(source.name)
    manifest.lineage.parameters["format"] = plan.format
    for key, value in plan.parameters.items():
        manifest.lineage.parameters[key] = str(value)
    if dataset:
        manifest.lineage.datasets.append(dataset)
