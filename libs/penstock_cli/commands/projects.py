"""Projects: quotas, and shares of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from penstock import Client
from penstock.common.v1 import resources_pb2
from penstock.names import short
from penstock.scheduler.v1 import project_pb2
from penstock_cli.commands.models import Yes, confirm, report_deleted
from penstock_cli.groups import listing_group
from penstock_cli.options import byte_count
from penstock_cli.output import ago, print_facts, print_json, print_table, say, size
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect

ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Name of the project.")]
Cpu = Annotated[
    float | None, typer.Option(min=0, metavar="CORES", help="Cores it may hold together; 0 lifts the bound.")
]
Memory = Annotated[
    str | None, typer.Option(metavar="64GiB", help="Memory it may hold together; 0 lifts the bound.")
]
Gpus = Annotated[
    float | None,
    typer.Option(min=0, metavar="2.5", help="GPUs, whole and in parts, it may hold; 0 lifts the bound."),
]
Weight = Annotated[
    float | None,
    typer.Option(metavar="1", help="Its share beside other projects when all want more than there is."),
]
Description = Annotated[str | None, typer.Option(help="What it is for.")]

projects = listing_group(
    "Whose deployments and jobs share a quota; without a command, lists them.", named="show"
)


@projects.command("list")
def list_projects(limit: Limit = None, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """List projects with what they hold, of what they may."""
    with connect(endpoint) as client:
        found = client.list_projects(limit=limit)
    if json:
        print_json(found)
    else:
        print_projects(found)


@projects.command("show")
def show(name: ProjectName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show a project: its quota, what it holds, what waits."""
    with connect(endpoint) as client:
        project = client.get_project(name)
    if json:
        print_json(project)
    else:
        show_project(project)


@projects.command("create")
def create(
    name: ProjectName,
    cpu: Cpu = None,
    memory: Memory = None,
    gpus: Gpus = None,
    weight: Weight = None,
    description: Description = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Make a project; what is not bounded is unbounded."""
    quota = _quota(resources_pb2.Resources(), cpu, memory, gpus)
    with connect(endpoint) as client:
        project = client.create_project(
            name, quota=quota, weight=weight or 0.0, description=description or ""
        )
    _report(project, f"Made project {short(project.name)}.", json=json)


@projects.command("update")
def update(
    name: ProjectName,
    cpu: Cpu = None,
    memory: Memory = None,
    gpus: Gpus = None,
    weight: Weight = None,
    description: Description = None,
    allow_below_use: Annotated[
        bool,
        typer.Option(
            "--allow-below-use",
            help="Take a quota below what is held: what runs stays, nothing new comes until enough ended.",
        ),
    ] = False,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Change a project; what is not given stays."""
    with connect(endpoint) as client:
        project = _update(client, name, cpu, memory, gpus, weight, description, allow=allow_below_use)
    _report(
        project, f"Project {short(project.name)} may hold {quota_text(project) or 'anything'}.", json=json
    )


@projects.command("delete")
def delete(name: ProjectName, yes: Yes = False, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Delete a project that no deployment and no unfinished job names."""
    confirm(f"Delete project {name}?", yes=yes)
    with connect(endpoint) as client:
        client.delete_project(name)
    report_deleted(name, json=json)


def _update(
    client: Client,
    name: str,
    cpu: float | None,
    memory: str | None,
    gpus: float | None,
    weight: float | None,
    description: str | None,
    *,
    allow: bool,
) -> project_pb2.Project:
    quota, etag = None, ""
    if cpu is not None or memory is not None or gpus is not None:
        # Of a quota the whole is sent: of what somebody else changes meanwhile nothing must get lost.
        present = client.get_project(name)
        quota, etag = _quota(present.quota, cpu, memory, gpus), present.etag
    return client.update_project(
        name, quota=quota, weight=weight, description=description, etag=etag, allow_below_use=allow
    )


def _quota(
    present: resources_pb2.Resources, cpu: float | None, memory: str | None, gpus: float | None
) -> resources_pb2.Resources:
    quota = resources_pb2.Resources()
    quota.CopyFrom(present)
    if cpu is not None:
        quota.cpu_millis = round(cpu * 1000)
    if memory is not None:
        quota.memory_bytes = byte_count("--memory", memory)
    if gpus is not None:
        quota.gpus, quota.gpu_memory_millis = divmod(round(gpus * 1000), 1000)
    return quota


def _report(project: project_pb2.Project, words: str, *, json: bool) -> None:
    if json:
        print_json(project)
    else:
        say(words)


def print_projects(found: Sequence[project_pb2.Project]) -> None:
    """Print projects as a table."""
    print_table(
        ("PROJECT", "CORES#", "MEMORY#", "GPUS#", "WEIGHT#", "SHARE#", "WAITING#", "FOR"),
        (
            (
                short(project.name),
                _of(_cores(project.used), _cores(project.quota)),
                _of(size(project.used.memory_bytes), _bytes(project.quota)),
                _of(_gpus(project.used), _gpus(project.quota)),
                f"{project.weight:g}",
                f"{project.dominant_share:.1%}",
                project.waiting or "",
                project.description,
            )
            for project in found
        ),
        empty="There is no project.",
    )


def show_project(project: project_pb2.Project) -> None:
    """Print a project: its quota, what it holds, what waits."""
    print_facts(
        (
            ("project", short(project.name)),
            ("for", project.description),
            ("cores", _of(_cores(project.used), _cores(project.quota))),
            ("memory", _of(size(project.used.memory_bytes), _bytes(project.quota))),
            ("GPUs", _of(_gpus(project.used), _gpus(project.quota))),
            ("weight", f"{project.weight:g}"),
            ("share", f"{project.dominant_share:.1%} of the cluster, over its weight"),
            ("waiting", f"{project.waiting} replicas and tasks" if project.waiting else ""),
            ("made", ago(project.create_time)),
            ("changed", ago(project.update_time)),
        )
    )


def quota_text(project: project_pb2.Project) -> str:
    """Return what a project may hold, in words; empty if all is unbounded."""
    quota = project.quota
    parts = (
        f"{_cores(quota)} cores" if quota.cpu_millis else "",
        f"{_bytes(quota)} of memory" if quota.memory_bytes else "",
        f"{_gpus(quota)} GPUs" if _gpus(quota) != "0" else "",
    )
    return ", ".join(filter(None, parts))


def _of(used: str, quota: str) -> str:
    return f"{used} of {quota}" if quota not in ("", "0") else used


def _cores(resources: resources_pb2.Resources) -> str:
    return f"{resources.cpu_millis / 1000:g}"


def _gpus(resources: resources_pb2.Resources) -> str:
    return f"{resources.gpus + resources.gpu_memory_millis / 1000:g}"


def _bytes(resources: resources_pb2.Resources) -> str:
    return size(resources.memory_bytes) if resources.memory_bytes else ""
