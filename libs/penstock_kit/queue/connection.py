"""One connection to Redis on an asyncio loop, built for many small commands.

redis-py's asyncio client spends more time per command than all else on the gateway's path together. This
one does less: replies are parsed in bulk by hiredis, and the answer of a command is handed to a plain
callable, without a future where none is needed. What is written while the loop hands out one round of
events leaves in one system call at its end, which uvloop sees to.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import hiredis

from penstock_kit.errors import DeadlineExceeded
from penstock_kit.queue.address import Address
from penstock_kit.queue.resp import Argument, Command, ConnectionLost, encode, greeting

OnReply = Callable[[Any], None]

CONNECT_SECONDS = 5.0
COMMAND_SECONDS = 5.0

_PENDING = object()


class Connection(asyncio.Protocol):
    """One connection. Made by ``connect``; once lost, it stays lost.

    ``on_lost`` is called once when the connection ends, whatever ended it. Replies still due are then
    answered with a ``ConnectionLost``: a handler gets either what Redis said (bytes, int, list, None), or
    a ``hiredis.ReplyError``, or a ``ConnectionLost``.
    """

    def __init__(self, address: Address, on_lost: Callable[[], None] | None = None) -> None:
        self._address = address
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        # Errors come back as values: a failed command must not end the parsing of its neighbours.
        self._reader = hiredis.Reader(notEnoughData=_PENDING)
        self._handlers: deque[OnReply] = deque()
        self._closed = False

    @classmethod
    async def connect(
        cls,
        address: Address,
        name: str,
        *,
        on_lost: Callable[[], None] | None = None,
        timeout: float = CONNECT_SECONDS,
    ) -> Self:
        """Connect, log in, and see that the server has loaded its data.

        Raises:
            ConnectionLost: not reachable, refused, or still loading.
        """
        loop = asyncio.get_running_loop()
        connection = None
        try:
            async with asyncio.timeout(timeout):
                if address.path:
                    _, connection = await loop.create_unix_connection(
                        lambda: cls(address, on_lost), address.path
                    )
                else:
                    _, connection = await loop.create_connection(
                        lambda: cls(address, on_lost), address.host, address.port, ssl=address.tls
                    )
                await connection.pipeline(greeting(address, name), timeout=timeout)
        except (OSError, TimeoutError, hiredis.ReplyError, DeadlineExceeded) as error:
            if connection is not None:
                connection.close()
            raise ConnectionLost(address, error or "no answer in time") from error
        return connection

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed

    def write(self, data: bytes, on_reply: OnReply) -> None:
        """Send one encoded command at the end of this tick; ``on_reply`` gets its answer."""
        transport = self._transport
        if self._closed or transport is None:
            self._loop.call_soon(on_reply, ConnectionLost(self._address, "closed"))
            return
        self._handlers.append(on_reply)
        transport.write(data)

    async def command(self, *arguments: Argument, timeout: float = COMMAND_SECONDS) -> Any:
        """Send one command and wait for its answer.

        Raises:
            hiredis.ReplyError: Redis answered with an error.
            ConnectionLost: the connection ended before the answer.
            DeadlineExceeded: no answer in time; the connection stays usable.
        """
        return (await self.pipeline([arguments], timeout=timeout))[0]

    async def pipeline(self, commands: Iterable[Command], *, timeout: float = COMMAND_SECONDS) -> list[Any]:
        """Send several commands at once and wait for all answers; raises like ``command``."""
        futures = [self._ask(encode(*command)) for command in commands]
        try:
            async with asyncio.timeout(timeout):
                return list(await asyncio.gather(*futures))
        except TimeoutError as error:
            raise DeadlineExceeded(f"Redis at {self._address} gave no answer within {timeout} s.") from error

    def close(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()
        self._end("closed")

    def _ask(self, data: bytes) -> asyncio.Future[Any]:
        future = self._loop.create_future()

        def on_reply(reply: Any) -> None:
            if future.done():  # nobody waits any more
                return
            if isinstance(reply, Exception):
                future.set_exception(reply)
                future.exception()  # a pipeline raises the first error; the others are not "never retrieved"
            else:
                future.set_result(reply)

        self.write(data, on_reply)
        return future

    def _end(self, why: object) -> None:
        if self._closed:
            return
        self._closed = True
        lost = ConnectionLost(self._address, why)
        while self._handlers:
            self._handlers.popleft()(lost)
        if self._on_lost is not None:
            self._on_lost()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods, not the class

    def data_received(self, data: bytes) -> None:
        """Parse what came, and hand each reply to its handler."""
        reader = self._reader
        handlers = self._handlers
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _PENDING:
                handlers.popleft()(reply)
        except (hiredis.ProtocolError, IndexError) as error:
            # What answers is no Redis, or answers more than was asked.
            self._end(error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._end(exc or "the connection was closed")


class Backoff:
    """Growing pauses between tries, half of each by chance so that a crowd spreads out."""

    def __init__(self, first_seconds: float = 0.02, last_seconds: float = 1.0) -> None:
        self._first = first_seconds
        self._last = last_seconds
        self._next = first_seconds

    def pause(self) -> float:
        """Seconds to wait before the next try."""
        seconds = self._next
        self._next = min(seconds * 2, self._last)
        return seconds * (0.5 + random.random() / 2)  # noqa: S311 -- spreads load, guards nothing

    def reset(self) -> None:
        """A try succeeded."""
        self._next = self._first
