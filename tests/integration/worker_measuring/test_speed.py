"""Versions are timed in turns."""

from __future__ import annotations

from pathlib import Path

from penstock_worker.adapters.measuring import drawn_inputs, measure_speed, open_version
from support.models import build_echo_onnx, build_python

SLOW = (
    "import time\n\n\nclass Model:\n    def predict(self, inputs):\n"
    '        time.sleep(0.0005 * len(inputs["x"]))\n        return {"y": inputs["x"]}\n'
)


def test_a_version_that_takes_its_time_by_the_row_has_that_in_its_figures(tmp_path: Path) -> None:
    slow, echo = build_python(tmp_path / "slow", SLOW), build_echo_onnx(tmp_path / "echo")
    told: list[tuple[int, int]] = []
    with (
        open_version(tmp_path / "slow", slow, allow_python_runtime=True) as first,
        open_version(tmp_path / "echo", echo) as second,
    ):
        found = measure_speed(
            [first, second],
            [8, 1],
            lambda version, rows: drawn_inputs(version.signature, rows),
            seconds=0.05,
            progress=lambda done, total: told.append((done, total)),
        )
    one, eight = found.speeds[0]
    assert (one.batch_size, eight.batch_size) == (1, 8)
    # It sleeps, so it cannot be faster, however busy the machine is.
    assert one.p50_seconds >= 0.0005
    assert 0.004 <= eight.p50_seconds <= eight.p99_seconds
    assert eight.rows_per_second <= 2000
    assert eight.calls >= 5
    assert found.comparisons[0][1].low <= found.comparisons[0][1].ratio <= found.comparisons[0][1].high
    assert found.best_ratio(1) > 1
    assert told[-1] == (2, 2)
