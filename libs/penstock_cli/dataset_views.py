"""A dataset in full, for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from google.protobuf import json_format

from penstock.names import short_artifact
from penstock.registry.v1 import artifact_pb2
from penstock.traffic import counted
from penstock_cli.output import ago, pairs, print_facts, print_table, say, size, state

_BAR_WIDTH = 40
_MOST_CLASSES = 30
_MOST_COLUMNS = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_dataset(artifact: artifact_pb2.Artifact) -> None:
    """Print what a dataset holds, with a bar for each class, or for each range of a number."""
    known: dict[str, Any] = json_format.MessageToDict(artifact.description)
    characters = known.get("characters", {})
    print_facts(
        (
            ("dataset", short_artifact(artifact.name)),
            ("kind", state(artifact_pb2.ArtifactKind, artifact.kind, "ARTIFACT_KIND_").lower()),
            ("state", state(artifact_pb2.ArtifactState, artifact.state, "ARTIFACT_STATE_")),
            ("format", artifact.format),
            ("task", known.get("task", "")),
            ("rows", f"{int(known['rows']):,}" if "rows" in known else ""),
            ("inputs", _inputs(known.get("inputs", {}))),
            ("texts", _lengths(characters)),
            ("label", _label(known)),
            ("licence", known.get("license", "")),
            ("source", known.get("source", "")),
            ("labels", pairs(artifact.labels)),
            ("size", f"{size(artifact.size_bytes)} in {counted(len(artifact.files), 'file')}"),
            ("digest", artifact.digest),
            ("made by", artifact.job),
            ("pushed", " by ".join(filter(None, (ago(artifact.create_time), artifact.created_by)))),
        )
    )
    columns = known.get("columns", [])
    if len(columns) > 2:
        say("")
        print_table(
            ("COLUMN", "TYPE", "SHAPE"),
            [
                (
                    column["name"],
                    column["dtype"],
                    "×".join(str(int(side)) for side in column.get("shape", [])),
                )
                for column in columns[:_MOST_COLUMNS]
            ],
            empty="",
        )
        total = int(known.get("columns_total", len(columns)))
        if total > _MOST_COLUMNS:
            say(f"… and {total - _MOST_COLUMNS} more")
    if "class_counts" in known:
        say("")
        _print_bars("CLASS", known["classes"], [int(count) for count in known["class_counts"]])
    elif "histogram" in known:
        edges = known["histogram"]["edges"]
        ranges = [f"{low:.4g} … {high:.4g}" for low, high in pairwise(edges)]
        say("")
        _print_bars(
            str(known.get("label", "")).upper(), ranges, [int(n) for n in known["histogram"]["counts"]]
        )


def bar(part: float) -> str:
    """Return a bar for 0 ≤ part ≤ 1, in eighths of a character."""
    eighths = round(part * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _print_bars(heading: str, names: Sequence[str], counts: Sequence[int]) -> None:
    most = max(max(counts), 1)
    rows = [(name, f"{count:,}", bar(count / most)) for name, count in zip(names, counts, strict=False)]
    print_table((heading, "ROWS#", ""), rows[:_MOST_CLASSES], empty="")
    if len(rows) > _MOST_CLASSES:
        say(f"… and {len(rows) - _MOST_CLASSES} more")


def _inputs(inputs: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} [{', '.join(str(int(side)) for side in shape)}]" for name, shape in inputs.items()
    )


def _label(known: dict[str, Any]) -> str:
    if not known.get("label"):
        return ""
    classes = known.get("classes", [])
    return f"{known['label']} ({len(classes)} classes)" if classes else f"{known['label']} (a number)"


def _lengths(characters: dict[str, Any]) -> str:
    if not characters:
        return ""
    return f"{characters['median']:,.0f} characters in the middle, {characters['most']:,.0f} at most"
