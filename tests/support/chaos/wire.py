"""A wire with a switch: a proxy between the mesh and a server of its, which cuts, silences and delays.

    clients ──▶ Wire ──▶ server (Redis, a service; unix socket or host:port)

It runs on a loop in a thread of its own, so that it goes on while the test's loop is busy.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Self, TypeVar, cast

import uvloop

T = TypeVar("T")
Address = Path | tuple[str, int]

_START_SECONDS = 10.0


class Mood(Enum):
    """What a connection does with the bytes that come next."""

    PASS = "pass"
    CUT = "cut"
    """Half of them go on, then the connection ends: in the middle of a command or of a reply."""
    DROP = "drop"
    """They vanish, and the connection stays: to either side the other one is merely silent."""


class _Side(asyncio.Protocol):
    """One of the two ends of a proxied connection."""

    def __init__(self, pair: _Pair) -> None:
        self.pair = pair
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self.mood = Mood.PASS
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        other = self.other
        if self.mood is Mood.DROP:
            return
        if self.mood is Mood.CUT:
            data = data[: len(data) // 2]
        if other is None or other.transport is None:
            self.early.append(data)
        elif not other.transport.is_closing():
            other.transport.write(data)
        if self.mood is Mood.CUT:
            self.pair.end()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        # A silent connection does not tell the other side that this one has gone.
        if self.mood is not Mood.DROP:
            self.pair.end()


class _Pair:
    """One proxied connection."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.client, self.server = _Side(self), _Side(self)

    def end(self) -> None:
        self.wire.pairs.discard(self)
        for side in (self.client, self.server):
            if side.transport is not None:
                # Not abort(): what was passed on must arrive, or it would be no half.
                side.transport.close()


class Wire:
    """Proxies connections from `listen` to `server`.

    Args:
        server: Where it leads: the path of a unix socket, or host and port.
        listen: Where it begins; port 0 takes a free one.
    """

    def __init__(self, server: Address, listen: Address) -> None:
        self._server_address = server
        self.listen = listen
        self.pairs: set[_Pair] = set()
        self._silent = False
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._listener: asyncio.AbstractServer | None = None
        self._dialling: set[asyncio.Future[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(_START_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_START_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)
        self._loop.close()

    @property
    def address(self) -> str:
        """host:port, or the path of the unix socket, where it begins."""
        if isinstance(self.listen, Path):
            return str(self.listen)
        return f"{self.listen[0]}:{self.listen[1]}"

    def cut(self, *, replies: bool = False) -> int:
        """End every connection in the middle of its next command, or of its next reply; say how many."""

        def arm() -> int:
            for pair in self.pairs:
                (pair.server if replies else pair.client).mood = Mood.CUT
            return len(self.pairs)

        return self._do(arm)

    def silence(self) -> int:
        """From now on all that is sent on open connections vanishes, for ever; new ones stay silent too.

        Both ends keep their connections, and each takes the other for slow: a partition, seen from both
        sides. After `speak` new connections are as new; the old ones stay lost.
        """

        def drop() -> int:
            self._silent = True
            for pair in self.pairs:
                pair.client.mood = pair.server.mood = Mood.DROP
            return len(self.pairs)

        return self._do(drop)

    def speak(self) -> None:
        """New connections work again."""

        def restore() -> None:
            self._silent = False

        self._do(restore)

    def _do(self, action: Callable[[], T]) -> T:
        async def act() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(_START_SECONDS)

    async def _listen(self) -> None:
        if isinstance(self.listen, Path):
            self._listener = await self._loop.create_unix_server(self._accept, str(self.listen))
            return
        listener = socket.create_server(self.listen)
        listener.setblocking(False)
        self.listen = listener.getsockname()[:2]
        self._listener = await self._loop.create_server(self._accept, sock=listener)

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for pair in list(self.pairs):
            pair.end()
        for dialling in self._dialling:
            dialling.cancel()
        await asyncio.sleep(0)  # so that closed transports end

    def _accept(self) -> asyncio.Protocol:
        pair = _Pair(self)
        self.pairs.add(pair)
        if self._silent:
            pair.client.mood = Mood.DROP
            return pair.client
        dialling = asyncio.ensure_future(self._dial(pair), loop=self._loop)
        self._dialling.add(dialling)
        dialling.add_done_callback(self._dialling.discard)
        return pair.client

    async def _dial(self, pair: _Pair) -> None:
        try:
            if isinstance(self._server_address, Path):
                await self._loop.create_unix_connection(lambda: pair.server, str(self._server_address))
            else:
                host, port = self._server_address
                await self._loop.create_connection(lambda: pair.server, host, port)
        except OSError:
            pair.end()
            return
        transport = pair.server.transport
        assert transport is not None
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair.client.other, pair.server.other = pair.server, pair.client
        for data in pair.client.early:
            transport.write(data)
        pair.client.early.clear()
