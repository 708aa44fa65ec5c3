"""What is converted: the bundle, and torch's program of it."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock.registry.v1 import manifest_pb2
from penstock_kit.oip import Signature
from penstock_worker.adapters.measuring.loading import OpenedVersion
from penstock_worker.adapters.measuring.rows import drawn_inputs
from penstock_worker.adapters.runtimes.cpu_int8 import register_operators_for
from penstock_worker.adapters.runtimes.pt2_safety import refuse_unsafe_pt2
from penstock_worker.adapters.training.architectures import Blueprint
from penstock_worker.adapters.training.export import PROGRAM_FILE, write_bundle
from penstock_worker.adapters.training.rebuild import rebuild
from penstock_worker.usecases.job_context import JobFailure

# Files that a version of any format takes along: how texts become tokens, and what the model is built of.
COMPANIONS = ("tokenizer.json", "architecture.json")
# An export is traced with two rows: one might be taken for a constant.
_EXAMPLE_ROWS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The version that is converted.

    Attributes:
        name: models/{model}/versions/{version}.
        directory: Its files.
        manifest: What they are.
        signature: What it takes and gives.
        max_rows: Rows in one call at most.
    """

    name: str
    directory: Path
    manifest: manifest_pb2.Manifest
    signature: Signature
    max_rows: int

    @classmethod
    def of(cls, opened: OpenedVersion) -> Source:
        """Return the source that an opened version is."""
        return cls(opened.name, opened.directory, opened.manifest, opened.signature, opened.max_rows)

    @property
    def entrypoint(self) -> Path:
        """The file that its runtime opens."""
        return self.directory / self.manifest.entrypoint

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs in the model's order."""
        return [spec.name for spec in self.signature.inputs]

    def unsupported(self, words: str) -> JobFailure:
        """Return the failure of a source that cannot be converted like that."""
        return JobFailure(f"{self.name} ({self.manifest.format}) cannot be converted: {words}", "UNSUPPORTED")


def exported_program(source: Source) -> torch.export.ExportedProgram:
    """Return a source as a program of torch.export, its batch dimension free where the version batches.

    Raises:
        JobFailure: UNSUPPORTED: it cannot be had as one.
    """
    kind = source.manifest.format
    if kind == "pt2":
        refuse_unsafe_pt2(source.entrypoint)
        register_operators_for(source.entrypoint)
        return torch.export.load(str(source.entrypoint))
    if kind == "safetensors":
        return _of_recipe(source)
    if kind == "torchscript":
        return _of_torchscript(source)
    raise source.unsupported("there is no program of torch in it.")


def output_names(program: torch.export.ExportedProgram, source: Source) -> list[str]:
    """Return the signature's name of each tensor that the program gives, in the program's order.

    Raises:
        JobFailure: UNSUPPORTED: it gives something else than a tensor, a list or a mapping of tensors.
    """
    spec = program.call_spec.out_spec
    wanted = [output.name for output in source.signature.outputs]
    names = [str(name) for name in spec.context] if spec.type is dict else wanted
    if len(names) != spec.num_leaves or set(wanted) - set(names):
        raise source.unsupported(
            f"the program gives {spec.num_leaves} tensors, the signature has {', '.join(wanted)}."
        )
    return names


@contextmanager
def quietly() -> Iterator[None]:
    """Keep torch's notices on its own future out of the job's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _of_recipe(source: Source) -> torch.export.ExportedProgram:
    with tempfile.TemporaryDirectory() as scratch:
        write_bundle(Path(scratch), rebuild(source.directory), Blueprint.load(source.directory))
        return torch.export.load(str(Path(scratch, PROGRAM_FILE)))


def _of_torchscript(source: Source) -> torch.export.ExportedProgram:
    # In torch 2.13 the only way from TorchScript to torch.export, and not part of its public interface.
    from torch._export.converter import TS2EPConverter

    if any(spec.optional for spec in source.signature.inputs):
        raise source.unsupported("an exported program has no optional inputs.")
    inputs = drawn_inputs(source.signature, _EXAMPLE_ROWS)
    examples = tuple(torch.from_numpy(inputs[name]) for name in source.input_names)
    with quietly(), torch.no_grad():
        script = torch.jit.load(str(source.entrypoint), map_location="cpu").eval()
        try:
            program = TS2EPConverter(script, examples).convert()
            return torch.export.export(program.module(), examples, dynamic_shapes=_dynamic_shapes(source))
        except Exception as error:
            raise source.unsupported(
                f"torch.export does not take this TorchScript ({_first_line(error)}). Export the model from "
                "its source with torch.export.save and push that."
            ) from error


def _dynamic_shapes(source: Source) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1, max=max(2, source.max_rows))
    shapes: list[dict[int, Any]] = []
    for spec in source.signature.inputs:
        free = {axis: torch.export.Dim.AUTO for axis, size in enumerate(spec.shape) if size < 0}
        if source.signature.batched:
            free[0] = batch
        shapes.append(free)
    return tuple(shapes)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
