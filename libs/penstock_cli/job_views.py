"""Jobs on the screen: tables, progress, curves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import plotext
from google.protobuf.json_format import MessageToDict
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.errors import InvalidArgument
from penstock.jobs import job_ended, job_kind, job_state
from penstock.names import short
from penstock.scheduler.v1 import job_pb2
from penstock_cli.output import ago, console, pairs, print_facts, print_table, say, size
from penstock_cli.plots import has_front, plot_front, print_front

_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "red"}
_LOG_LINES = 6
_POINTS = 400
_PLOT_WIDTH, _PLOT_HEIGHT = 72, 12
_BAR_WIDTH = 40
# What people look at first, if it is there.
_CURVES = ("train/loss", "held_out/loss")


class Account:
    """What was heard of a job so far: its curves and the last lines of its log."""

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)

    def hear(self, event: job_pb2.JobEvent) -> None:
        """Take up an event."""
        if event.HasField("metrics"):
            for name, value in event.metrics.values.items():
                self.curves.setdefault(name, []).append((event.metrics.step, value))
        elif event.HasField("log"):
            self.lines.append(event.log.text)


def jobs_table(jobs: Sequence[job_pb2.Job], *, empty: str) -> None:
    """Print jobs, one a line, or a sentence where there is none."""
    print_table(
        ("JOB", "KIND", "STATE", "PROGRESS#", "RESULT", "METRICS", "PROJECT", "MADE", "WHY"),
        (
            (
                short(job.name),
                job_kind(job),
                job_state(job),
                progress_text(job),
                " ".join(map(result_text, job.results)),
                pairs(dict(sorted(job.metrics.items())[:3])),
                short(job.project) if short(job.project) != "default" else "",
                ago(job.create_time),
                "" if job.state == job_pb2.JOB_STATE_SUCCEEDED else job.message,
            )
            for job in jobs
        ),
        empty=empty,
    )


def show_job(job: job_pb2.Job) -> None:
    """Print a job in full."""
    ranks = f"{job.nodes or 1} × {job.ranks_per_node or 1}"
    print_facts(
        (
            ("job", short(job.name)),
            ("does", job_kind(job)),
            ("state", job_state(job)),
            ("why", job.message),
            ("cause", job.failure_reason),
            ("progress", " ".join(filter(None, (progress_text(job), job.progress.phase)))),
            ("metrics", pairs(job.metrics)),
            ("results", " ".join(map(result_text, job.results))),
            ("project", short(job.project)),
            ("priority", job.priority or ""),
            ("nodes × ranks", ranks if ranks != "1 × 1" else ""),
            ("attempt", _attempt(job)),
            ("labels", pairs(job.labels)),
            ("made", " by ".join(filter(None, (ago(job.create_time), job.created_by)))),
            ("took", _took(job)),
        )
    )
    say("")
    print_facts(_flat(_work(job)))
    if job.tasks:
        say("")
        print_table(
            ("TASK#", "STATE", "NODE", "DEVICES", "PID#", "WHY"),
            (
                (
                    short(task.name),
                    job_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_"),
                    short(task.node),
                    " ".join(task.devices),
                    task.pid or "",
                    task.message,
                )
                for task in job.tasks
            ),
            empty="",
        )
    print_report(job)


def print_report(job: job_pb2.Job) -> None:
    """Print what a job found."""
    report = MessageToDict(job.report)
    if not report:
        return
    say("")
    if has_front(report):
        print_front(report)
        gate = report.get("gate", {})
        if gate and not gate.get("passed"):
            say(f"The gate was not passed: {'; '.join(gate.get('failures', ())) or 'nothing was measured'}.")
        return
    points = report.pop("points", None)
    print_facts(_flat({key: report[key] for key in sorted(report) if key != "kind"}))
    if isinstance(points, list):
        say("")
        print_table(
            ("ROWS#", "P50#", "P99#", "ROWS/S#"),
            (
                (
                    f"{point['batch_size']:g}",
                    f"{point['p50_seconds'] * 1e3:.3g} ms",
                    f"{point['p99_seconds'] * 1e3:.3g} ms",
                    f"{point['rows_per_second']:,.0f}",
                )
                for point in points
            ),
            empty="",
        )


def draw_report(job: job_pb2.Job, path: Path) -> None:
    """Draw what a compression tried as a picture.

    Raises:
        InvalidArgument: The job tried nothing, or the name ends in no format that is known.
        FailedPrecondition: matplotlib is not installed.
    """
    report = MessageToDict(job.report)
    if not has_front(report):
        raise InvalidArgument(f"{short(job.name)} has no candidates to draw; compressions that SUCCEEDED do.")
    say(f"Drawn to {plot_front(report, path)}.")


def job_view(job: job_pb2.Job, account: Account) -> RenderableType:
    """Return a job as it is drawn while somebody watches."""
    state = job_state(job)
    head = Text(f"{short(job.name)}  {job_kind(job)}  ")
    head.append(state, style=_STYLES.get(state, "yellow"))
    if job.attempt > 1:
        head.append(f"  start {job.attempt}", style="dim")
    parts: list[RenderableType] = [head]
    if job.message:
        parts.append(Text(job.message))
    if job.progress.total:
        bar = Table.grid(padding=(0, 2))
        done = job.progress.total if job.state == job_pb2.JOB_STATE_SUCCEEDED else job.progress.done
        bar.add_row(
            ProgressBar(total=job.progress.total, completed=done, width=_BAR_WIDTH),
            progress_text(job),
            job.progress.phase,
            remaining_text(job),
        )
        parts.append(bar)
    if job.metrics:
        parts.append(Text(pairs(job.metrics), style="bold"))
    drawn = curve(account.curves, width=console().width)
    if drawn:
        parts.append(Text.from_ansi(drawn))
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in account.lines]
    if job_ended(job) and job.results:
        parts.append(Text("made " + " ".join(map(result_text, job.results)), style="green"))
    return Group(*parts)


def print_curves(curves: Mapping[str, Sequence[tuple[int, float]]], *, colour: bool) -> None:
    """Print the curves of a job's losses, or of all its metrics where it has none."""
    drawn = curve(curves, everything=True, width=console().width)
    if drawn:
        console().print(Text.from_ansi(drawn) if colour else Text.from_ansi(drawn).plain)


def curve(
    curves: Mapping[str, Sequence[tuple[int, float]]], *, everything: bool = False, width: int = _PLOT_WIDTH
) -> str:
    """Return the losses over the steps as a plot of characters; nothing if there are too few points.

    Args:
        curves: (step, value) by metric.
        everything: Draw other metrics where there is no loss.
        width: Characters that there are in a line.
    """
    chosen = [name for name in _CURVES if name in curves]
    if not chosen and everything:
        chosen = sorted(curves)[:4]
    series = {name: _thin([p for p in curves[name] if math.isfinite(p[1])]) for name in chosen}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return ""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(min(_PLOT_WIDTH, width), _PLOT_HEIGHT)
    for (name, points), colour in zip(series.items(), ("cyan", "magenta", "green", "yellow"), strict=False):
        plotext.plot(
            [p[0] for p in points], [p[1] for p in points], label=name, color=colour, marker="braille"
        )
    return str(plotext.build())


def progress_text(job: job_pb2.Job) -> str:
    """Return how far a job is: 37 %."""
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return "100 %"
    progress = job.progress
    if not progress.total:
        return f"{progress.done} {progress.unit}" if progress.done else ""
    return f"{100 * progress.done // progress.total} %"


def remaining_text(job: job_pb2.Job) -> str:
    """Return how long the rest takes, as people say it."""
    if job_ended(job) or not job.progress.HasField("remaining"):
        return ""
    return f"{_seconds_text(job.progress.remaining.ToTimedelta().total_seconds())} left"


def result_text(name: str) -> str:
    """Return a result as people point at it: digits:3."""
    parts = name.split("/")
    return f"{parts[1]}:{parts[3]}" if len(parts) == 4 else name


def _work(job: job_pb2.Job) -> Mapping[str, object]:
    """Return what was asked for, with the names that reports and files of jobs use, too."""
    kind = job.WhichOneof("work")
    return MessageToDict(getattr(job, kind), preserving_proto_field_name=True) if kind else {}


def _attempt(job: job_pb2.Job) -> str:
    if job.attempt < 2:
        return ""
    return f"{job.attempt}, {job.restarts} after failures"


def _took(job: job_pb2.Job) -> str:
    if not job.HasField("start_time") or not job.HasField("end_time"):
        return ""
    return _seconds_text((job.end_time.ToDatetime() - job.start_time.ToDatetime()).total_seconds())


def _seconds_text(count: float) -> str:
    for length, unit in ((3600, "h"), (60, "min")):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count:.0f} s"


def _thin(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Leave out points that no character would show."""
    return points[:: max(1, len(points) // _POINTS)]


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            for place, each in enumerate(value, start=1):
                yield from _flat(each, f"{prefix}{key}.{place}.")
        else:
            yield f"{prefix}{key}", _fact(key, value)


def _fact(key: str, value: object) -> object:
    if not isinstance(value, float):
        return value
    return size(round(value)) if key.endswith("_bytes") else f"{value:.6g}"
