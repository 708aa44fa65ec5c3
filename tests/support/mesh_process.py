"""A mesh in a process of its own, as a user starts it, for tests that kill parts of it or all of it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from penstock_local.orphans import marked_processes
from penstock_local.spawn import spawn
from penstock_local.state import MeshRecord, UnitRecord

_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_LOG_LINES = 40


class Mesh:
    """`python -m penstock_local up` in a process of its own.

    Attributes:
        data_dir: Its data directory.
        process: Its supervisor.
        address: host:port of the gateway.
        url: Base URL of the gateway.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        gateways: int = 1,
        workers: int = 1,
        schedulers: int = 1,
        durable: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.output = data_dir.with_suffix(".log")
        self._command = [sys.executable, "-m", "penstock_local", "up", "--port", "0"]
        self._command += [] if durable else ["--not-durable"]
        self._command += ["--data-dir", str(data_dir), "--ready-seconds", str(_START_SECONDS)]
        self._command += ["--gateways", str(gateways), "--workers", str(workers)]
        self._command += ["--schedulers", str(schedulers)]
        # The settings of who runs the tests are not the tests'.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        self._env = {**clean, **(env or {})}
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, again if it was killed, and wait until it is healthy."""
        with self.output.open("ab") as output:
            # It stops if the tests are killed.
            self.process = spawn(self._command, output=output, env=self._env, death_signal=signal.SIGTERM)
        try:
            self.wait(lambda: self.record.state == "running", "the mesh is ready", _START_SECONDS + 10)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.url = self.record.url
        self.address = self.url.removeprefix("http://")

    def runs(self) -> bool:
        """Whether its supervisor lives."""
        return self.process.poll() is None

    @property
    def record(self) -> MeshRecord:
        """What the supervisor wrote down last."""
        assert self.runs(), f"the mesh ended:\n{self.output.read_text()}\n{self.logs()}"
        found = MeshRecord.read(self.data_dir)
        if found is None or found.pid != self.process.pid:  # not written yet, or left by one that was killed
            return MeshRecord(self.process.pid, 0, "starting", "", str(self.data_dir))
        return found

    def unit(self, name: str) -> UnitRecord:
        """One process: postgres, redis, registry, scheduler, worker-1 … or gateway-1 …"""
        return next(unit for unit in self.record.units if unit.name == name)

    def pid(self, name: str) -> int:
        """The process id of a unit that runs."""
        pid = self.unit(name).pid
        assert pid is not None, f"{name} does not run"
        return pid

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a unit; gives the pid that it had."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def wait_restarted(self, name: str, pid: int, seconds: float = 30.0) -> None:
        """Wait until a unit that had this pid is healthy as another process."""
        self.wait(
            lambda: self.unit(name).pid not in (None, pid) and self.unit(name).state == "healthy",
            f"{name} runs again",
            seconds,
        )

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def log(self, name: str) -> str:
        """The whole log of a service."""
        return (self.data_dir / "logs" / f"{name}.log").read_text(errors="replace")

    def logs(self, lines: int = _LOG_LINES) -> str:
        """The ends of all logs."""
        parts = []
        for path in (self.output, *sorted(self.data_dir.glob("logs/*.log"))):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join((f"--- {path.name}", *tail)))
        return "\n".join(parts)

    def crash(self) -> None:
        """Kill -9 the supervisor."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it, and see that nothing is left."""
        if self.runs():
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(_STOP_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
        assert status == 0, f"the mesh ended with status {status}:\n{self.output.read_text()}"
        assert not marked_processes(self.data_dir)
