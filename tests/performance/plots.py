"""One picture of a run: throughput and p99 by concurrency for each workload; goodput by offered load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from performance import overload
from performance.results import CLOSED, Results
from performance.workloads import WORKLOADS

_LINE = {"grpc": "-", "h2load": "-", "http": "--", "wrk": ":"}
_SAID = {"grpc": "gRPC", "h2load": "gRPC (h2load)", "http": "HTTP", "wrk": "HTTP (wrk)"}
# Ours stands out; the floors stay back.
_COLOURS = {
    "ours": "#d1350f",
    "triton": "#3f7f1f",
    "triton-guarded": "#9ac27c",
    "mosec": "#1f5fa8",
    "mosec-joining": "#7fb0e0",
    "kserve": "#7a5ba6",
    "mlserver": "#b8860b",
    "litserve": "#008b8b",
    "bentoml": "#c05a9b",
    "ray": "#5a4a3a",
    "floor-grpc": "#999999",
    "floor-pyvoy": "#c4c4c4",
}


def draw(results: Results, path: Path) -> bool:
    """Draw what was measured into a PNG; returns whether there was anything."""
    workloads = [key for key in WORKLOADS if results.series(key, CLOSED)]
    curves = results.experiments.get(overload.NAME, {})
    rows = len(workloads) + bool(curves)
    if not rows:
        return False
    figure, grid = plt.subplots(rows, 2, figsize=(15, 5.2 * rows), squeeze=False, layout="constrained")
    for axes, key in zip(grid, workloads, strict=False):
        _loads(results, key, axes[0], axes[1])
    if curves:
        _overload(results, curves, grid[-1][0], grid[-1][1])
    m = results.machine
    figure.suptitle(
        f"{m['cores']} cores, {m['cpu']}, client and server on one machine; commit {m['commit']}; "
        f"{results.options['seconds']:g} s a point, {results.options['rounds']} starts; {m['time'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _loads(results: Results, key: str, rates: Axes, tails: Axes) -> None:
    series = results.series(key, CLOSED)
    handles: list[Line2D] = []
    for (server, door), points in series.items():
        good = {level: record for level, record in points.items() if not record.failure}
        if not good:
            continue
        style = _style(server, door)
        label = f"{results.titles.get(server, server)}, {_SAID.get(door, door)}"
        handles += rates.plot(list(good), [r.rate for r in good.values()], label=label, **style)
        tails.plot(list(good), [r.p99 for r in good.values()], **style)
    levels = sorted({level for points in series.values() for level in points})
    title = WORKLOADS[key].title
    if key == "w2" and results.ideal:
        for rows in (16, 32):
            rates.axhline(results.direct(rows), color="black", linewidth=0.8, linestyle=(0, (1, 3)))
            rates.annotate(
                f"torch called directly, batch {rows}",
                (levels[0], results.direct(rows)),
                fontsize=7,
                va="bottom",
            )
    _axes(rates, levels, f"{title}: answers per second (higher is better)")
    _axes(tails, levels, f"{title}: p99 latency, ms (lower is better)")
    # The legend in the order of the lines at the right edge is read without searching.
    handles.sort(key=lambda line: -float(line.get_ydata()[-1]))  # type: ignore[index,arg-type]
    tails.legend(handles=handles, fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _overload(results: Results, curves: dict[str, Any], goodput: Axes, after: Axes) -> None:
    handles: list[Line2D] = []
    for server, curve in curves.items():
        steps = curve["steps"]
        if not steps:
            continue
        style = _style(server, "grpc")
        offered = [step["during"]["offered"] / curve["capacity"] for step in steps]
        good = [step["during"]["goodput"] / curve["capacity"] for step in steps]
        handles += goodput.plot(offered, good, label=results.titles.get(server, server), **style)
        back = [min(step["back_after"], 5.0) for step in steps]
        after.plot(offered, back, **style)
    edge = max(overload.FACTORS)
    goodput.plot([0, 1, edge], [0, 1, 1], color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    goodput.annotate("capacity, as a closed loop finds it", (edge, 1.0), fontsize=7, va="top", ha="right")
    goodput.set_title("Overload: answers within 250 ms ÷ capacity (higher is better)", fontsize=10)
    after.set_title("Seconds from the load's end until calls are answered in time again", fontsize=10)
    after.axhline(5.0, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    after.annotate("not within the 5 s looked at", (0.5, 5.0), fontsize=7, va="bottom")
    for axes in (goodput, after):
        axes.set_xlabel("offered load ÷ capacity")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    after.legend(handles=handles, fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _style(server: str, door: str) -> dict[str, Any]:
    mine = server == "ours"
    return {
        "color": _COLOURS.get(server, "#333333"),
        "linestyle": _LINE.get(door, "-"),
        "marker": "o",
        "markersize": 5 if mine else 3.5,
        "linewidth": 2.6 if mine else 1.4,
        "zorder": 3 if mine else 2,
    }


def _axes(axes: Axes, levels: list[float], title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.set_xlabel("requests open at a time")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(_half_decades))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25, which="both")


def _half_decades(value: float, _: object) -> str:
    """A name for 2 and 5 between the powers of ten."""
    lead = round(value / 10 ** math.floor(math.log10(value)))
    return _plain(value) if lead in (2, 5) else ""


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.1g}"
