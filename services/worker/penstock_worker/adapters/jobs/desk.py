"""The agent's end of the socket by which the processes of jobs ask for things; see `line`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from penstock_kit.errors import Internal, PenstockError
from penstock_kit.lifecycle import TaskSet
from penstock_worker.adapters.forkserver import wire
from penstock_worker.adapters.jobs.disk import full_disk
from penstock_worker.adapters.jobs.line import READ_BYTES, error_fields
from penstock_worker.usecases.job_context import JobFailure

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
HELLO_SECONDS = 10.0


class Clerk(Protocol):
    """Serves the processes of one start of a task."""

    async def call(self, op: str, rank: int, generation: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a call.

        Raises:
            PenstockError: It cannot be done; the process is told.
        """

    def note(self, op: str, rank: int, generation: int, fields: Mapping[str, Any]) -> None:
        """Take a note."""


class Desk:
    """One socket for all tasks of the node, in a directory of its own that nobody else may enter."""

    def __init__(self) -> None:
        self.path = ""
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._clerks: dict[str, Clerk] = {}
        self._tasks = TaskSet()
        self._connections = 0

    async def start(self) -> None:
        """Listen."""
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-"))
        path = self._folder / "desk"
        if len(str(path)) > 100:  # the kernel takes 107 bytes
            shutil.rmtree(self._folder)
            # mkdtemp makes it for us alone.
            self._folder = Path(tempfile.mkdtemp(prefix="penstock-", dir="/tmp"))  # nosec B108
            path = self._folder / "desk"
        self._server = await asyncio.start_unix_server(self._accept, path=path, limit=READ_BYTES)
        self.path = str(path)

    async def stop(self) -> None:
        """Hang up on all."""
        if self._server is not None:
            self._server.close()
        await self._tasks.stop()
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def open(self, clerk: Clerk) -> str:
        """Let a clerk serve whoever shows the token that is returned."""
        token = secrets.token_hex(16)
        self._clerks[token] = clerk
        return token

    def close(self, token: str) -> None:
        """Serve that token no more."""
        self._clerks.pop(token, None)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections += 1
        self._tasks.spawn("a process of a job", self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._talk(reader, writer)
        except (ConnectionError, ValueError, KeyError, TypeError, TimeoutError) as error:
            log.debug("a process of a job hung up: %s", error)
        finally:
            self._connections -= 1
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unpacker = wire.Unpacker()
        token = ""
        rank = generation = 0
        while True:
            async with asyncio.timeout(None if token else HELLO_SECONDS):
                data = await reader.read(READ_BYTES)
            if not data:
                return
            for message in unpacker.feed(data):
                if not token:
                    token, rank, generation = message["token"], message["rank"], message["generation"]
                    if message["op"] != "hello" or token not in self._clerks:
                        return
                    continue
                clerk = self._clerks.get(token)
                if clerk is None:
                    return
                if "id" not in message:
                    clerk.note(message["op"], rank, generation, message)
                    continue
                answer = await _answer(clerk.call, message, rank, generation)
                writer.write(wire.pack({"id": message["id"], **answer}))
                await writer.drain()


async def _answer(
    call: Callable[[str, int, int, Mapping[str, Any]], Awaitable[dict[str, Any]]],
    message: wire.Message,
    rank: int,
    generation: int,
) -> dict[str, Any]:
    try:
        return {"ok": await call(message["op"], rank, generation, message)}
    except JobFailure as failure:
        return {"failure": {"message": str(failure), "cause": failure.cause, "permanent": failure.permanent}}
    except PenstockError as error:
        return {"error": error_fields(error)}
    except OSError as error:
        words, cause = full_disk([error], None), "OUT_OF_DISK"
        if not words:
            where = f" ({error.filename})" if error.filename else ""
            words, cause = f"The node's disk: {error.strerror or error}{where}.", "DISK"
        return {"failure": {"message": words, "cause": cause, "permanent": False}}
    except Exception as error:
        log.exception("a call of a job failed")
        words = f"{message['op']}: {type(error).__name__}; see the agent's log."
        return {"error": error_fields(Internal(words))}
