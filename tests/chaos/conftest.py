"""What every storm has: a seed that is printed, and a history that is kept if it fails."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos.storm import Storm

_SEED = int(os.environ.get("PENSTOCK_CHAOS_SEED") or random.SystemRandom().randrange(2**32))
_failed = pytest.StashKey[bool]()


def pytest_report_header() -> str:
    """Say how to replay what chance chose."""
    return f"chaos seed: {_SEED} (PENSTOCK_CHAOS_SEED={_SEED} replays its faults and requests)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # pytest's own type of such a wrapper is a generator that returns the report
    report = yield
    if call.when == "call":
        item.stash[_failed] = report.failed  # type: ignore[attr-defined]
    return report  # type: ignore[return-value]


@pytest.fixture
def chaos_seed() -> int:
    """What chance begins with."""
    return _SEED


@pytest.fixture
def storm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Storm]:
    """Runs ordeals; the history of the last one stays if the test fails."""
    path = tmp_path / "history.jsonl"
    yield Storm(path, _SEED, request.node.name)
    if request.node.stash.get(_failed, True):
        print(f"history: {path}")
    else:
        path.unlink(missing_ok=True)
