"""Datasets, artifacts, versions and deployments in the work of a job, and what their names mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from google.protobuf import struct_pb2
from google.protobuf.message import Message

from penstock.scheduler.v1 import job_pb2
from penstock_kit import names
from penstock_scheduler.domain.job import Job
from penstock_scheduler.usecases.job_canaries import Wish
from penstock_scheduler.usecases.jobs import Reference


class _Place(NamedTuple):
    """Where a name stands: what it names, and how another one is put there."""

    reference: Reference
    put: Callable[[str], None]


def references(job: job_pb2.Job) -> tuple[Reference, ...]:
    """What the work of a job names, each once.

    Raises:
        InvalidArgument: a name has another form.
    """
    return tuple(dict.fromkeys(place.reference for place in _places(job)))


def replace_references(job: job_pb2.Job, found: Mapping[Reference, str]) -> None:
    """Puts what names mean in their places."""
    for place in list(_places(job)):
        place.put(found[place.reference])


def canary_of(job: Job) -> Wish | None:
    """The deployment that a job names for what it compresses, and which version it gets."""
    work = job_pb2.Job.FromString(job.work)
    made = [name for name in job.results if name.startswith("models/")]
    if work.WhichOneof("work") != "compress" or not work.compress.deployment or not made:
        return None
    report = struct_pb2.Struct.FromString(job.report)
    gate = report.fields["gate"].struct_value.fields if "gate" in report.fields else {}
    model, number = names.parse_version(made[0])
    deployment = work.compress.deployment.removeprefix("deployments/")
    return Wish(deployment, model, number, "passed" not in gate or gate["passed"].bool_value)


def _places(job: job_pb2.Job) -> Iterator[_Place]:
    kind = job.WhichOneof("work")
    if kind is None:
        return
    work: Message = getattr(job, kind)
    known = work.DESCRIPTOR.fields_by_name
    if "dataset" in known:
        yield from _field(work, "dataset", _artifact)
    if "version" in known:
        yield from _field(work, "version", _version)
    if "deployment" in known:
        yield from _field(work, "deployment", _deployment)
    if kind == "batch_predict":
        yield from _field(job.batch_predict, "artifact", _answers)
    if kind == "train":
        if job.train.WhichOneof("way") == "recipe":
            yield from _field(job.train.recipe, "fine_tune", _version)
        elif job.train.WhichOneof("way") == "script":
            yield from _field(job.train.script, "code", _artifact)
    elif kind == "compress":
        for step in job.compress.steps:
            teacher = step.parameters.fields.get("teacher")
            if teacher is not None and teacher.string_value:
                yield _Place(_version(teacher.string_value), _string_setter(teacher))


def _field(message: Message, name: str, read: Callable[[str], Reference]) -> Iterator[_Place]:
    text = getattr(message, name)
    if text:
        yield _Place(read(text), lambda full: setattr(message, name, full))


def _string_setter(value: Message) -> Callable[[str], None]:
    return lambda full: setattr(value, "string_value", full)


def _artifact(text: str) -> Reference:
    """{artifact}, {artifact}:{version} or artifacts/{artifact}/versions/{version}, as the registry has it."""
    if not text.startswith("artifacts/"):
        name, separator, number = text.partition(":")
        text = f"artifacts/{name}" + (f"/versions/{number}" if separator else "")
    match text.split("/"):
        case ["artifacts", name]:
            names.check_id(name, "artifact")
        case ["artifacts", name, "versions", number]:
            names.check_id(name, "artifact")
            names.parse_number(number, text)
        case _:
            names.check_id(text, "artifact")
    return Reference("artifact", text)


def _answers(text: str) -> Reference:
    """{artifact} or artifacts/{artifact}, which gets a new version."""
    return Reference("answers", names.check_id(text.removeprefix("artifacts/"), "artifact"))


def _deployment(text: str) -> Reference:
    """{deployment} or deployments/{deployment}."""
    return Reference("deployment", names.check_id(text.removeprefix("deployments/"), "deployment"))


def _version(text: str) -> Reference:
    """{model}, {model}:{version}, {model}@{alias} or models/{model}/versions/{version}."""
    if text.startswith("models/"):
        own, known = names.parse_version(text)
        return Reference("version", own, str(known))
    if "@" in text:
        model, _, alias = text.partition("@")
        return Reference("version", names.check_id(model, "model"), names.check_alias(alias))
    model, separator, number = text.partition(":")
    if separator:
        names.parse_number(number, text)
    return Reference("version", names.check_id(model, "model"), number)
