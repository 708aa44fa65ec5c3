"""A server's whole process tree: found, weighed and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
# A sample reads /proc of every process of this machine: about 10 ms.
_SAMPLE_SECONDS = 0.25
# A load generator starts, asks for the model's metadata, and in the end writes its report.
_BEFORE_SECONDS = 0.75
_AFTER_SECONDS = 0.25


class Tree:
    """Every process of a server: those with its mark in their environment, and all that these started.

    Both ways are needed: daemons lose their parent, and programs that rewrite their title (Ray) lose
    their environment.

    Args:
        variable: Environment variable that the server was started with.
        value: What it holds, for this server alone.
    """

    def __init__(self, variable: str, value: str) -> None:
        self.environment = {variable: value}
        self._mark = f"{variable}={value}".encode()
        # Processor time by (pid, start): a process that ended keeps what it used, as far as it was seen.
        self._ticks: dict[tuple[int, int], int] = {}

    def pids(self) -> list[int]:
        """Process ids of all that live, zombies not counted."""
        return [pid for pid, _ in self._look()]

    def cpu_seconds(self) -> float:
        """Processor time (user and system) that the tree used so far."""
        self._look()
        return sum(self._ticks.values()) / _TICKS

    def pss_mib(self) -> float:
        """Proportional memory of the tree in MiB: shared pages count once over those that share them."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in (_PROC / f"{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        return total / 1024

    def end(self, seconds: float = 10.0) -> None:
        """SIGTERM to all, SIGKILL to what stays; waits until none lives.

        Raises:
            RuntimeError: Something cannot be killed.
        """
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, seconds)):
            deadline = time.monotonic() + patience
            told: set[int] = set()
            while pids := self.pids():
                # What a dying process starts meanwhile is told too.
                for pid in set(pids) - told:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                told.update(pids)
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"these do not end: {self.pids()}")

    def _look(self) -> list[tuple[int, int]]:
        parents: dict[tuple[int, int], int] = {}
        ticks: dict[tuple[int, int], int] = {}
        members: set[tuple[int, int]] = set()
        by_pid: dict[int, tuple[int, int]] = {}
        for folder in _PROC.iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                # The name may hold blanks and parentheses; the fields follow the last one.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] in "ZX":
                    continue
                key = (int(folder.name), int(fields[19]))
                parents[key], ticks[key] = int(fields[1]), int(fields[11]) + int(fields[12])
                by_pid[key[0]] = key
                if key in self._ticks or self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    members.add(key)
        grown = True
        while grown:
            grown = False
            for key, parent in parents.items():
                if key not in members and by_pid.get(parent) in members:
                    members.add(key)
                    grown = True
        self._ticks.update({key: ticks[key] for key in members})
        return sorted(members)


class CpuMeter:
    """How much processor time a tree uses per second, seen while a load runs."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._samples: list[tuple[float, float]] = []
        self._done = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Sample while the body runs."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            self._samples.append((time.monotonic(), self._tree.cpu_seconds()))

    def cores(self) -> float:
        """Processor seconds per second, without the generator's own first and last moments."""
        begin, end = self._samples[0][0] + _BEFORE_SECONDS, self._samples[-1][0] - _AFTER_SECONDS
        inner = [sample for sample in self._samples if begin <= sample[0] <= end]
        if len(inner) < 2:
            return float("nan")
        return (inner[-1][1] - inner[0][1]) / (inner[-1][0] - inner[0][0])

    def total(self) -> float:
        """Processor seconds from begin to end."""
        return self._samples[-1][1] - self._samples[0][1]

    def _run(self) -> None:
        while True:
            self._samples.append((time.monotonic(), self._tree.cpu_seconds()))
            if self._done.wait(_SAMPLE_SECONDS):
                return
