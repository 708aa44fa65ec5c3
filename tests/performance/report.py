"""The table of a run, as text and as Markdown: figures, then ratios to Triton, then what was required."""

from __future__ import annotations

import math
from collections.abc import Sequence

from performance import overload, scaling
from performance.results import CLOSED, OPEN, Record, Results
from performance.workloads import WORKLOADS

BASELINE = "triton"
OURS = "ours"
# A server without gRPC is compared with what is nearest to what it has.
_NEAREST = {
    "grpc": ("grpc", "http", "wrk"),
    "h2load": ("grpc",),
    "http": ("http", "wrk"),
    "wrk": ("wrk", "http", "grpc"),
}
_TIE = 0.10
_CORES_FOR_GATEWAYS = 8

Row = list[str]


def text(results: Results) -> str:
    """All tables, aligned for a terminal."""
    parts = [_heading(results)]
    for title, rows in tables(results):
        parts.append(f"{title}\n{_aligned(rows)}")
    return "\n\n".join((*parts, *_notes(results))) + "\n"


def markdown(results: Results) -> str:
    """All tables in Markdown."""
    parts = [_heading(results)]
    for title, rows in tables(results):
        head, *body = rows
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)]), *(_line(row) for row in body)]
        parts.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join((*parts, *_notes(results))) + "\n"


def tables(results: Results) -> list[tuple[str, list[Row]]]:
    """Title and rows, the first being the head."""
    found = []
    for key, workload in WORKLOADS.items():
        for mode in (CLOSED, OPEN):
            series = results.series(key, mode)
            if series:
                title = f"{workload.title}, {mode} loop"
                found.append((f"{title}: answers/s (p50/p99 ms)", _figures(results, series, mode)))
                ratios = _ratios(results, series, mode)
                if len(ratios) > 1:
                    found.append((f"{title}: × Triton, throughput (p99)", ratios))
    if results.experiments.get(overload.NAME):
        title = "Overload (20 ms model, 250 ms deadline): answers in time ÷ capacity at each offered load"
        found.append((title, _overload(results)))
    if results.experiments.get(scaling.NAME):
        found.append(("Two of ours beside one", _scaling(results)))
    if results.starts:
        found.append(("Start and idle memory", _starts(results)))
    return found


def _levels(series: dict[tuple[str, str], dict[float, Record]]) -> list[float]:
    return sorted({level for points in series.values() for level in points})


def _label(mode: str, level: float) -> str:
    return f"c={level:g}" if mode == CLOSED else f"{level:g}/s"


def _figures(results: Results, series: dict[tuple[str, str], dict[float, Record]], mode: str) -> list[Row]:
    levels = _levels(series)
    rows = [["server", "door", *(_label(mode, level) for level in levels), "CPU-s/1k", "PSS MiB", "errors"]]
    for (server, door), points in series.items():
        cells = [_figure(points.get(level)) for level in levels]
        good = [record for record in points.values() if not record.failure]
        cpu = f"{_typical(good).cpu_per_1k:.2f}" if good else "–"
        pss = f"{max(record.pss_mib for record in good):.0f}" if good else "–"
        errors = str(sum(record.errors for record in good)) if good else "–"
        rows.append([results.titles.get(server, server), door, *cells, cpu, pss, errors])
    if any(key[0] == OURS for key in series) and results.ideal and mode == CLOSED:
        ideal = ", ".join(f"batch {rows}: {results.direct(rows):.0f}" for rows in results.ideal[0])
        if next(iter(next(iter(series.values())).values())).workload == "w2":
            rows.append(["torch called directly", ideal, *[""] * (len(levels) + 3)])
    return rows


def _typical(records: Sequence[Record]) -> Record:
    """The point at 64, where all are busy and none drowns; else the last."""
    return next((record for record in records if record.level == 64), records[-1])


def _figure(record: Record | None) -> str:
    if record is None:
        return ""
    if record.failure:
        return "failed"
    return f"{record.rate:.0f} ({_short(record.p50)}/{_short(record.p99)})"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 1 else f"{milliseconds:.3g}"


def baseline(results: Results, workload: str, mode: str, door: str) -> dict[float, Record]:
    """Triton's points at the same door, or the nearest that it was measured at."""
    series = results.series(workload, mode)
    for name in _NEAREST.get(door, (door,)):
        if (BASELINE, name) in series:
            return series[BASELINE, name]
    return {}


def _ratios(results: Results, series: dict[tuple[str, str], dict[float, Record]], mode: str) -> list[Row]:
    levels = _levels(series)
    rows = [["server", "door", *(_label(mode, level) for level in levels), "CPU-s/1k"]]
    for (server, door), points in series.items():
        workload = next(iter(points.values())).workload
        base = baseline(results, workload, mode, door)
        if not base or server == BASELINE:
            continue
        cells = [_ratio(points.get(level), base.get(level)) for level in levels]
        good = [
            r for level, r in points.items() if not r.failure and level in base and not base[level].failure
        ]
        cpu = ""
        if good:
            one = _typical(good)
            cpu = f"{one.cpu_per_1k / base[one.level].cpu_per_1k:.2f}×"
        rows.append([results.titles.get(server, server), door, *cells, cpu])
    return rows


def _ratio(record: Record | None, base: Record | None) -> str:
    if record is None or base is None or record.failure or base.failure or not base.rate or not base.p99:
        return ""
    return f"{record.rate / base.rate:.2f}× ({record.p99 / base.p99:.2f}×)"


def _starts(results: Results) -> list[Row]:
    rows = [["server", "first answer s", "idle PSS MiB"]]
    by_server: dict[str, list[tuple[float, float]]] = {}
    for start in results.starts:
        by_server.setdefault(start.server, []).append((start.seconds, start.idle_mib))
    for server, found in by_server.items():
        seconds, idle = (sorted(column)[len(found) // 2] for column in zip(*found, strict=True))
        rows.append([results.titles.get(server, server), f"{seconds:.1f}", f"{idle:.0f}"])
    return rows


def _overload(results: Results) -> list[Row]:
    rows = [
        [
            *("server", "capacity/s", *(f"{factor:g}×" for factor in overload.FACTORS)),
            *("refused at 2×", "in ms (p50)", "back after s", "remark"),
        ]
    ]
    for server, curve in results.experiments[overload.NAME].items():
        by_factor = {step["factor"]: step for step in curve["steps"]}
        cells = [
            f"{by_factor[factor]['during']['goodput'] / curve['capacity']:.2f}" if factor in by_factor else ""
            for factor in overload.FACTORS
        ]
        last = curve["steps"][-1]
        during = last["during"]
        refused = f"{during['refused'] / during['offered']:.0%}"
        name = results.titles.get(server, server)
        quick = f"{during['refusal_p50']:.1f}" if during["refused"] else "–"
        back = f"{last['back_after']:.2f}" if math.isfinite(last["back_after"]) else "not in 5"
        rows.append([name, f"{curve['capacity']:.0f}", *cells, refused, quick, back, curve["note"]])
    return rows


def _scaling(results: Results) -> list[Row]:
    rows = [["of", "one", "two", "ratio"]]
    for name, found in results.experiments[scaling.NAME].items():
        rows.append([name, f"{found['one']:.0f}/s", f"{found['two']:.0f}/s", f"{found['ratio']:.2f}×"])
    return rows


def verdicts(results: Results) -> list[tuple[str, float, float, bool]]:
    """What is required of us, as (sentence, measured, wanted, held); a tie (10 %) with a peer holds."""
    return [
        *_against_triton(results),
        *_against_mosec(results),
        *_against_ideal(results),
        *_under_overload(results),
        *_by_numbers(results),
    ]


def _against_triton(results: Results) -> list[tuple[str, float, float, bool]]:
    found = []
    for key, doors in (("w1", ("grpc", "http")), ("w2", ("grpc",))):
        series = results.series(key, CLOSED)
        for door in doors:
            mine, theirs = series.get((OURS, door), {}), series.get((BASELINE, door), {})
            for level in sorted(mine.keys() & theirs.keys()):
                a, b = mine[level], theirs[level]
                if a.failure or b.failure:
                    continue
                what = f"{key.upper()} {door} c={level:g}"
                if level == 1:
                    if (key, door) == ("w1", "grpc"):
                        found.append(_at_most(f"{what}: p50 ÷ Triton's", a.p50 / b.p50, 2.0))
                    continue
                found.append(_at_least(f"{what}: throughput ÷ Triton's", a.rate / b.rate, 1.0))
                if door == "grpc":
                    found.append(_at_most(f"{what}: p99 ÷ Triton's", a.p99 / b.p99, 1.0))
            if key == "w1" and 64 in mine and not mine[64].failure:
                found.append(_at_most(f"W1 {door} c=64: CPU-s per 1,000", mine[64].cpu_per_1k, 0.20))
    return found


def _against_mosec(results: Results) -> list[tuple[str, float, float, bool]]:
    found = []
    series = results.series("w2", CLOSED)
    mine, theirs = series.get((OURS, "grpc"), {}), series.get(("mosec", "wrk"), {})
    for level in sorted(mine.keys() & theirs.keys() - {1.0}):
        a, b = mine[level], theirs[level]
        if not a.failure and not b.failure:
            what = f"W2 grpc c={level:g}"
            found.append(_at_least(f"{what}: throughput ÷ Mosec's", a.rate / b.rate, 1.0))
            found.append(_at_most(f"{what}: p99 ÷ Mosec's", a.p99 / b.p99, 1.0))
    return found


def _under_overload(results: Results) -> list[tuple[str, float, float, bool]]:
    curve = results.experiments.get(overload.NAME, {}).get(OURS)
    steps = [step for step in curve["steps"] if step["factor"] == max(overload.FACTORS)] if curve else []
    found = []
    for step in steps:
        share = step["during"]["goodput"] / curve["capacity"]
        found.append(("Overload 2×: goodput ÷ capacity", share, 0.90, share >= 0.90))
        refusal = step["during"]["refusal_p50"]
        found.append(("Overload 2×: median refusal, ms", refusal, 20.0, refusal < 20.0))
        back = step["back_after"]
        found.append(("Overload 2×: back to normal, s after its end", back, 2.0, back <= 2.0))
    return found


def _by_numbers(results: Results) -> list[tuple[str, float, float, bool]]:
    found = []
    for name, measured in results.experiments.get(scaling.NAME, {}).items():
        wanted = {"replicas": 1.8, "gateways": 1.6}[name]
        # A second gateway needs processors of its own, beside the load generator's.
        if name == "replicas" or results.machine["cores"] >= _CORES_FOR_GATEWAYS:
            ratio = measured["ratio"]
            found.append((f"Two {name} ÷ one", ratio, wanted, ratio >= wanted))
    return found


def _against_ideal(results: Results) -> list[tuple[str, float, float, bool]]:
    found = []
    mine = results.series("w2", CLOSED).get((OURS, "grpc"), {})
    for level, rows, wanted in ((16, 16, 0.90), (64, 32, 0.95), (256, 32, 0.95)):
        ideal = results.direct(rows)
        if level in mine and not mine[level].failure and not math.isnan(ideal):
            share = mine[level].rate / ideal
            sentence = f"W2 grpc c={level}: share of torch called directly at batch {rows}"
            found.append((sentence, share, wanted, share >= wanted))
    return found


def _at_least(sentence: str, measured: float, wanted: float) -> tuple[str, float, float, bool]:
    return sentence, measured, wanted, measured >= wanted * (1 - _TIE)


def _at_most(sentence: str, measured: float, wanted: float) -> tuple[str, float, float, bool]:
    return sentence, measured, wanted, measured <= wanted * (1 + _TIE)


def _heading(results: Results) -> str:
    m = results.machine
    changed = f" with {m['changed_files']} changed files" if m.get("changed_files") else ""
    return (
        f"{m['cores']} cores, {m['cpu']}, {m['memory_gib']} GiB; load before {m['load_before']:.1f}; "
        f"commit {m['commit']}{changed}; {m['time']}\n"
        f"{results.options.get('seconds')} s a point, {results.options.get('rounds')} starts of each server; "
        "client and server share the machine. Differences under 10 % are ties."
    )


def _notes(results: Results) -> list[str]:
    notes = [f"{results.titles.get(name, name)}: {why}" for name, why in results.absent.items()]
    notes += [
        f"{r.workload} {r.server} {r.door} {_label(r.mode, r.level)}: {r.failure}"
        for r in results.records
        if r.failure
    ]
    parts = ["Left out:\n" + "\n".join(f"- {note}" for note in notes)] if notes else []
    required = verdicts(results)
    if required:
        lines = [
            f"- {'held ' if held else 'SHORT'} {sentence}: {measured:.2f} (wanted {wanted:.2f})"
            for sentence, measured, wanted, held in required
        ]
        parts.append("Required of ours (a tie holds):\n" + "\n".join(lines))
    return parts


def _aligned(rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # A long last word in the second column of a lone row would push all others away.
    widths[1] = max(len(row[1]) for row in rows if len(row[1]) <= 12)
    lines = []
    for row in rows:
        first = f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}"
        lines.append(
            "  ".join((first, *(f"{cell:>{w}}" for cell, w in zip(row[2:], widths[2:], strict=True))))
        )
    return "\n".join(line.rstrip() for line in lines)


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"
