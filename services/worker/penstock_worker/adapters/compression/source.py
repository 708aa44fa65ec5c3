"""The version that is compressed, opened in every way that a compression needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from penstock.registry.v1 import manifest_pb2
from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.train import architecture_of
from penstock_kit.jobs.training import ARCHITECTURES
from penstock_worker.adapters.compression.export import Form, write_bundle
from penstock_worker.adapters.compression.fitting import Watch, loss_for
from penstock_worker.adapters.compression.rows import gathered, no_rows, tensors_of
from penstock_worker.adapters.compression.structure import CHANGES_FILE, Change, apply_changes, state_of
from penstock_worker.adapters.compression.subject import Subject, load_subject
from penstock_worker.adapters.compression.teachers import ModuleTeacher, Teacher, VersionTeacher
from penstock_worker.adapters.compression.tools import Tools
from penstock_worker.adapters.data import OpenedDataset, open_dataset
from penstock_worker.adapters.measuring.loading import OpenedVersion, open_version
from penstock_worker.adapters.measuring.questions import Questions, questions_of
from penstock_worker.adapters.runtimes.pt2_safety import refuse_unsafe_pt2
from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.adapters.training.architectures.blueprint import ARCHITECTURE_FILE
from penstock_worker.adapters.training.rebuild import WEIGHTS_FILE, rebuild
from penstock_worker.adapters.training.rows import Rows
from penstock_worker.adapters.training.texts import TOKENIZER_FILE
from penstock_worker.usecases.job_context import FetchedVersion, JobContext, JobFailure

_HELD_OUT = 0.2


@dataclasses.dataclass(slots=True)
class Source:
    """The version that is compressed.

    Attributes:
        version: What was fetched.
        opened: As a replica opens it.
        blueprint: How its recipe builds it; None for what was pushed as a graph.
        dataset: Rows to learn from and to measure on.
        train: The first, as it is asked them.
        held_out: The second.
        rows: The first, as its module takes them; empty for graphs.
    """

    version: FetchedVersion
    opened: OpenedVersion
    blueprint: Blueprint | None
    dataset: OpenedDataset
    train: Questions
    held_out: Questions
    rows: Rows

    @property
    def manifest(self) -> manifest_pb2.Manifest:
        """What it is."""
        return self.version.version.manifest

    def subject(self, scratch: Path) -> Subject:
        """Return it as something that nothing was done to yet.

        Raises:
            JobFailure: UNSUPPORTED for formats whose graph cannot be changed.
        """
        if self.blueprint is not None:
            return module_of(self.version.path)
        entry = self.version.path / self.manifest.entrypoint
        if self.manifest.format not in {"pt2", "onnx"}:
            raise JobFailure(
                f"A version of the format {self.manifest.format} cannot be compressed; convert it to "
                "pt2 or onnx first (penstock convert).",
                "UNSUPPORTED",
            )
        if self.manifest.format == "pt2":
            refuse_unsafe_pt2(entry)
            return Subject(graph=entry)
        return Subject(graph=_in_one_file(entry, scratch))

    def form(self) -> Form | None:
        """Return how callers see its module; None for graphs."""
        if self.blueprint is None:
            return None
        inputs, _ = self.train.batch(np.arange(2, dtype=np.int64) % len(self.train))
        return Form(self.blueprint, tensors_of(inputs), self.manifest.batching.max_batch_size)

    def write_bundle(self, subject: Subject, directory: Path) -> manifest_pb2.Manifest:
        """Write the bundle of a result: what serves it, and what it can be built again from.

        Args:
            subject: What was compressed.
            directory: Empty.
        """
        manifest = write_bundle(subject, self.manifest, self.form(), directory)
        if self.blueprint is not None:
            # What the answers mean (classes, the length of texts) is said there, too.
            self.blueprint.save(directory)
        if subject.module is not None:
            save_file(state_of(subject.module), directory / WEIGHTS_FILE)
            (directory / CHANGES_FILE).write_text(json.dumps(subject.changes))
        if (self.version.path / TOKENIZER_FILE).exists():
            shutil.copyfile(self.version.path / TOKENIZER_FILE, directory / TOKENIZER_FILE)
        return manifest

    def load(self, directory: Path, scratch: Path) -> Subject:
        """Return a subject of this source from a checkpoint."""
        return load_subject(directory, self.build, scratch)

    def build(self, changes: Sequence[Change]) -> nn.Module:
        """Return a fresh module: the source's own, or that of the student that the changes name."""
        return _build(self._blueprint(), changes)

    def student(self, architecture: str, parameters: Mapping[str, Any]) -> nn.Module:
        """Return an untrained model of another architecture for the same data.

        What a model knows of its data without learning (means and deviations) is taken over.

        Raises:
            JobFailure: INVALID_RECIPE if there is no such architecture, or it does not fit the data.
        """
        blueprint = self._blueprint()
        try:
            model = build_model(_student(blueprint, architecture, parameters))
        except (InvalidArgument, ValueError) as error:
            raise JobFailure(f"The student cannot be built: {error}", "INVALID_RECIPE") from error
        known = dict(module_of(self.version.path).need_module("distill").named_buffers())
        by_shape = {value.shape: value for value in known.values()}
        for name, value in model.named_buffers():
            found = known.get(name)
            if found is None or found.shape != value.shape:
                found = by_shape.get(value.shape)
            if found is not None:
                value.copy_(found)
        return model

    def _blueprint(self) -> Blueprint:
        if self.blueprint is None:
            raise JobFailure("This version has no recipe.", "UNSUPPORTED")
        return self.blueprint


def module_of(directory: Path) -> Subject:
    """Return the model of a recipe's version, or of one that was compressed and can still be trained.

    Raises:
        JobFailure: UNSUPPORTED if the bundle is neither.
    """
    if not (directory / CHANGES_FILE).exists():
        return Subject(module=rebuild(directory))
    changes: list[Change] = json.loads((directory / CHANGES_FILE).read_text())
    module = _build(Blueprint.load(directory), changes)
    return Subject(
        module=apply_changes(module, changes, load_file(directory / WEIGHTS_FILE)).eval(), changes=changes
    )


def _build(blueprint: Blueprint, changes: Sequence[Change]) -> nn.Module:
    for change in changes:
        if change["change"] == "student":
            blueprint = _student(blueprint, change["architecture"], change["parameters"])
    with torch.random.fork_rng(devices=[]):
        return build_model(blueprint)


def is_recipe(directory: Path) -> bool:
    """Whether a bundle has what its model can be built from again."""
    return (directory / ARCHITECTURE_FILE).exists() and (directory / WEIGHTS_FILE).exists()


def _student(blueprint: Blueprint, architecture: str, parameters: Mapping[str, Any]) -> Blueprint:
    known = ARCHITECTURES[architecture].parameters if architecture in ARCHITECTURES else {}
    same = {
        name: value
        for name, value in blueprint.parameters.items()
        if name in known and name in {"tokenizer", "vocabulary", "length"}
    }
    student = architecture_of(
        blueprint.task, architecture, {**same, **parameters}, field="job.compress.steps"
    )
    return dataclasses.replace(blueprint, architecture=student.name, parameters=student.parameters)


def open_source(context: JobContext, work: job_work_pb2.CompressWork, stack: ExitStack) -> Source:
    """Fetch and open the version and the dataset.

    Args:
        context: Of the job.
        work: What it names.
        stack: Closes what was opened.

    Raises:
        JobFailure: One of them cannot be used.
    """
    version = context.version(work.version)
    manifest = version.version.manifest
    opened = stack.enter_context(
        open_version(
            version.path, manifest, name=version.version.name or work.version, devices=context.devices
        )
    )
    dataset = _open_dataset(context, work, manifest)
    blueprint = None
    if is_recipe(version.path):
        blueprint = Blueprint.load(version.path)
    train = questions_of(opened.signature, dataset, dataset.train, directory=version.path)
    return Source(
        version=version,
        opened=opened,
        blueprint=blueprint,
        dataset=dataset,
        train=train,
        held_out=questions_of(opened.signature, dataset, dataset.held_out, directory=version.path),
        rows=gathered(train) if blueprint is not None else no_rows(),
    )


def _open_dataset(
    context: JobContext, work: job_work_pb2.CompressWork, manifest: manifest_pb2.Manifest
) -> OpenedDataset:
    """Open the dataset, split as the source's training did if it learnt from this one.

    Otherwise rows that the source has learnt would be measured on, and held-out ones learnt by repairs.
    """
    fetched = context.dataset(work.dataset)
    lineage = manifest.lineage
    learnt = fetched.artifact.name in lineage.datasets or (
        bool(lineage.data_digest) and lineage.data_digest == fetched.artifact.digest
    )
    parameters = lineage.parameters if learnt else {}
    return open_dataset(
        fetched,
        label=parameters.get("label", ""),
        task=parameters.get("task", ""),
        features=tuple(json.loads(parameters.get("features", "[]"))),
        held_out=float(parameters.get("held_out", _HELD_OUT)),
        seed=lineage.seed if learnt else work.seed,
        scratch=context.scratch,
    )


def tools_for(
    source: Source, context: JobContext, work: job_work_pb2.CompressWork, watch: Watch, stack: ExitStack
) -> Tools:
    """Return what steps on this source may use."""
    classes = bool(source.dataset.classes) or source.dataset.task == "language_model"

    def teacher(name: str) -> Teacher:
        return _teacher(source, context, name, stack)

    return Tools(
        manifest=source.manifest,
        questions=source.train,
        rows=source.rows,
        loss=loss_for("classification" if classes else "regression"),
        teacher=teacher,
        form=source.form(),
        student=source.student,
        seed=work.seed,
        scratch=context.scratch,
        watch=watch,
        log=context.log,
    )


def _teacher(source: Source, context: JobContext, name: str, stack: ExitStack) -> Teacher:
    if not name:
        return ModuleTeacher("the source", module_of(source.version.path).need_module("distill"))
    fetched = context.version(name)
    if is_recipe(fetched.path):
        theirs, ours = Blueprint.load(fetched.path), source.blueprint
        if ours is not None and theirs.classes != ours.classes:
            raise JobFailure(
                f"The teacher {name} knows the classes {', '.join(theirs.classes[:20])}, the student "
                f"{', '.join(ours.classes[:20])}: they must be the same in the same order.",
                "INVALID_RECIPE",
            )
        if ours is not None and theirs.input_shape == ours.input_shape and not theirs.of_tokens:
            return ModuleTeacher(name, module_of(fetched.path).need_module("distill"))
    opened = stack.enter_context(
        open_version(
            fetched.path,
            fetched.version.manifest,
            name=name,
            devices=context.devices,
            allow_python_runtime=context.allow_python_runtime,
            allow_compiled_models=context.allow_compiled_models,
        )
    )
    questions = questions_of(opened.signature, source.dataset, source.dataset.train, directory=fetched.path)
    return VersionTeacher(name, opened, questions)


def _in_one_file(entry: Path, scratch: Path) -> Path:
    """Return an ONNX file with all its tensors inside."""
    import onnx

    if not any(entry.parent.glob(f"{entry.name}.data*")):
        return entry
    target = scratch / "source.onnx"
    onnx.save(onnx.load(entry), target)
    return target
