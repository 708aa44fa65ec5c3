"""The Pareto front of a compression as people see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.errors import InvalidArgument
from penstock_cli.plots import front_rows, front_text, has_front, plot_front, print_front


def candidate(name: str, size: float, speed: float, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "size_bytes": 1e6 * size,
        "size_ratio": size,
        "latency_ms": 1 / speed,
        "rows_per_second": 1000 * speed,
        "speed_up": speed,
        "metric": 0.97 - loss,
        "metric_loss": loss,
        "front": False,
        "passed": False,
        "recommended": False,
        **more,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "kind": "search",
        "metric": "accuracy",
        "candidates": [
            candidate("source", 1, 1, 0, passed=True),
            candidate("prune", 1, 1, 0.01),
            candidate("quantize(scheme=static_int8)", 0.25, 4, 0.002, front=True, passed=True),
            candidate(
                "prune_channels(amount=0.3, repair_epochs=4, learning_rate=0.0005) → quantize",
                0.1,
                9.5,
                -0.001,
                front=True,
                passed=True,
                recommended=True,
            ),
        ],
    }


def test_the_source_comes_first_and_then_what_is_recommended(report: dict[str, Any]) -> None:
    rows = front_rows(report)
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert rows[0].steps == "source"
    assert rows[1].recommended
    assert not rows[3].front


def test_the_table_has_the_front_and_leaves_out_how_long_repairs_were(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_front(report)
    shown = capsys.readouterr().out
    assert "prune_channels(amount=0.3) → quantize" in shown
    assert "9.50×" in shown
    assert "10%" in shown
    assert "-0.0010" in shown
    assert "recommended" in shown
    assert len(shown.splitlines()) == 4
    print_front(report, everything=True)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_plot_in_the_terminal_names_what_it_shows(report: dict[str, Any]) -> None:
    drawn = front_text(report, colour=False)
    assert "\x1b" not in drawn
    assert "recommended" in drawn
    assert "◆" in drawn
    assert "\x1b" in front_text(report)


def test_the_picture_is_of_the_format_that_its_name_says(report: dict[str, Any], tmp_path: Path) -> None:
    svg = plot_front(report, tmp_path / "pareto.svg").read_text()
    assert svg.startswith("<?xml")
    assert "1 recommended" in svg or "<path" in svg
    assert plot_front(report, tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match="svg"):
        plot_front(report, tmp_path / "pareto.docx")


def test_what_is_no_report_of_a_compression_is_refused() -> None:
    assert not has_front({"kind": "profile"})
    assert not has_front({})
    with pytest.raises(InvalidArgument, match="no report of a compression"):
        front_rows({"version": "models/m/versions/1"})
