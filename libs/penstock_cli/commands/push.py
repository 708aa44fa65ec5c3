"""`penstock push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.errors import Code, InvalidArgument, PenstockError
from penstock.names import parse_version, version_name
from penstock.packaging import PackageOptions, open_bundle
from penstock.packaging.specs import format_spec
from penstock.traffic import counted
from penstock.transfer import Progress
from penstock.transport import new_request_id
from penstock_cli import progress
from penstock_cli.commands.models import version_text
from penstock_cli.options import numbers, words
from penstock_cli.output import note, pairs, print_json, say, size
from penstock_cli.session import ENDPOINT, Endpoint, Json, connect

_MAY_GO_ON = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)


def push(
    name_and_path: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME] PATH",
            help="Name of the model (else that of the file), and the file or directory to push.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Name of the model, instead of the first word.")] = None,
    alias: Annotated[str | None, typer.Option(help="Point this alias at the new version.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME:TYPE:SHAPE", help="Such as x:FP32:-1,28,28.")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output", metavar="NAME:TYPE:SHAPE", help="Such as y:FP32:-1,10.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=0, help="Join requests up to this many rows; 0 never does.")
    ] = None,
    delay: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Milliseconds a request may wait for others.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="Measured quality.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="To find it again.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the runtime.")
    ] = None,
    parent: Annotated[
        list[str] | None, typer.Option(metavar="MODEL:NUMBER", help="Version it was made from.")
    ] = None,
    description: Annotated[str, typer.Option(help="What the model does.")] = "",
    license_id: Annotated[str, typer.Option("--license", help="SPDX identifier of its licence.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pushed, and stop.")] = False,
    request_id: Annotated[
        str | None, typer.Option(help="Go on with the push that was given this id, or repeat it safely.")
    ] = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Push a model as a new version.

    PATH is a .pt2, .pt (TorchScript), .onnx or .skops file, a directory with model.py, an MLflow or Triton
    model directory, an ensemble.yaml, or an archive of one. What the files do not say is given by options or
    a manifest.yaml beside them.
    """
    name, path = _split(name_and_path, model)
    options = PackageOptions(
        inputs=inputs or (),
        outputs=outputs or (),
        max_batch_size=batch,
        max_delay_microseconds=None if delay is None else round(delay * 1000),
        metrics=numbers("--metric", metric),
        description=description,
        license=license_id,
        parameters=words("--parameter", parameter),
        parents=[_parent(text) for text in parent or ()],
    )
    labels = words("--label", label)
    with open_bundle(path, options) as bundle:
        if bundle.manifest.ensemble.steps:
            with connect(endpoint) as client:
                bundle = client.complete_ensemble(bundle)
        for remark in bundle.notes:
            note(f"note: {remark}")
        if dry_run:
            if json:
                print_json(bundle.manifest)
            else:
                say(
                    f"{name or bundle.name}: {counted(len(bundle.files), 'file')}, {size(bundle.size_bytes)}."
                )
                _say_signature(bundle.manifest)
            return
        key = request_id or new_request_id()
        began = False
        with connect(endpoint) as client, progress.transfer(quiet=json) as bar:

            def watch(step: Progress) -> None:
                nonlocal began
                began = began or step.phase == "upload"
                if bar is not None:
                    bar(step)

            try:
                version = client.push_bundle(
                    bundle, model=name, alias=alias, labels=labels, progress=watch, request_id=key
                )
            except (PenstockError, KeyboardInterrupt) as error:
                # What the registry never heard of needs no going on.
                if began and (not isinstance(error, PenstockError) or error.code in _MAY_GO_ON):
                    note(f"The same command with --request-id {key} goes on where this push stopped.")
                raise
    if json:
        print_json(version)
        return
    say(f"Pushed {version_text(version)} ({version.manifest.format}, {size(version.size_bytes)}).")
    _say_signature(version.manifest)
    if version.manifest.metrics:
        say(f"  metrics {pairs(version.manifest.metrics)}")
    if alias:
        say(f"  alias   {alias} points to it")


def _split(given: list[str], model: str | None) -> tuple[str | None, Path]:
    if len(given) > 2 or (len(given) == 2 and model is not None):
        raise InvalidArgument(f"Give one model at a time: penstock push [NAME] PATH, not {' '.join(given)}.")
    if len(given) == 2 and not Path(given[1]).exists() and Path(given[0]).exists():
        raise InvalidArgument(f"The name goes before the path: penstock push {given[1]} {given[0]}")
    return (model, Path(given[0])) if len(given) == 1 else (given[0], Path(given[1]))


def _parent(text: str) -> str:
    ref = parse_version(text)
    if ref.number is None:
        raise InvalidArgument(f"--parent {text}: say which version, as {ref.model}:NUMBER.")
    return version_name(ref.model, ref.number)


def _say_signature(manifest: object) -> None:
    signature = getattr(manifest, "signature", None)
    if signature is None:
        return
    for side, tensors in (("input ", signature.inputs), ("output", signature.outputs)):
        for tensor in tensors:
            say(f"  {side}  {format_spec(tensor)}")
