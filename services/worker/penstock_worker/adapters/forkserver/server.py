"""The fork server's own process: `python -m penstock_worker.adapters.forkserver.server`.

It imports the heavy libraries once and then forks a child per request, so that a child begins with
everything imported: tens of milliseconds instead of seconds, and the pages of the libraries are shared.

What must always hold:

1. It has one thread when it forks. A fork copies only the calling thread, so a lock that another thread
   holds at that moment stays locked in the child for ever. Hence no asyncio, no grpc, and thread pools
   limited to one thread while libraries are imported.
2. Every child dies with it (PR_SET_PDEATHSIG), and it ends when its agent does (end of file on the
   socket), after giving children a bounded time to finish. Nothing is ever served twice or left behind.
3. The end of a child is reported at once, and whatever the child had started in its process group is
   killed before its pid can be used again.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import os
import random
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from typing import NoReturn

from penstock_worker.adapters.forkserver import wire
from penstock_worker.adapters.secrecy import hide_environment
from penstock_worker.domain.replica import ReplicaConfig

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
READ_BYTES = 256 * 1024
# A replica that asks for more memory than there is should die before its agent does.
OOM_SCORE_ADJ = 500
EXIT_UNCAUGHT = 70  # EX_SOFTWARE of sysexits.h

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(slots=True)
class _Child:
    id: str
    pid: int


class ForkServer:
    """The loop of the process.

    Args:
        connection: The agent's socket.
        entry: What a child runs, as "package.module:function"; it takes a ReplicaConfig and returns
            the exit status.
        grace_seconds: How long children may go on after the agent's end.
        held_fds: File descriptors that are kept open, in this process alone, until it ends.
        preloaded: What `preload` returned; those that are imported are still to be warmed up.
    """

    def __init__(
        self,
        connection: socket.socket,
        entry: str,
        grace_seconds: float,
        held_fds: list[int],
        preloaded: dict[str, str],
    ) -> None:
        self._connection = connection
        self._entry = entry
        self._grace_seconds = grace_seconds
        self._held_fds = held_fds
        self._unpacker = wire.Unpacker()
        self._fds: deque[int] = deque()
        self._children: dict[int, _Child] = {}
        self._by_id: dict[str, _Child] = {}
        self._stopping = False
        self._preloaded = preloaded
        self._seconds = 0.0
        self._cold = deque(name for name, error in preloaded.items() if not error)

    def run(self) -> None:
        """Serve until the agent is gone (or SIGTERM), then end the children and return."""
        wake_read, wake_write = socket.socketpair()
        for end in (wake_read, wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._private = (self._connection, wake_read, wake_write)

        deadline = float("inf")
        killed = False
        with selectors.DefaultSelector() as selector:
            self._selector_fd = selector.fileno()
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            while not self._stopping or self._children:
                if self._stopping and deadline == float("inf"):
                    deadline = time.monotonic() + self._grace_seconds
                    with contextlib.suppress(KeyError):
                        selector.unregister(self._connection)
                    self._signal_all(signal.SIGTERM)
                left = deadline - time.monotonic()
                if left <= 0 and not killed:
                    self._signal_all(signal.SIGKILL)
                    killed = True
                patience = None if left == float("inf") else max(left, 0.05)
                found = selector.select(0 if self._cold else patience)
                if self._cold and not found:
                    self._warm_up()
                for key, _ in found:
                    if key.fileobj is wake_read:
                        wake_read.recv(READ_BYTES)
                    elif not self._receive():
                        self._stopping = True
                self._reap()

    def _warm_up(self) -> None:
        """Warm one module up; tell the agent after the last one."""
        name = self._cold.popleft()
        began = time.monotonic()
        self._preloaded[name] = warm_up(name)
        gc.freeze()
        self._seconds += time.monotonic() - began
        if not self._cold:
            self._send({"op": "warm", "seconds": round(self._seconds, 3), "preloaded": self._preloaded})

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _receive(self) -> bool:
        """Take what the agent sent; false when it is gone."""
        try:
            data, ancillary, _flags, _address = self._connection.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(64 * array.array("i").itemsize)
            )
        except ConnectionError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._fds.extend(received)
        if not data:
            return False
        for message in self._unpacker.feed(data):
            if message["op"] == "fork":
                self._fork(message)
            elif message["op"] == "signal":
                self._signal(message["id"], message["signal"])
        return True

    def _send(self, message: wire.Message) -> None:
        try:
            self._connection.sendall(wire.pack(message))
        except OSError:
            self._stopping = True  # The agent is gone.

    def _fork(self, message: wire.Message) -> None:
        status_fd, log_fd = (self._fds.popleft() for _ in range(wire.FDS_PER_FORK))
        while self._cold:  # each child would have to do it by itself, and share none of its pages
            self._warm_up()
        name = message["id"]
        parent = os.getpid()
        # A SIGTERM for the child must wait until the child no longer has the server's handler for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pid = os.fork()
        except OSError as error:
            self._send({"op": "refused", "id": name, "error": f"fork: {error.strerror}"})
            pid = -1
        if pid == 0:
            # Nothing of the server's own may go on in the child, whatever happens in it.
            _run_child(message, self._entry, parent, status_fd, log_fd, self._own_fds())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.close(status_fd)
        os.close(log_fd)
        if pid > 0:
            child = _Child(name, pid)
            self._children[pid] = child
            self._by_id[name] = child
            self._send({"op": "started", "id": name, "pid": pid})

    def _own_fds(self) -> list[int]:
        return [*(end.fileno() for end in self._private), self._selector_fd, *self._fds, *self._held_fds]

    def _signal(self, name: str, number: int) -> None:
        child = self._by_id.get(name)
        if child is None:
            return  # It has ended already, and that was reported.
        _kill(child.pid, number)

    def _signal_all(self, number: int) -> None:
        for child in self._children.values():
            _kill(child.pid, number)

    def _reap(self) -> None:
        """Report every child that has ended."""
        while self._children:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            child = self._children.pop(ended.si_pid, None)
            if child is not None:
                # It is a zombie until wait4: its pid, and so its group's, cannot be another's yet.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
            _, status, usage = os.wait4(ended.si_pid, 0)
            if child is None:
                continue
            del self._by_id[child.id]
            signalled = os.WIFSIGNALED(status)
            self._send(
                {
                    "op": "exited",
                    "id": child.id,
                    "pid": child.pid,
                    "status": None if signalled else os.WEXITSTATUS(status),
                    "signal": os.WTERMSIG(status) if signalled else None,
                    "peak_memory_bytes": usage.ru_maxrss * 1024,
                }
            )


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number == signal.SIGKILL:
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                os.kill(pid, number)  # Between fork and setsid it has no group of its own yet.
        else:
            os.kill(pid, number)


def _run_child(
    message: wire.Message, entry: str, parent: int, status_fd: int, log_fd: int, foreign_fds: list[int]
) -> NoReturn:
    """Become the replica process; never returns into the server's loop."""
    status = EXIT_UNCAUGHT
    try:
        _become_child(message, parent, log_fd, foreign_fds)
        module, _, function = message.get("entry", entry).partition(":")
        run = getattr(importlib.import_module(module), function)
        if "entry" in message:
            status = int(run(message["config"], status_fd))
        else:
            config = dataclasses.replace(ReplicaConfig.from_json(message["config"]), status_fd=status_fd)
            status = int(run(config))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - the end of the process: all that is left is to say why
        traceback.print_exc()
    finally:
        # The server's own atexit handlers and finalizers must not run a second time here.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)


def _become_child(message: wire.Message, parent: int, log_fd: int, foreign_fds: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_UNCAUGHT)  # The server died before the line above: nobody would end us.
    os.setsid()
    _libc.prctl(PR_SET_NAME, message["title"].encode()[:15], 0, 0, 0)
    for fd in foreign_fds:
        os.close(fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(null)
    os.close(log_fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(all_threads=True)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    os.environ.update(message["env"])
    for name, limit in message["rlimits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    # All children would otherwise draw the same random numbers.
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
    gc.enable()


def preload(modules: list[str]) -> dict[str, str]:
    """Import modules; return for each an empty string, or why it could not be imported."""
    results = {}
    for name in modules:
        try:
            importlib.import_module(name)
            results[name] = ""
        except Exception as error:  # noqa: BLE001 - a broken library must not keep the others from serving
            results[name] = f"{type(error).__name__}: {error}"
    return results


def warm_up(name: str) -> str:
    """Warm an imported module up; return an empty string, or why it failed.

    A module may have a function `warm_up` that does more than importing it must: it loads a tiny model, so
    that the first real one is fast, or a library that takes seconds. It runs after the agent was told that
    this is ready, and before the first fork.
    """
    try:
        getattr(sys.modules[name], "warm_up", lambda: None)()
    except Exception as error:  # noqa: BLE001 - a broken library must not keep the others from serving
        return f"{type(error).__name__}: {error}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Run the process."""
    parser = argparse.ArgumentParser(prog="penstock-forkserver")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--entry", required=True)
    parser.add_argument("--grace-seconds", type=float, required=True)
    parser.add_argument("--preload", action="append", default=[])
    parser.add_argument("--hold-fd", action="append", type=int, default=[])
    options = parser.parse_args(arguments)

    began = time.monotonic()
    # Before anything has a thread: replicas and programs of users are copies of this process.
    hide_environment()
    _libc.prctl(PR_SET_NAME, b"penstock-fork", 0, 0, 0)
    connection = socket.socket(fileno=options.fd)
    for fd in (options.fd, *options.hold_fd):
        os.set_inheritable(fd, False)
    gc.disable()
    preloaded = preload(options.preload)
    # What is imported stays; without this the collector would touch, and so copy, every shared page. What is
    # garbage by now stays too: it is little, and to look for it takes half a second.
    gc.freeze()
    ready = {
        "op": "ready",
        "pid": os.getpid(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "seconds": round(time.monotonic() - began, 3),
        "preloaded": preloaded,
    }
    try:
        connection.sendall(wire.pack(ready))
    except OSError:
        return 0  # The agent ended before this was warm.
    ForkServer(connection, options.entry, options.grace_seconds, options.hold_fd, preloaded).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
