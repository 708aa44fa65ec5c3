"""The options that all commands share which queue a job."""

from __future__ import annotations

import functools
import inspect
import json as json_lines
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer
from google.protobuf import struct_pb2

from penstock.errors import InvalidArgument
from penstock.names import resource
from penstock.scheduler.v1 import deployment_pb2, job_pb2
from penstock_cli.options import byte_count, duration, taints, words
from penstock_cli.session import ENDPOINT, Endpoint, Json


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a job needs beside its work, and how the command follows it."""

    name: Annotated[str, typer.Option("--name", help="Name of the job; without it, it gets one.")] = ""
    project: Annotated[str, typer.Option(help="Whose quota it counts against.")] = ""
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="Among the jobs of its project, higher comes first.")
    ] = 0
    ranks: Annotated[int, typer.Option(min=1, max=1024, help="Processes on each node.")] = 1
    nodes: Annotated[int, typer.Option(min=1, max=1024, help="Groups of processes, placed all or none.")] = 1
    min_nodes: Annotated[
        int, typer.Option(min=0, max=1024, help="Go on with so many when nodes are lost; 0 means all.")
    ] = 0
    cpu: Annotated[float, typer.Option(min=0, metavar="CORES", help="Cores of each process.")] = 0.0
    memory: Annotated[str, typer.Option(metavar="2GiB", help="Memory of each process.")] = ""
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each process.")] = 0
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only nodes with this label; repeat it.")
    ] = None
    tolerate: Annotated[
        list[str] | None, typer.Option(metavar="KEY[=VALUE]", help="Also nodes with this taint; repeat it.")
    ] = None
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="To find it again.")] = None
    max_restarts: Annotated[
        int, typer.Option(min=-1, help="Starts again after failures; 0 means 3, -1 never.")
    ] = 0
    time_limit: Annotated[str, typer.Option(metavar="2h", help="It fails after running for so long.")] = ""
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Queue it and return at once.")] = False
    endpoint: Endpoint = ENDPOINT
    json: Json = False

    def job(self) -> job_pb2.Job:
        """Return a job without work.

        Raises:
            InvalidArgument: An option is not of its form.
        """
        job = job_pb2.Job(
            name=resource("jobs", self.name) if self.name else "",
            project=resource("projects", self.project) if self.project else "",
            priority=self.priority,
            nodes=self.nodes,
            ranks_per_node=self.ranks,
            min_nodes=self.min_nodes,
            max_restarts=self.max_restarts,
            labels=words("--label", self.label),
            node_selector=words("--node-selector", self.node_selector),
        )
        job.tolerations.extend(
            deployment_pb2.Toleration(key=key, value=value)
            for key, value in taints("--tolerate", self.tolerate or ()).items()
        )
        if self.cpu or self.memory or self.gpus:
            job.resources.cpu_millis = round(self.cpu * 1000)
            job.resources.memory_bytes = byte_count("--memory", self.memory) if self.memory else 0
            job.resources.gpus = self.gpus
        if self.time_limit:
            job.timeout.CopyFrom(duration("--time-limit", self.time_limit))
        return job


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `JobOptions`, which it gets in its parameter `options`.

    typer reads the options of a command off its signature, so the signature gets them.
    """
    shared = {field.name: field for field in fields(JobOptions)}
    hints = get_type_hints(command, include_extras=True)
    shared_hints = get_type_hints(JobOptions, include_extras=True)
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "options"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in shared}
        command(**given, options=JobOptions(**chosen))

    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default if field.default is not MISSING else inspect.Parameter.empty,
            annotation=shared_hints[name],
        )
        for name, field in shared.items()
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    all_own = [each.replace(kind=keyword, annotation=hints[each.name]) for each in own]
    run.__signature__ = inspect.Signature([*all_own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*all_own, *added)} | {"return": None}
    return run


def structured(option: str, texts: Iterable[str] | None) -> struct_pb2.Struct:
    """Return KEY=VALUE texts as a Struct; a value that is JSON means what it says, another is a word.

    Raises:
        InvalidArgument: One is not of that form, or a key is given twice.
    """
    found = struct_pb2.Struct()
    for key, text in words(option, texts).items():
        found.update({key: _value(option, key, text)})
    return found


def _value(option: str, key: str, text: str) -> Any:
    try:
        value = json_lines.loads(text)
    except ValueError:
        if text[:1] in ("[", "{"):
            raise InvalidArgument(f"{option} {key}={text}: it is not valid JSON.") from None
        return text
    return value
