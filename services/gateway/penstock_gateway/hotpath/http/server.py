"""The listening socket, and what all its connections share."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import resource
import socket
import time
from collections.abc import Callable
from typing import cast

from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.frames import PREFACE
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.http1 import Http1Connection
from penstock_gateway.hotpath.http.http2 import Http2Connection
from penstock_gateway.hotpath.http.ports import Application, ClientGone, Plan
from penstock_kit.errors import Reason

log = logging.getLogger(__name__)

BACKLOG = 1024
MAX_CONNECTIONS = 8192
# Files that are left for all but connections, where the process may not open many.
SPARE_FILES = 256
# When nearly as many connections are open as may be, those without a call are closed to make room.
CROWDED = 0.9
CROWDED_IDLE_SECONDS = 5.0
TICK_SECONDS = 0.25
FIRST_BYTES_SECONDS = 10.0
_MAX_HEADS = 1024
_LOOK_SECONDS = 0.02

Connection = Http1Connection | Http2Connection


class HttpServer:
    """Serves HTTP/1 and HTTP/2 on one address.

    Args:
        application: ASGI; serves every call without a plan.
        plan_for: Says how calls with a head are served without a task; None if they are not.
        max_body_bytes: Bytes of unfinished request bodies held at most, over all connections; and of
            answers that wait for callers who do not read, looked at each quarter of a second.

    Attributes:
        heads: HTTP/1 heads by their bytes, with whether the connection is kept and whether chunks follow.
        date: The line of the answers that all have.
    """

    def __init__(
        self, application: Application, plan_for: Callable[[Head], Plan | None], *, max_body_bytes: int
    ) -> None:
        self._application = application
        self._plan_for = plan_for
        self._max_body_bytes = max_body_bytes
        self._held = 0
        self.heads: dict[bytes, tuple[Head, bool, bool]] = {}
        self._connections: set[Connection] = set()
        self._doors: set[Door] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._max_connections = MAX_CONNECTIONS
        self._turned_away = 0
        # Connections that broke the protocol since the last look, and how the last one did.
        self._faults = 0
        self._last_fault = ""
        self._refusing = False
        self.date = b""
        self._date_second = 0

    @property
    def open_calls(self) -> int:
        """Calls that are served as ASGI now."""
        return len(self._tasks)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections) + len(self._doors)

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished request bodies."""
        return self._held

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on a bound socket, which is closed in the end."""
        self._max_connections = _allow_connections()
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: Door(self), sock=listener, backlog=BACKLOG
        )
        self._tick()

    def refuse_new(self) -> None:
        """Close the listening socket, and ask callers to go elsewhere with their next calls."""
        if self._listener is not None:
            self._listener.close()
        self._refusing = True
        for connection in self._connections:
            connection.farewell()

    async def stop(self, grace: float) -> None:
        """End: open calls have `grace` seconds to be answered."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close()
        while loop.time() < end:
            if all(connection.settled for connection in self._connections):
                break
            await asyncio.sleep(_LOOK_SECONDS)
        for connection in list(self._connections):
            connection.abort()
        for door in list(self._doors):
            door.abort()
        if self._ticker is not None:
            self._ticker.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports tell their connections in the next round of the loop

    # For connections

    def opened(self, connection: Connection) -> None:
        """Count a connection."""
        self._connections.add(connection)
        if self._refusing:
            connection.farewell()

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)

    def blame(self, why: str) -> None:
        """Count a connection that broke the protocol; they are logged together, as one caller makes many."""
        self._faults += 1
        self._last_fault = why

    def plan(self, head: Head) -> None:
        """Fill in how calls with a head are served."""
        try:
            head.plan = self._plan_for(head)
        except Exception:
            log.exception("no plan could be made for %s %s", head.method, head.path)

    def remember(self, raw: bytes, known: tuple[Head, bool, bool]) -> None:
        """Keep an HTTP/1 head for the next call that begins with the same bytes."""
        if len(self.heads) >= _MAX_HEADS:
            self.heads.clear()
        self.heads[raw] = known

    def hold(self, size: int) -> bool:
        """Count bytes of an unfinished body; False if there are too many (they are counted all the same)."""
        self._held += size
        return self._held <= self._max_body_bytes

    def release(self, size: int) -> None:
        """Count bytes that are no longer held."""
        self._held -= size

    def run(self, exchange: Exchange, done: Callable[[asyncio.Task[None]], None] | None = None) -> None:
        """Serve a call as ASGI; `done` is called when the application has ended."""
        exchange.serve(self.hold)
        task = asyncio.get_running_loop().create_task(self._serve(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if done is not None:
            task.add_done_callback(done)

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self._application(exchange.scope, exchange.receive, exchange.send)
        except ClientGone:
            pass
        except Exception:
            log.exception("a call ended without an answer")
        finally:
            exchange.abandon()

    def error_body(self, words: str, reason: Reason) -> bytes:
        """Return the body of an answer to what is no proper request."""
        return json.dumps({"error": words, "reason": reason.name}).encode()

    # For doors

    def knocked(self, door: Door) -> bool:
        """Count a connection that has said nothing; False if there are too many."""
        if self.connections >= self._max_connections:
            self._turned_away += 1
            return False
        self._doors.add(door)
        return True

    def entered(self, door: Door) -> None:
        """Forget a connection that has said what it speaks, or has ended."""
        self._doors.discard(door)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(TICK_SECONDS, self._tick)
        second = int(time.time())
        if second != self._date_second:
            self._date_second = second
            date = email.utils.formatdate(second, usegmt=True).encode()
            self.date = b"date: %b\r\nserver: penstock\r\n" % date
        self.look(loop.time())

    def look(self, now: float) -> None:
        """Look after all that takes too long or too much; called each quarter of a second.

        Args:
            now: Time of the loop.
        """
        for connection in list(self._connections):
            connection.tick(now)
        for door in list(self._doors):
            if now - door.since > FIRST_BYTES_SECONDS:
                door.abort()
        self._make_room(now)
        if self._turned_away:
            log.warning(
                "connections were refused: as many are open as may be",
                extra={"refused": self._turned_away, "open": self.connections},
            )
            self._turned_away = 0
        if self._faults:
            log.info(
                "connections broke HTTP/2's rules and were ended",
                extra={"ended": self._faults, "last": self._last_fault},
            )
            self._faults = 0

    def _make_room(self, now: float) -> None:
        """Give up connections that cost more than there is."""
        if sum(connection.unsent for connection in self._connections) > self._max_body_bytes:
            # Those who take nothing come first, then those who have most to take.
            waiting = sorted(
                (connection for connection in self._connections if connection.unsent),
                key=lambda connection: (now - connection.moved < TICK_SECONDS, -connection.unsent),
            )
            total = sum(connection.unsent for connection in waiting)
            for connection in waiting:
                if total <= self._max_body_bytes:
                    break
                log.warning(
                    "a connection is ended: its caller leaves too much unread",
                    extra={"bytes": connection.unsent},
                )
                total -= connection.unsent
                connection.abort()
        if self.connections > self._max_connections * CROWDED:
            for connection in list(self._connections):
                idle_since = connection.idle_since
                if idle_since is not None and now - idle_since > CROWDED_IDLE_SECONDS:
                    connection.close()


def _allow_connections() -> int:
    """Let the process open as many files as its user may; return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(soft - SPARE_FILES, soft // 2))


class Door(asyncio.Protocol):
    """A connection until it is known what it speaks.

    Args:
        server: It came to.

    Attributes:
        since: Time of the loop when it was opened.
    """

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._heard = b""
        self.since = asyncio.get_running_loop().time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.knocked(self):
            self._transport.abort()
            return
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._server.entered(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Tell HTTP/2 by its preface, and hand over."""
        heard = self._heard = self._heard + data
        transport = self._transport
        if transport is None:
            return
        if PREFACE.startswith(heard[: len(PREFACE)]):
            if len(heard) < len(PREFACE):
                return
            connection: Connection = Http2Connection(self._server)
            heard = heard[len(PREFACE) :]
        else:
            connection = Http1Connection(self._server)
        self._server.entered(self)
        self._transport = None
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if heard:
            connection.data_received(heard)

    def abort(self) -> None:
        """End now."""
        if self._transport is not None:
            self._transport.abort()
