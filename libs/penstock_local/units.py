"""The two kinds of process that a supervisor keeps alive: a service, and an embedded server."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from penstock_kit.threads import in_thread
from penstock_local.embedded.process import EmbeddedServer
from penstock_local.errors import ServerFailed
from penstock_local.health import Health
from penstock_local.spawn import spawn
from penstock_local.state import UnitRecord

_KILL_SECONDS = 5.0
_TAIL_BYTES = 64 * 1024


class UnitState(StrEnum):
    """STOPPED → STARTING → HEALTHY; an end leads to WAITING (back-off), and from there to STARTING again."""

    STOPPED = "stopped"
    STARTING = "starting"
    HEALTHY = "healthy"
    WAITING = "waiting"


@dataclass(frozen=True)
class ServiceSpec:
    """A service process.

    Attributes:
        name: Unique in the mesh; also the name of its log file.
        argv: The program, by absolute path, and its arguments.
        env: What is added to this process's environment.
        health: How to ask whether it serves.
        address: Where it listens, for people.
        tier: Units of a higher tier are stopped first.
        metrics: Where its metrics are, if that is known before it starts: a URL.
        metrics_file: Where it writes the host:port of its metrics down, if that is known only then.
        stop_seconds: How long it may take to stop after SIGTERM before SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    health: Health = field(default_factory=Health)
    address: str = ""
    tier: int = 1
    metrics: str = ""
    metrics_file: Path | None = None
    stop_seconds: float = 20.0


class Unit(ABC):
    """One process that is kept alive. Starting and stopping must not overlap: the supervisor sees to it."""

    def __init__(self, name: str, address: str, health: Health, tier: int, log_path: Path) -> None:
        self.name = name
        self.address = address
        self.health = health
        self.tier = tier
        self.log_path = log_path
        self._log_begin = log_path.stat().st_size if log_path.exists() else 0
        self.state = UnitState.STOPPED
        self.was_healthy = False
        self.restarts = 0
        self.since = time.time()

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The process id while it runs."""

    @abstractmethod
    async def start(self) -> None:
        """Start the process, unless it runs; it need not be healthy yet.

        Raises:
            LocalError: It cannot be started.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Stop the process, hard if it does not stop by itself in time. Nothing if it does not run."""

    async def ended(self) -> str:
        """Wait until the process ends; say how, in words."""
        pid = self.pid
        if pid is not None:
            # A pidfd names the process even if it ends now, and the child is reaped only by `_status`.
            with contextlib.suppress(ProcessLookupError):
                await _readable(os.pidfd_open(pid))
        return self._status()

    @abstractmethod
    def _status(self) -> str:
        """How the process ended."""

    def record(self) -> UnitRecord:
        """What `status` is told about it."""
        return UnitRecord(
            self.name,
            self.address,
            self.health,
            self.state,
            self.pid,
            self.restarts,
            self.since,
            str(self.log_path),
            self.metrics,
        )

    @property
    def metrics(self) -> str:
        """URL of its metrics; empty if it has none now."""
        return ""

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that it logged since this object was made."""
        try:
            size = self.log_path.stat().st_size
            with self.log_path.open("rb") as log:
                log.seek(max(size - _TAIL_BYTES, self._log_begin if size >= self._log_begin else 0))
                text = log.read().decode(errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"


class ServiceUnit(Unit):
    """A process of ours, the leader of its own session, with stdout and stderr in a log file."""

    def __init__(self, spec: ServiceSpec, log_dir: Path) -> None:
        super().__init__(spec.name, spec.address, spec.health, spec.tier, log_dir / f"{spec.name}.log")
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def metrics(self) -> str:
        """URL of its metrics; empty if it has none now."""
        if self._spec.metrics_file is None:
            return self._spec.metrics
        try:
            return f"http://{self._spec.metrics_file.read_text()}/metrics"
        except OSError:
            return ""

    async def start(self) -> None:
        """Start the process."""

        def start() -> subprocess.Popen[bytes]:
            with self.log_path.open("ab") as log:
                return spawn(self._spec.argv, output=log, env={**os.environ, **self._spec.env})

        if self._process is not None:
            return
        if self._spec.metrics_file is not None:  # one that was killed leaves an address that others may get
            self._spec.metrics_file.unlink(missing_ok=True)
        try:
            self._process = await in_thread(start)
        except OSError as error:
            raise ServerFailed(f"{self.name} could not be started: {error}.") from error

    async def stop(self) -> None:
        """SIGTERM to the service; SIGKILL to it and all in its process group when its time is up."""
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._spec.stop_seconds):
                await self.ended()
        if self._process is not None:
            process.kill()
            async with asyncio.timeout(_KILL_SECONDS):
                await self.ended()

    def _status(self) -> str:
        process, self._process = self._process, None
        if process is None:
            return "was not running"
        # What it left in its group ends with it. Its leader is not reaped yet, so the number is still its.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return describe(process.wait())


class ServerUnit(Unit):
    """An embedded PostgreSQL or Redis."""

    def __init__(self, server: EmbeddedServer, health: Health) -> None:
        super().__init__(server.name, f"unix:{server.socket_path}", health, tier=0, log_path=server.log_path)
        self._server = server

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._server.pid if self._server.running else None

    async def start(self) -> None:
        """Start the server and wait until it is ready."""
        if not self._server.running:
            await in_thread(self._server.start)

    async def stop(self) -> None:
        """Stop the server cleanly."""
        await in_thread(self._server.stop)

    def _status(self) -> str:
        status = self._server.exit_status
        return "was not running" if status is None else describe(status)


def python(module: str) -> tuple[str, ...]:
    """The command that runs a module with this interpreter."""
    return (sys.executable, "-m", module)


def describe(status: int) -> str:
    """A return code of subprocess, in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor can be read, and close it."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(descriptor, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
