"""From a subject to a bundle: .pt2 for what computes in floating point, .onnx for what was quantized."""

from __future__ import annotations

import dataclasses
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
from penstock_worker.adapters.training.architectures import Blueprint
from penstock_worker.adapters.training.export import Served
from penstock_worker.usecases.job_context import JobFailure

_OPSET = 20
# What an export of texts is traced with.
_EXAMPLE_TOKENS = 5


def write_bundle(
    subject: Subject, source: manifest_pb2.Manifest, form: Form | None, directory: Path
) -> manifest_pb2.Manifest:
    """Write the files that serve a subject.

    Args:
        subject: What was compressed.
        source: Manifest of what it was made from.
        form: How callers see a module; None for graphs.
        directory: Empty.

    Returns:
        The manifest: what the source's says, with runtime, format and entrypoint of the result, without what
        holds for the source alone (metrics, lineage, gate).
    """
    manifest = manifest_pb2.Manifest(
        signature=source.signature,
        batching=source.batching,
        resources=source.resources,
        license=source.license,
        parameters=source.parameters,
        runtime="onnx" if subject.format == "onnx" else "torch",
        format=subject.format,
        entrypoint=f"model.{subject.format}",
    )
    target = directory / manifest.entrypoint
    if subject.graph is not None:
        shutil.copyfile(subject.graph, target)
    else:
        save_program(program_of(subject, form), target)
    return manifest


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How callers see a module.

    Attributes:
        blueprint: What its answers are.
        example: Its inputs, two rows each.
        max_rows: Rows in one call at most.
    """

    blueprint: Blueprint
    example: tuple[torch.Tensor, ...]
    max_rows: int

    def dimensions(self) -> dict[int, Any]:
        """Return the free dimensions of its inputs."""
        found: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=max(2, self.max_rows))}
        if self.blueprint.of_tokens:
            longest = int(self.blueprint.parameters["length"])
            found[1] = torch.export.Dim("length", min=1, max=longest)
        return found

    def program(self, module: nn.Module) -> Any:
        """Export the module with the outputs and the free dimensions that recipes give their models.

        Raises:
            JobFailure: UNSUPPORTED if torch cannot export it.
        """
        dimensions = self.dimensions()
        example = self.example
        if self.blueprint.of_tokens:
            example = tuple(tokens[:, :_EXAMPLE_TOKENS] for tokens in example)
        served = Served(module, self.blueprint).eval()
        with quiet(), torch.no_grad():
            try:
                # Copies: the archive keeps the memory that its examples lie in.
                return torch.export.export(
                    served,
                    tuple(part.clone() for part in example),
                    dynamic_shapes=(tuple(dimensions for _ in example),),
                )
            except Exception as error:
                raise JobFailure(
                    f"torch.export cannot export the compressed model: {str(error)[:500]}", "UNSUPPORTED"
                ) from error


def program_of(subject: Subject, form: Form | None) -> Any:
    """Return a subject that is no ONNX graph as an exported program."""
    if subject.graph is not None:
        return load_program(subject.graph)
    if form is None:
        raise ValueError("a module needs a form to be exported")
    return form.program(subject.need_module("export"))


def onnx_of(subject: Subject, source: manifest_pb2.Manifest, form: Form | None, target: Path) -> None:
    """Write a subject as an ONNX file in fp32 whose tensors have the names of the signature.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be converted; the message names the operators.
    """
    if subject.format == "onnx" and subject.graph is not None:
        shutil.copyfile(subject.graph, target)
        return
    program = program_of(subject, form)
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
