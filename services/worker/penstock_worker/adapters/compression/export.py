"""From a subject to a bundle: .pt2 for what computes in floating point, .onnx for what was quantized."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from penstock.registry.v1 import manifest_pb2
from penstock_worker.adapters.compression.subject import Subject, load_program, save_program
from penstock_worker.usecases.job_context import JobFailure

_OPSET = 20


def write_bundle(
    subject: Subject, source: manifest_pb2.Manifest, example: torch.Tensor | None, directory: Path
) -> manifest_pb2.Manifest:
    """Write the files that serve a subject.

    Args:
        subject: What was compressed.
        source: Manifest of what it was made from.
        example: Inputs of a module, two rows at least; None for graphs.
        directory: Empty.

    Returns:
        The manifest: what the source's says, with runtime, format and entrypoint of the result, without what
        holds for the source alone.
    """
    manifest = manifest_pb2.Manifest(
        signature=source.signature, batching=source.batching, license=source.license
    )
    manifest.runtime = "onnx" if subject.format == "onnx" else "torch"
    manifest.format = subject.format
    manifest.entrypoint = f"model.{subject.format}"
    if "threads" in source.parameters:
        manifest.parameters["threads"] = source.parameters["threads"]
    target = directory / manifest.entrypoint
    if subject.graph is not None:
        shutil.copyfile(subject.graph, target)
    else:
        save_program(_program(subject, example, source), target)
    return manifest


def _program(subject: Subject, example: torch.Tensor | None, manifest: manifest_pb2.Manifest) -> Any:
    if example is None:
        raise ValueError("a module is exported with an example of its input")
    return program_of(subject.need_module("export"), example, manifest)


def program_of(module: nn.Module, example: torch.Tensor, manifest: manifest_pb2.Manifest) -> Any:
    """Export a module that takes one tensor, with the free dimensions that its signature has.

    Raises:
        JobFailure: UNSUPPORTED if torch cannot export it.
    """
    module.eval()
    most = max(2, manifest.batching.max_batch_size)
    shape = manifest.signature.inputs[0].shape
    free: dict[int, Any] = {
        axis: torch.export.Dim("batch", min=1, max=most) if axis == 0 else torch.export.Dim.AUTO
        for axis, size in enumerate(shape)
        if size < 0
    }
    with quiet():
        try:
            # A copy: the archive keeps the memory that the example lies in.
            return torch.export.export(module, (example[:2].clone(),), dynamic_shapes=(free or None,))
        except Exception as error:
            raise JobFailure(
                f"torch.export cannot export the compressed model: {str(error)[:500]}", "UNSUPPORTED"
            ) from error


def onnx_of(
    subject: Subject, source: manifest_pb2.Manifest, example: torch.Tensor | None, target: Path
) -> None:
    """Write a subject as an ONNX file in fp32 whose tensors have the names of the signature.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be converted; the message names the operators.
    """
    if subject.format == "onnx" and subject.graph is not None:
        shutil.copyfile(subject.graph, target)
        return
    graph = subject.graph
    program = load_program(graph) if graph is not None else _program(subject, example, source)
    with quiet():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                verbose=False,
                input_names=[spec.name for spec in source.signature.inputs],
                output_names=[spec.name for spec in source.signature.outputs],
            )
        except Exception as error:
            raise JobFailure(
                f"The model cannot be converted to ONNX, which quantization needs: {str(error)[:500]}",
                "UNSUPPORTED",
            ) from error
        if converted is None:
            raise JobFailure("The model cannot be converted to ONNX.", "UNSUPPORTED")
        model = converted.model_proto
    # Shapes of values inside are found anew by whoever needs them: those of the export do not
    # survive the changes that a quantization makes.
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.save(model, target)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters say of themselves; what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
