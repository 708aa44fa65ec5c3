"""Progress of pushes and downloads, shown where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from penstock.transfer import Progress, ProgressCallback
from penstock_cli.output import console

_WORDS = {"check": "Looking through", "hash": "Reading", "upload": "Uploading", "download": "Downloading"}


@contextmanager
def transfer(*, quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """Yield a callback that moves a bar on stderr; None where there is no terminal or it should be quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, console=console(stderr=True), transient=True) as bars:
        tasks = {}

        def show(step: Progress) -> None:
            if step.phase not in tasks:
                tasks[step.phase] = bars.add_task(_WORDS[step.phase], total=step.total_bytes)
            bars.update(tasks[step.phase], completed=step.done_bytes)

        yield show
