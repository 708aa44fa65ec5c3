"""The Pareto front of a compression: as a table, in the terminal, and as a picture.

What is drawn is a job's report (`Job.report` of a COMPRESS job) as plain values; its candidates are numbered
in the table as in the plots, the source being 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotext
from rich.text import Text

from penstock.errors import FailedPrecondition, InvalidArgument
from penstock_cli.output import print_table, size

PICTURES = (".svg", ".png", ".pdf")
"""What a picture may be."""
_WIDTH, _HEIGHT = 78, 18
_STEPS_SHOWN = 80
# Where the colours end: what loses more is of no use, and small differences are to be seen.
_MOST_LOSS = 0.03
_REPAIR = re.compile(r"(?:, )?(?:repair_epochs|epochs|learning_rate)=[0-9.e-]+")


@dataclass(frozen=True, slots=True)
class FrontRow:
    """One candidate.

    Attributes:
        number: As the table counts; 0 is the source.
        steps: What was done, for people.
        size_bytes: Of the files that a replica loads.
        size_ratio: The same over the source's.
        latency_ms: Of a call with one row.
        rows_per_second: Throughput.
        speed_up: Throughput over the source's.
        metric: Value of the metric that counts.
        metric_loss: What it lost of it.
        front: No other candidate is better in everything.
        passed: It passed the gate.
        recommended: It is the one that was published.
    """

    number: int
    steps: str
    size_bytes: int
    size_ratio: float
    latency_ms: float
    rows_per_second: float
    speed_up: float
    metric: float
    metric_loss: float
    front: bool
    passed: bool
    recommended: bool


def has_front(report: Mapping[str, Any]) -> bool:
    """Whether a report is one of a compression, with at least one candidate beside the source."""
    return len(report.get("candidates", ())) > 1 and report.get("kind") in {"search", "compression"}


def front_rows(report: Mapping[str, Any]) -> list[FrontRow]:
    """Return the candidates of a report, the source first, then the front, the fastest first.

    Raises:
        InvalidArgument: It is no report of a compression.
    """
    if not has_front(report):
        raise InvalidArgument("The job has no report of a compression; it may not have ended yet.")
    source, *others = report["candidates"]
    others = sorted(others, key=lambda each: (not each["recommended"], not each["front"], -each["speed_up"]))
    return [
        FrontRow(
            number=number,
            steps=str(each["name"]),
            size_bytes=int(each["size_bytes"]),
            size_ratio=float(each["size_ratio"]),
            latency_ms=float(each["latency_ms"]),
            rows_per_second=float(each["rows_per_second"]),
            speed_up=float(each["speed_up"]),
            metric=float(each["metric"]),
            metric_loss=float(each["metric_loss"]),
            front=bool(each["front"]),
            passed=bool(each["passed"]),
            recommended=bool(each["recommended"]),
        )
        for number, each in enumerate([source, *others])
    ]


def print_front(report: Mapping[str, Any], *, everything: bool = False) -> None:
    """Print the Pareto front as a table: size, latency, throughput and metric of each candidate.

    Args:
        report: Of the job.
        everything: Those that another one beats in everything, too.

    Raises:
        InvalidArgument: It is no report of a compression.
    """
    rows = front_rows(report)
    shown = [row for row in rows if everything or row.number == 0 or row.front or row.recommended]
    metric = str(report.get("metric", "metric")).upper()
    print_table(
        (
            "#",
            "STEPS",
            "SIZE#",
            "OF SOURCE#",
            "1 ROW#",
            "ROWS/S#",
            "SPEED#",
            f"{metric}#",
            "LOSS#",
            "GATE",
            "",
        ),
        (
            (
                row.number,
                _brief(row.steps),
                size(row.size_bytes),
                f"{row.size_ratio:.0%}",
                f"{row.latency_ms:.3g} ms",
                f"{row.rows_per_second:,.0f}",
                f"{row.speed_up:.2f}×",
                f"{row.metric:.4f}",
                f"{row.metric_loss:+.4f}" if row.number else "",
                "" if row.number == 0 else "passed" if row.passed else "failed",
                "recommended" if row.recommended else "front" if row.front else "",
            )
            for row in shown
        ),
        empty="",
    )


def front_text(report: Mapping[str, Any], *, colour: bool = True) -> str:
    """Return the front as a plot of characters: size over the source's across, speed-up upwards.

    Args:
        report: Of the job.
        colour: Whether the terminal has colours.

    Raises:
        InvalidArgument: It is no report of a compression.
    """
    rows = front_rows(report)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(_WIDTH, _HEIGHT)
    groups: Sequence[tuple[str, list[FrontRow], str, str]] = (
        ("others", [row for row in rows if not row.front and not row.recommended], "gray", "·"),
        ("front", [row for row in rows if row.front and not row.recommended], "cyan", "o"),
        ("recommended", [row for row in rows if row.recommended], "green", "◆"),
    )
    for label, chosen, shade, marker in groups:
        if chosen:
            plotext.scatter(
                [100 * row.size_ratio for row in chosen],
                [row.speed_up for row in chosen],
                label=label,
                color=shade,
                marker=marker,
            )
    plotext.xlabel("size, % of the source")
    plotext.ylabel("× rows a second")
    drawn = str(plotext.build())
    return drawn if colour else Text.from_ansi(drawn).plain


def plot_front(report: Mapping[str, Any], path: Path) -> Path:
    """Draw the front as a picture (.svg, .png or .pdf, by the name) and return where it is.

    Across is the size over the source's, upwards the throughput over the source's, and the colour is what was
    lost of the metric. Candidates on the front are filled and numbered as in the table.

    Raises:
        FailedPrecondition: matplotlib is not installed.
        InvalidArgument: It is no report of a compression, or the name ends in no format that is known.
    """
    rows = front_rows(report)
    if path.suffix not in PICTURES:
        raise InvalidArgument(f"{path.name} must end in {', '.join(PICTURES)}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise FailedPrecondition("A picture needs matplotlib: pip install 'penstock[plots]'.") from error
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    metric = str(report.get("metric", "metric"))
    points = None
    for chosen, filled in (
        ([row for row in rows if not row.front and not row.recommended], False),
        ([row for row in rows if row.front or row.recommended], True),
    ):
        if not chosen:
            continue
        drawn = axes.scatter(
            [100 * row.size_ratio for row in chosen],
            [row.speed_up for row in chosen],
            c=[row.metric_loss for row in chosen],
            cmap="coolwarm",
            vmin=-_MOST_LOSS,
            vmax=_MOST_LOSS,
            s=90 if filled else 30,
            edgecolors="black" if filled else "gray",
            linewidths=[2.5 if row.recommended else 0.8 for row in chosen],
            alpha=1.0 if filled else 0.6,
            zorder=3 if filled else 2,
        )
        points = drawn if filled else points
        if filled:
            for row in chosen:
                axes.annotate(
                    f"{row.number}" + (" recommended" if row.recommended else " source" * (not row.number)),
                    (100 * row.size_ratio, row.speed_up),
                    xytext=(7, 5),
                    textcoords="offset points",
                    fontsize=9,
                    fontweight="bold" if row.recommended else "normal",
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, text in ((axes.xaxis, "{x:g} %"), (axes.yaxis, "{x:g} ×")):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(text)
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel("size, of the source's")
    axes.set_ylabel("rows a second, of the source's")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.set_title(f"Compression: {len(rows) - 1} candidates, {sum(row.front for row in rows)} on the front")
    if points is not None:
        figure.colorbar(points, ax=axes, label=f"{metric} lost (blue: gained)")
    figure.savefig(path, dpi=150)
    return path


def _brief(steps: str) -> str:
    """Return steps without how long they were repaired, which the report has in full."""
    steps = _REPAIR.sub("", steps).replace("()", "").replace("(, ", "(")
    return steps if len(steps) <= _STEPS_SHOWN else f"{steps[: _STEPS_SHOWN - 1]}…"
