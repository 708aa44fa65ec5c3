"""A job process's end of the agent's desk: blocking calls, and notes that nobody answers.

Each frame is JSON (`forkserver.wire`). The first on a connection says who it is; after that

    {"op": …, "id": 7, …}      → {"id": 7, "ok": {…}} or {"id": 7, "error": {…}} or {"id": 7, "failure": {…}}
    {"op": …, …}               a note

Calls and notes have a connection each, so that a long call (a dataset of gigabytes) holds up no note.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from penstock_kit.errors import PenstockError, Reason, Unavailable, error_for
from penstock_worker.adapters.forkserver import wire
from penstock_worker.usecases.job_context import JobFailure

READ_BYTES = 256 * 1024
NOTE_SECONDS = 5.0
"""How long the agent may take to read a note; it reads at once unless it is gone."""


class _Connection:
    """One connection that is made at its first use in each process."""

    def __init__(self, path: str, hello: Mapping[str, Any]) -> None:
        self._path = path
        self._hello = hello
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._pid = 0
        self._unpacker = wire.Unpacker()

    @contextlib.contextmanager
    def use(self) -> Iterator[socket.socket]:
        """Provide the socket to this thread alone."""
        with self._lock:
            if self._socket is None or self._pid != os.getpid():
                # A process that a library forked off a rank must not write into the rank's own connection.
                found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                found.connect(self._path)
                found.sendall(wire.pack({"op": "hello", **self._hello}))
                self._socket, self._pid, self._unpacker = found, os.getpid(), wire.Unpacker()
            yield self._socket

    def close(self) -> None:
        """Close this process's descriptor of it; the next use makes another connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def answer(self, connection: socket.socket) -> wire.Message:
        """Read until one frame is complete; only within `use`."""
        while True:
            data = connection.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError("the agent has ended")
            for message in self._unpacker.feed(data):
                return message


class Line:
    """See the module. May be used by any thread.

    Args:
        path: The agent's socket.
        token: Says which task this is.
        rank: Which rank of it; -1 for the launcher.
        generation: Times that the ranks were started before.
    """

    def __init__(self, path: str, token: str, rank: int = -1, generation: int = 0) -> None:
        hello = {"token": token, "rank": rank, "generation": generation}
        self._calls = _Connection(path, hello)
        self._notes = _Connection(path, hello)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the agent and wait for its answer, however long that takes.

        Raises:
            JobFailure: What is asked for ends the job.
            PenstockError: As the agent or the registry says.
            Unavailable: The agent is gone.
        """
        try:
            with self._calls.use() as connection:
                connection.sendall(wire.pack({"op": op, "id": 1, **fields}))
                answer = self._calls.answer(connection)
        except OSError as error:
            raise Unavailable(f"The agent of this node is gone: {error}.") from error
        if "failure" in answer:
            failure = answer["failure"]
            raise JobFailure(failure["message"], failure["cause"], permanent=failure["permanent"])
        if "error" in answer:
            raise error_from(answer["error"])
        found: dict[str, Any] = answer["ok"]
        return found

    def note(self, op: str, **fields: Any) -> None:
        """Tell the agent; what cannot be told is lost, as then the agent is gone, and soon this process."""
        try:
            with self._notes.use() as connection:
                connection.settimeout(NOTE_SECONDS)
                connection.sendall(wire.pack({"op": op, **fields}))
        except OSError:
            self._notes.close()

    def close(self) -> None:
        """Close both connections, as far as this process has them."""
        self._calls.close()
        self._notes.close()


def error_fields(error: PenstockError) -> dict[str, Any]:
    """Return an error as JSON takes it."""
    return {
        "code": int(error.code),
        "message": error.message,
        "reason": error.reason.name,
        "metadata": error.metadata,
    }


def error_from(fields: Mapping[str, Any]) -> PenstockError:
    """Return the error that `error_fields` wrote."""
    reason = Reason.__members__.get(str(fields["reason"]), Reason.UNSPECIFIED)
    return error_for(
        int(fields["code"]), str(fields["message"]), reason=reason, metadata=fields.get("metadata")
    )
