"""The agent's end of the fork server: starts it, asks it for processes, starts it again if it dies."""

from __future__ import annotations

import array
import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from penstock_kit.errors import Unavailable
from penstock_kit.lifecycle import TaskSet
from penstock_worker.adapters.forkserver import wire
from penstock_worker.adapters.forkserver.process import DEATH_SECONDS, ForkedProcess
from penstock_worker.domain.replica import ReplicaConfig
from penstock_worker.domain.supervision import ProcessExit

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
WARM_SECONDS = 120.0
"""Importing torch from a cold disk takes tens of seconds."""
FORK_SECONDS = 30.0

# Libraries read these when they are imported: a pool of threads made before a fork is lost in the child.
# onnxruntime's wheel starts a thread that sends telemetry to its maker unless told not to.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ORT_DISABLE_TELEMETRY": "1",
    # GPUs are counted as NVML counts them.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


class LogFiles(Protocol):
    """Where the output of processes goes."""

    def open(self, replica: str) -> int:
        """Return a file descriptor to append to; the caller closes it."""


class ForkServer:
    """Keeps one fork server running and starts processes through it.

    Args:
        entry: What a process runs, "package.module:function".
        preload: Modules it imports before it forks.
        logs: Where processes write their output.
        grace_seconds: How long processes may go on when this agent dies.
        on_change: Called when it becomes ready or dies.
        held_fds: Returns file descriptors that it keeps open for as long as it lives.
        search_path: Folders put before the module search path of the processes.
    """

    def __init__(
        self,
        *,
        entry: str,
        preload: Sequence[str],
        logs: LogFiles,
        grace_seconds: float = 5.0,
        on_change: Callable[[], None] = lambda: None,
        held_fds: Callable[[], Sequence[int]] = tuple,
        search_path: Sequence[str] = (),
    ) -> None:
        self.preloaded: dict[str, str] = {}
        self._entry = entry
        self._preload = preload
        self._logs = logs
        self._grace_seconds = grace_seconds
        self._on_change = on_change
        self._held_fds = held_fds
        self._search_path = search_path
        self._tasks = TaskSet()
        self._ready = asyncio.Event()
        self._sending = asyncio.Lock()
        self._connection: socket.socket | None = None
        self._processes: dict[str, ForkedProcess] = {}

    @property
    def ready(self) -> bool:
        """Whether a process could be started now."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Begin to start the server; processes can be asked for at once, and wait until it is warm."""
        self._tasks.run_forever("fork server", self._live)

    async def stop(self) -> None:
        """End the server, and with it all processes that still run."""
        await self._tasks.stop()

    async def start_process(
        self,
        config: ReplicaConfig,
        *,
        title: str,
        environment: Mapping[str, str],
        on_change: Callable[[], None],
        rlimits: Mapping[str, int] | None = None,
    ) -> ForkedProcess:
        """Start a process. See `penstock_worker.usecases.ports.ProcessHost`.

        Args:
            config: What it serves; its consumer name must be new.
            title: Name in process lists; 15 bytes of it are shown.
            environment: Variables set in it.
            on_change: Called when its status or exit changes.
            rlimits: Limits by their names in `resource`, without RLIMIT_: {"NOFILE": 4096}.

        Raises:
            Unavailable: The server is not ready in time, or cannot fork.
        """
        await self._until_ready()
        try:
            log_fd = self._logs.open(config.replica)
        except OSError as error:
            raise Unavailable(f"The log of the replica cannot be written: {error.strerror}.") from error
        message = {
            "op": "fork",
            "id": config.consumer,
            "config": config.to_json(),
            "title": title,
            "env": dict(environment),
            "rlimits": dict(rlimits or {}),
        }
        return await self._fork(message, log_fd, on_change)

    async def start_program(
        self,
        name: str,
        entry: str,
        config: str,
        *,
        log: Path,
        title: str,
        environment: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> ForkedProcess:
        """Start a process that is no replica.

        Args:
            name: Its name, never used before.
            entry: What it runs, "package.module:function"; called with `config` and a descriptor to close.
            config: Passed on as it is.
            log: Its output is appended to this file.
            title: Name in process lists; 15 bytes of it are shown.
            environment: Variables set in it.
            on_change: Called when it has ended.

        Raises:
            Unavailable: The server is not ready in time, or cannot fork.
        """
        await self._until_ready()
        try:
            log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise Unavailable(f"The log {log} cannot be written: {error.strerror}.") from error
        message = {
            "op": "fork",
            "id": name,
            "entry": entry,
            "config": config,
            "title": title,
            "env": dict(environment),
            "rlimits": {},
        }
        return await self._fork(message, log_fd, on_change)

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(WARM_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            raise Unavailable(
                f"The fork server was not ready within {WARM_SECONDS:.0f} s; the agent's log says why."
            ) from None

    async def _fork(self, message: wire.Message, log_fd: int, on_change: Callable[[], None]) -> ForkedProcess:
        """Have a process forked; `log_fd` is closed here."""
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        process = ForkedProcess(message["id"], status_read, self.signal, on_change)
        self._processes[message["id"]] = process
        try:
            # Not wait_for: before Python 3.12 it may return although it was cancelled, and whoever was
            # cancelled does not end the process.
            async with asyncio.timeout(FORK_SECONDS):
                await self._send(message, (status_write, log_fd))
                await asyncio.shield(process.started)
        except TimeoutError:
            self._abandon(process)
            raise Unavailable(f"The fork server did not fork within {FORK_SECONDS:.0f} s.") from None
        except asyncio.CancelledError:
            self._abandon(process)
            raise
        return process

    async def signal(self, consumer: str, number: int) -> None:
        """Send a signal to a process."""
        await self._send({"op": "signal", "id": consumer, "signal": int(number)})

    def _abandon(self, process: ForkedProcess) -> None:
        """Nobody waits for the process any more: it must not live."""
        # Messages are handled in order, so the signal finds the process if it was ever forked.
        self._tasks.spawn("end an abandoned process", self.signal(process.consumer, signal.SIGKILL))

    async def _send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """Send one message and close the descriptors that went with it.

        A server that is gone is not an error here: its processes are told anyway. Whoever is cancelled
        while waiting leaves the message to be sent all the same, because half a frame would end the stream.
        """
        await asyncio.shield(self._tasks.spawn(f"send {message['op']}", self._write(message, fds)))

    async def _write(self, message: wire.Message, fds: Sequence[int]) -> None:
        try:
            frame = wire.pack(message)
            async with self._sending:
                connection = self._connection
                if connection is None:
                    self._fail(message, "the fork server is gone")
                    return
                sent = await _send_fds(connection, frame, fds) if fds else 0
                await asyncio.get_running_loop().sock_sendall(connection, frame[sent:])
        except (OSError, ValueError) as error:
            self._fail(message, str(error))
        finally:
            for fd in fds:
                os.close(fd)

    def _fail(self, message: wire.Message, error: str) -> None:
        if message["op"] == "fork":
            process = self._processes.pop(message["id"], None)
            if process is not None:
                process.refused(error)

    async def _live(self) -> None:
        """One life of the server: from its start until it is gone, with all its processes."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        server = self._spawn(theirs)
        try:
            self._connection = ours
            await self._read(ours, server)
            log.warning("the fork server is gone", extra={"pid": server.pid})
        finally:
            self._connection = None
            self._ready.clear()
            ours.close()
            await asyncio.shield(self._bury(server))
            self._on_change()

    async def _read(self, connection: socket.socket, server: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        unpacker = wire.Unpacker()
        while True:
            try:
                data = await loop.sock_recv(connection, READ_BYTES)
            except ConnectionError:
                return
            if not data:
                return
            for message in unpacker.feed(data):
                self._take(message, server)

    def _take(self, message: wire.Message, server: subprocess.Popen[bytes]) -> None:
        match message["op"]:
            case "ready":
                self.preloaded = message["preloaded"]
                log.info(
                    "fork server is ready",
                    extra={
                        "pid": server.pid,
                        "seconds": message["seconds"],
                        "threads": message["threads"],
                        "missing": {name: error for name, error in self.preloaded.items() if error},
                    },
                )
                self._ready.set()
                self._on_change()
            case "warm":
                self.preloaded = message["preloaded"]
                log.info("fork server is warm", extra={"pid": server.pid, "seconds": message["seconds"]})
                self._on_change()
            case "started":
                self._processes[message["id"]].has_started(message["pid"])
            case "refused":
                self._processes.pop(message["id"]).refused(message["error"])
            case "exited":
                how = ProcessExit(message["status"], message["signal"], message["peak_memory_bytes"])
                self._processes.pop(message["id"]).has_ended(how)

    async def _bury(self, server: subprocess.Popen[bytes]) -> None:
        """Wait until the server and all its processes are dead; tell those who wait for them."""
        if not self._processes:
            server.kill()  # While it imports or warms up it would notice our end late, and nobody needs it.
        try:
            await asyncio.to_thread(server.wait, self._grace_seconds + DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            await asyncio.to_thread(server.wait)
        for consumer, process in list(self._processes.items()):
            if not await process.kill_orphan():
                log.error("a replica process does not die", extra={"pid": process.pid})
            del self._processes[consumer]
            process.refused("the fork server is gone")
            process.has_ended(ProcessExit(status=None, signal=None, lost=True))

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        with theirs:
            return subprocess.Popen(  # noqa: S603 - our own module, no shell
                self._command(theirs.fileno()),
                pass_fds=(theirs.fileno(), *self._held_fds()),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=self._environment(),
            )

    def _command(self, fd: int) -> list[str]:
        command = [sys.executable, "-m", "penstock_worker.adapters.forkserver.server"]
        command += ["--fd", str(fd), "--entry", self._entry, "--grace-seconds", str(self._grace_seconds)]
        for name in self._preload:
            command += ["--preload", name]
        for held in self._held_fds():
            command += ["--hold-fd", str(held)]
        return command

    def _environment(self) -> dict[str, str]:
        # Replicas get what they need in their configuration; the mesh's addresses and secrets are not theirs.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        kept |= ENVIRONMENT
        path = [*self._search_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        if path:
            kept["PYTHONPATH"] = os.pathsep.join(path)
        return kept


async def _send_fds(connection: socket.socket, frame: bytes, fds: Sequence[int]) -> int:
    """Send descriptors with the beginning of a frame; return how much of the frame went with them."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    while True:
        try:
            return connection.sendmsg([frame], [rights])
        except BlockingIOError:
            await _writable(connection)


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def writable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(connection, writable)
    try:
        await ready
    finally:
        loop.remove_writer(connection)
