"""Jobs: what runs, how far it is, what it said."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor

from penstock import Client
from penstock.errors import InvalidArgument, NotFound
from penstock.jobs import describe_job, job_ended
from penstock.names import resource, short
from penstock.scheduler.v1 import job_pb2, job_service_pb2
from penstock_cli.commands.models import Yes, confirm, report_deleted
from penstock_cli.following import WATCH_SECONDS, follow, raise_if_not_succeeded
from penstock_cli.groups import listing_group
from penstock_cli.job_views import draw_report, jobs_table, print_curves, show_job
from penstock_cli.output import ago, note, print_json, print_table, say
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect, nearest

jobs = listing_group("Work that ends: training, conversion, compression …", named="show")

Name = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")]
_STATES = [name.removeprefix("JOB_STATE_") for name in job_pb2.JobState.keys()[1:]]
_LOG = job_service_pb2.JOB_EVENT_KIND_LOG
_METRICS = job_service_pb2.JOB_EVENT_KIND_METRICS


@jobs.command("list")
def list_jobs(
    project: Annotated[str, typer.Option(help="Only those of this project.")] = "",
    state: Annotated[
        list[str] | None, typer.Option(metavar="|".join(_STATES), help="Only those in this state; repeat it.")
    ] = None,
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List jobs, newest first."""
    states = [_state(text) for text in state or ()]
    with connect(endpoint) as client:
        found = client.list_jobs(project=project, states=states, limit=limit)
    if json:
        print_json(found)
    else:
        chosen = project or states
        none = "There are no jobs. Begin one with `penstock train DATASET --model NAME`."
        jobs_table(found, empty="There are no such jobs." if chosen else none)


@jobs.command("show")
def show(
    name: Name,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw what a compression tried, too.")
    ] = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Show a job: what it does, where it stands, what it found."""
    with connect(endpoint) as client:
        job = client.get_job(name)
    if json:
        print_json(job)
    else:
        show_job(job)
    if plot is not None:
        draw_report(job, plot)


@jobs.command("watch")
def watch(
    name: Name,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long to watch.")
    ] = WATCH_SECONDS,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Watch a job until it has ended: progress, loss curve, log; ends with 1 if it did not succeed."""
    with connect(endpoint) as client:
        job = follow(client, name, timeout=timeout, quiet=json)
    if json:
        print_json(job)
    elif not sys.stdout.isatty():
        show_job(job)
    raise_if_not_succeeded(job)


@jobs.command("logs")
def logs(
    name: Name,
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Print what a job wrote."""
    with connect(endpoint) as client:
        if follow_on and not json:
            client.watch_job_events(name, _print_line, kinds=(_LOG,), timeout=WATCH_SECONDS)
            return
        found = client.list_job_events(name, kinds=(_LOG,))
        if json:
            print_json(found)
        elif found:
            for event in found:
                _print_line(event)
        else:
            note(_why_nothing(client, name, "has written nothing"))


@jobs.command("metrics")
def metrics(
    name: Name,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Only this metric; repeat it.")] = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Print a job's metrics over its steps: curves, and their first, best and last values."""
    with connect(endpoint) as client:
        events = client.list_job_events(name, kinds=(_METRICS,))
        nothing = "" if events else _why_nothing(client, name, "has recorded none")
    if json:
        print_json([event.metrics for event in events])
        return
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for key, value in event.metrics.values.items():
            curves.setdefault(key, []).append((event.metrics.step, value))
    for wanted in metric or ():
        if wanted not in curves:
            hint = nearest(wanted, sorted(curves)) or f"It has {', '.join(sorted(curves)) or 'none yet'}."
            raise NotFound(f"{short(name)} has no metric {wanted!r}. {hint}")
    curves = {key: points for key, points in curves.items() if not metric or key in metric}
    print_curves(curves, colour=sys.stdout.isatty())
    print_table(
        ("METRIC", "STEPS#", "FIRST#", "LEAST#", "MOST#", "LAST#"),
        (
            (
                key,
                len(points),
                *(f"{value:.5g}" for value in _summary([value for _, value in points])),
            )
            for key, points in sorted(curves.items())
        ),
        empty=nothing,
    )


@jobs.command("cancel")
def cancel(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until nothing of it runs.")] = True,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """End a job; what it held is free within seconds."""
    with connect(endpoint) as client:
        job = client.cancel_job(name)
        if wait:
            job = client.watch_job(name, timeout=60.0)
    if json:
        print_json(job)
    else:
        say(f"{short(job.name)}: {describe_job(job)}")


@jobs.command("delete")
def delete(name: Name, yes: Yes = False, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Remove a job that has ended, with its log and checkpoints; its results stay."""
    confirm(f"Delete the job {name} with its log and checkpoints?", yes=yes)
    with connect(endpoint) as client:
        client.delete_job(name)
    report_deleted(resource("jobs", name), json=json)


@jobs.command("run")
def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A job in YAML or JSON, with the fields of job.proto.")
    ],
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Queue it and return at once.")] = False,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Queue a job that is written in a file, and follow it.

    `penstock jobs show JOB --json` writes such a file.
    """
    job = _read(file)
    with connect(endpoint) as client:
        made = client.create_job(job)
        if detach:
            if json:
                print_json(made)
            else:
                say(f"{short(made.name)} is queued. Follow it with `penstock jobs watch {short(made.name)}`.")
            return
        ended = follow(client, made.name, quiet=json)
    if json:
        print_json(ended)
    else:
        show_job(ended)
    raise_if_not_succeeded(ended)


def _read(file: Path) -> job_pb2.Job:
    """Return the job in a file.

    Raises:
        NotFound: There is no such file.
        InvalidArgument: It holds no job.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InvalidArgument(f"{file}: write a job as a mapping, with the fields of job.proto.")
    _check_fields(file, tree, job_pb2.Job.DESCRIPTOR)
    try:
        return json_format.ParseDict(tree, job_pb2.Job())
    except json_format.ParseError as error:
        raise InvalidArgument(f"{file}: {error}") from error


def _check_fields(file: Path, tree: Mapping[str, Any], message: Descriptor, where: str = "") -> None:
    """Return if a job has no field of its own invention; protobuf would not say which one was meant.

    Raises:
        InvalidArgument: It has one; the words name the nearest, or all.
    """
    fields = {name: field for field in message.fields for name in (field.name, field.json_name)}
    for name, value in tree.items():
        field = fields.get(name)
        if field is None:
            known = [each.name for each in message.fields]
            hint = nearest(str(name), known) or f"There are {', '.join(known)}."
            raise InvalidArgument(f"{file}: there is no field {where}{name}. {hint}")
        inner = field.message_type
        # Free-form values and maps have words of their own as keys.
        if inner is None or inner.file.package == "google.protobuf" or inner.GetOptions().map_entry:
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                _check_fields(file, each, inner, f"{where}{name}.")


def _state(text: str) -> job_pb2.JobState.ValueType:
    name = text.upper()
    if name not in _STATES:
        raise InvalidArgument(f"--state {text}: use {', '.join(_STATES)}. {nearest(name, _STATES)}".strip())
    return job_pb2.JobState.Value(f"JOB_STATE_{name}")


def _why_nothing(client: Client, name: str, what: str) -> str:
    """Return why a job has no events of a kind: there were none, or they were not kept."""
    job = client.get_job(name)
    if job.last_event and job_ended(job) and not client.list_job_events(name, limit=1):
        return f"{short(job.name)} ended {ago(job.end_time)}; its log and curves are not kept any longer."
    return f"{short(job.name)} {what}{'' if job_ended(job) else ' yet'}."


def _print_line(event: job_pb2.JobEvent) -> None:
    print(event.log.text, flush=True)


def _summary(values: list[float]) -> tuple[float, float, float, float]:
    return values[0], min(values), max(values), values[-1]
