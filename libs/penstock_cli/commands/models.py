"""Models, their versions and aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.errors import InvalidArgument
from penstock.names import parse_version, short
from penstock.registry.v1 import model_pb2, version_pb2
from penstock.traffic import counted
from penstock_cli import progress
from penstock_cli.groups import listing_group
from penstock_cli.output import ago, pairs, print_json, print_table, say, size, state
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect
from penstock_cli.views import show_model, show_version

models = listing_group("Models; without a command, lists them.", named="show")
versions = listing_group("Versions: `penstock versions MODEL` lists them.", named="list")
alias = listing_group("Movable names of versions: `penstock alias MODEL` lists them.", named="list")

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]
VersionName = Annotated[
    str, typer.Argument(metavar="VERSION", help="MODEL:NUMBER, MODEL@ALIAS, or MODEL for the newest.")
]
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="Name of the alias, such as champion.")]
Where = Annotated[str, typer.Option("--filter", help="Terms that must all hold, such as labels.team=vision.")]
Order = Annotated[str, typer.Option("--order-by", help="A field, with ' desc' after it for the other way.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@models.command("list")
def list_models(
    where: Where = "",
    order_by: Order = "",
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List models."""
    with connect(endpoint) as client:
        found = client.list_models(where=where, order_by=order_by, limit=limit)
    if json:
        print_json(found)
        return
    print_table(
        ("MODEL", "LATEST#", "ALIASES", "CHANGED", "LABELS", "DESCRIPTION"),
        (
            (
                short(model.name),
                model.latest_version or "",
                " ".join(f"{short(each.name)}→{each.version}" for each in model.aliases),
                ago(model.update_time),
                pairs(model.labels),
                model.description,
            )
            for model in found
        ),
        empty="No model matches." if where else "No models yet; push one with `penstock push PATH`.",
    )


@models.command("show")
def show(model: ModelName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show a model with its aliases and versions."""
    with connect(endpoint) as client:
        found = client.get_model(model)
        if json:
            print_json(found)
            return
        show_model(found, client.list_versions(model, limit=20))


@models.command("delete")
def delete_model(
    model: ModelName, yes: Yes = False, endpoint: Endpoint = ENDPOINT, json: Json = False
) -> None:
    """Delete a model with all its versions."""
    confirm(f"Delete model {model} with all its versions?", yes=yes)
    with connect(endpoint) as client:
        client.delete_model(model)
    report_deleted(model, json=json)


@versions.command("list")
def list_versions(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Name of the model; without it, all.")
    ] = "-",
    where: Where = "",
    order_by: Order = "",
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List versions, newest first."""
    with connect(endpoint) as client:
        found = client.list_versions(model, where=where, order_by=order_by, limit=limit)
    if json:
        print_json(found)
        return
    print_versions(found, empty="No version matches." if where else "No versions yet.")


def print_versions(found: list[version_pb2.Version], *, empty: str) -> None:
    """Print versions as a table."""
    print_table(
        ("VERSION", "STATE", "FORMAT", "SIZE#", "ALIASES", "GATE", "METRICS", "PUSHED", "BY", "LABELS"),
        (
            (
                version_text(version),
                state(version_pb2.VersionState, version.state, "VERSION_STATE_"),
                version.manifest.format,
                size(version.size_bytes),
                " ".join(version.aliases),
                "failed" if version.manifest.HasField("gate") and not version.manifest.gate.passed else "",
                pairs(version.manifest.metrics),
                ago(version.create_time),
                version.created_by,
                pairs(version.labels),
            )
            for version in found
        ),
        empty=empty,
    )


@versions.command("show")
def show_one(version: VersionName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show a version: signature, files, metrics, where it comes from."""
    with connect(endpoint) as client:
        found = client.get_version(version)
    if json:
        print_json(found)
        return
    show_version(found)


@versions.command("download")
def download(
    version: VersionName,
    directory: Annotated[
        Path | None, typer.Argument(help="Where to; without it, a new directory named after the version.")
    ] = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Fetch the files of a version and its manifest.yaml; goes on where an earlier try stopped."""
    with connect(endpoint) as client:
        found = client.get_version(version)
        target = directory or Path(version_text(found).replace(":", "-"))
        with progress.transfer(quiet=json) as callback:
            client.download(found.name, target, progress=callback)
    if json:
        print_json({"version": found.name, "directory": str(target), "digest": found.digest})
        return
    files = counted(len(found.files), "file")
    say(f"{version_text(found)} is in {target} ({files}, {size(found.size_bytes)}).")


@versions.command("archive")
def archive(version: VersionName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Keep a version but take it out of use."""
    with connect(endpoint) as client:
        _report_state(client.archive_version(version), json=json)


@versions.command("restore")
def restore(version: VersionName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Bring an archived version back."""
    with connect(endpoint) as client:
        _report_state(client.restore_version(version), json=json)


@versions.command("delete")
def delete_version(
    version: VersionName, yes: Yes = False, endpoint: Endpoint = ENDPOINT, json: Json = False
) -> None:
    """Delete one version, given by its number."""
    if parse_version(version).number is None:
        raise InvalidArgument(f"Say which version to delete: {parse_version(version).model}:NUMBER.")
    confirm(f"Delete {version}?", yes=yes)
    with connect(endpoint) as client:
        client.delete_version(version)
    report_deleted(version, json=json)


@alias.command("set")
def set_alias(
    model: ModelName,
    name: AliasName,
    version: Annotated[int, typer.Argument(min=1, help="Number of the version.")],
    expect: Annotated[
        int | None, typer.Option(min=0, help="Only if it points to this number now (0: if it is new).")
    ] = None,
    comment: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Also to a version that failed its gate.")] = False,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Point an alias at a version, making it if new."""
    with connect(endpoint) as client:
        moved = client.set_alias(model, name, version, expected=expect, comment=comment, force=force)
    _report_alias(model, moved, json=json)


@alias.command("rollback")
def rollback_alias(
    model: ModelName,
    name: AliasName,
    comment: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Move an alias back to where it pointed before its last move."""
    with connect(endpoint) as client:
        moved = client.rollback_alias(model, name, comment=comment)
    _report_alias(model, moved, json=json)


@alias.command("delete")
def delete_alias(
    model: ModelName, name: AliasName, endpoint: Endpoint = ENDPOINT, json: Json = False
) -> None:
    """Remove an alias; the version stays."""
    with connect(endpoint) as client:
        client.delete_alias(model, name)
    report_deleted(f"{model}@{name}", json=json)


@alias.command("list")
def list_aliases(model: ModelName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """List the aliases of a model."""
    with connect(endpoint) as client:
        found = client.get_model(model).aliases
    if json:
        print_json(list(found))
        return
    print_table(
        ("ALIAS", "VERSION#", "MOVED", "BY"),
        ((short(each.name), each.version, ago(each.update_time), each.updated_by) for each in found),
        empty=f"{model} has no aliases; set one with `penstock alias set {model} champion NUMBER`.",
    )


@alias.command("history")
def history(
    model: ModelName,
    name: Annotated[str, typer.Argument(metavar="[ALIAS]", help="Only this alias.")] = "",
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List who moved which alias when, newest first."""
    with connect(endpoint) as client:
        moves = client.list_alias_moves(model, name, limit=limit)
    if json:
        print_json(moves)
        return
    print_table(
        ("ALIAS", "FROM#", "TO#", "WHEN", "BY", "WHY"),
        (
            (
                short(move.alias),
                move.from_version or "new",
                move.to_version or "deleted",
                ago(move.time),
                move.actor,
                move.comment,
            )
            for move in moves
        ),
        empty="No alias was moved yet.",
    )


def version_text(version: version_pb2.Version) -> str:
    """Return a version as people write it: digits:3."""
    return str(parse_version(version.name))


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed; without a terminal, `--yes` is needed."""
    if yes:
        return
    if not typer.get_text_stream("stdin").isatty():
        raise InvalidArgument(f"{question} Nobody can be asked here; add --yes.")
    typer.confirm(question, abort=True)


def report_deleted(what: str, *, json: bool) -> None:
    """Say that something is gone."""
    if json:
        print_json({"deleted": what})
    else:
        say(f"Deleted {what}.")


def _report_state(version: version_pb2.Version, *, json: bool) -> None:
    if json:
        print_json(version)
    else:
        say(f"{version_text(version)} is {state(version_pb2.VersionState, version.state, 'VERSION_STATE_')}.")


def _report_alias(model: str, moved: model_pb2.Alias, *, json: bool) -> None:
    if json:
        print_json(moved)
    else:
        say(f"{short(model)}@{short(moved.name)} is version {moved.version} now.")
