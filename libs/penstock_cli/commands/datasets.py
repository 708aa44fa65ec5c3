"""`penstock datasets`: data to train, measure and predict on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format

from penstock.datasets import EXAMPLES, FORMATS, ReadOptions
from penstock.errors import Code, NotFound, PenstockError
from penstock.names import short_artifact
from penstock.registry.v1 import artifact_pb2
from penstock.traffic import counted
from penstock.transfer import Progress
from penstock.transport import new_request_id
from penstock_cli import progress
from penstock_cli.dataset_views import show_dataset
from penstock_cli.groups import listing_group
from penstock_cli.options import words
from penstock_cli.output import ago, note, pairs, print_json, print_table, say, size, state
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect, nearest

datasets = listing_group("Datasets; without a command, lists them.", named="show")

Name = Annotated[
    str, typer.Argument(metavar="DATASET[:NUMBER]", help="Name of the dataset; the newest without a number.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_KINDS = {
    name.removeprefix("ARTIFACT_KIND_").lower(): number
    for name, number in artifact_pb2.ArtifactKind.items()
    if number
}
_MAY_GO_ON = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)


@datasets.command("push")
def push(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help=f"A file or directory, or a built-in one: {', '.join(EXAMPLES)}.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the dataset; without it, that of the file.")
    ] = None,
    format_name: Annotated[
        str, typer.Option("--format", help=f"{', '.join(FORMATS)}; without it, what it is.")
    ] = "",
    label_column: Annotated[
        str,
        typer.Option("--label-column", help="Column with the label; without it, label, target, y or class."),
    ] = "",
    feature: Annotated[
        list[str] | None, typer.Option(help="Column to learn from; without any, all but the label.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="tabular, image, text or language_model; without it, what the data are.")
    ] = "",
    target: Annotated[
        str, typer.Option(help="The label is one of classes, or a number: classes or numbers.")
    ] = "",
    license_id: Annotated[str, typer.Option("--license", help="SPDX identifier of the data's licence.")] = "",
    source: Annotated[str, typer.Option(help="Where the data come from.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="To find it again.")] = None,
    request_id: Annotated[
        str | None, typer.Option(help="Go on with the push that was given this id, or repeat it safely.")
    ] = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Look through data, describe them, and push them as a new version of a dataset.

    PATH is an .npz (x and y), .csv or .parquet file or a directory of them, a directory with a folder of
    images (.png, .jpg) or texts (.txt) for each class, .jsonl with a text and a label a line, or plain text.
    Every row is looked at; what a training would fail at is said now.
    """
    if path not in EXAMPLES and not Path(path).exists() and ":" in path:
        hint = nearest(path, list(EXAMPLES)) or f"Built in are {', '.join(EXAMPLES)}."
        raise NotFound(f"There is no file, directory or built-in dataset {path}. {hint}")
    options = ReadOptions(task=task, label=label_column, features=tuple(feature or ()), target=target)
    key = request_id or new_request_id()
    began = False
    with connect(endpoint) as client, progress.transfer(quiet=json) as bar:

        def watch(step: Progress) -> None:
            nonlocal began
            began = began or step.phase == "upload"
            if bar is not None:
                bar(step)

        try:
            pushed = client.push_dataset(
                path,
                name=name,
                format=format_name,
                options=options,
                license=license_id,
                source=source,
                labels=words("--label", label),
                progress=watch,
                request_id=key,
            )
        except (PenstockError, KeyboardInterrupt) as error:
            if began and (not isinstance(error, PenstockError) or error.code in _MAY_GO_ON):
                note(f"The same command with --request-id {key} goes on where this push stopped.")
            raise
    if json:
        print_json(pushed)
        return
    say(
        f"Pushed {short_artifact(pushed.name)} ({pushed.format}, {size(pushed.size_bytes)}): "
        f"{_contents(pushed)}."
    )


@datasets.command("list")
def list_datasets(
    name: Annotated[
        str,
        typer.Argument(metavar="[DATASET]", help="All versions of this one; without it, the newest of each."),
    ] = "-",
    kind: Annotated[str, typer.Option(help=f"What to list: {', '.join(_KINDS)}.")] = "dataset",
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List datasets, newest first; with --kind, other artifacts."""
    number = _kind(kind)
    with connect(endpoint) as client:
        found = client.list_datasets(name, kind=number, limit=limit)
    if json:
        print_json(found)
        return
    print_table(
        ("DATASET", "STATE", "FORMAT", "SIZE#", "CONTENTS", "LICENCE", "LABELS", "PUSHED"),
        (
            (
                short_artifact(artifact.name),
                state(artifact_pb2.ArtifactState, artifact.state, "ARTIFACT_STATE_"),
                artifact.format,
                size(artifact.size_bytes),
                _contents(artifact),
                json_format.MessageToDict(artifact.description).get("license", ""),
                pairs(artifact.labels),
                ago(artifact.create_time),
            )
            for artifact in found
        ),
        empty="No datasets yet; push one with `penstock datasets push PATH`, or `… push sklearn:digits`."
        if kind == "dataset"
        else f"No artifacts of the kind {kind}.",
    )


@datasets.command("show")
def show(name: Name, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show a dataset: rows, columns, and how often each label occurs."""
    with connect(endpoint) as client:
        found = client.get_dataset(name)
    if json:
        print_json(found)
        return
    show_dataset(found)


@datasets.command("pull")
def pull(
    name: Name,
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIRECTORY]", help="Where to; without it, the dataset's name.")
    ] = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Fetch the files of a dataset, or of predictions."""
    folder = directory or Path(short_artifact(name).partition(":")[0])
    with connect(endpoint) as client, progress.transfer(quiet=json) as bar:
        found = client.pull_dataset(name, folder, progress=bar)
    if json:
        print_json(found)
        return
    say(
        f"{short_artifact(found.name)}: {counted(len(found.files), 'file')}, {size(found.size_bytes)}, "
        f"in {folder}."
    )


@datasets.command("delete")
def delete(
    name: Annotated[str, typer.Argument(metavar="DATASET[:NUMBER]", help="A version, or all of a name.")],
    yes: Yes = False,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Delete a version of a dataset, or all its versions.

    Versions of models that were made with it stay, and still say so.
    """
    with connect(endpoint) as client:
        gone = (
            [client.get_dataset(name)]
            if ":" in name
            else client.list_datasets(name, kind=artifact_pb2.ARTIFACT_KIND_UNSPECIFIED)
        )
        if not gone:
            client.get_dataset(name)  # says that there is none
        shown = ", ".join(short_artifact(each.name) for each in gone)
        if not yes and not json:
            typer.confirm(f"Delete {shown}?", abort=True)
        for each in gone:
            client.delete_dataset(each.name)
    if json:
        print_json({"deleted": [each.name for each in gone]})
        return
    say(f"Deleted {shown}.")


def _kind(name: str) -> artifact_pb2.ArtifactKind.ValueType:
    if name not in _KINDS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(_KINDS)}.", param_hint="--kind")
    return _KINDS[name]


def _contents(artifact: artifact_pb2.Artifact) -> str:
    """Return in a few words what is in a dataset."""
    known: dict[str, Any] = json_format.MessageToDict(artifact.description)
    parts = []
    if "rows" in known:
        parts.append(counted(int(known["rows"]), "row"))
    if classes := known.get("classes"):
        parts.append(f"{len(classes)} classes")
    elif known.get("target") == "numbers":
        parts.append("a number to predict")
    return ", ".join([*parts, *filter(None, [str(known.get("task", "")).replace("_", " ")])])
