"""One call as ASGI: for everything that has no plan of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.parts import Parts
from penstock_gateway.hotpath.http.ports import ClientGone, Headers, Scope

# In the scope's extensions: what counts the bytes of a body that the application keeps.
KEEP = "penstock.keep"
_DISCONNECT = {"type": "http.disconnect"}


class Wire(Protocol):
    """What a connection offers to the call that it carries."""

    def send_head(self, status: int, headers: Headers, *, end: bool) -> None:
        """Send the head of the answer; `end` if nothing follows."""
        ...

    def send_data(self, data: bytes, *, end: bool) -> None:
        """Send a part of the body; what the caller does not take yet is kept."""
        ...

    def send_trailers(self, headers: Headers) -> None:
        """Send trailers, and end."""
        ...

    async def room(self) -> None:
        """Return when the caller has taken most of what was sent."""
        ...

    def taken(self, size: int) -> None:
        """Tell that bytes of the request's body were read, so that more may come."""
        ...

    def abort(self) -> None:
        """End the call in the middle of its answer."""
        ...


class Exchange:
    """Receive and send of one call.

    Args:
        wire: Carries it.
        head: Of the request.
    """

    __slots__ = (
        "_ended",
        "_gone",
        "_hold",
        "_kept",
        "_parts",
        "_start",
        "_trailers",
        "_waiter",
        "_wire",
        "finished",
        "scope",
    )

    def __init__(self, wire: Wire, head: Head) -> None:
        self._wire = wire
        self._parts = Parts()
        self._ended = False
        self._gone = False
        self._waiter: asyncio.Future[None] | None = None
        self._start: dict[str, Any] | None = None
        self._trailers = False
        self._hold: Callable[[int], bool] | None = None
        self._kept = 0
        self.finished = False
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "extensions": {"http.response.trailers": {}, KEEP: self.keep},
        }

    # The server's side

    def serve(self, hold: Callable[[int], bool]) -> None:
        """Begin; `hold` counts bytes of bodies, and says whether there is memory for them."""
        self._hold = hold

    def feed(self, data: bytes, *, end: bool) -> None:
        """Take a part of the body."""
        self._parts.add(data)
        self._ended = self._ended or end
        self._wake()

    def leave(self) -> None:
        """Take notice that the caller went away."""
        self._gone = True
        self._parts = Parts()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The application's side

    async def receive(self) -> dict[str, Any]:
        """Return what came of the body; once that has ended, wait until the caller leaves or is answered."""
        while True:
            if self._gone or self.finished:
                return _DISCONNECT
            if self._parts:
                body = self._parts.join()
                ended, self._ended = self._ended, False
                self._wire.taken(len(body))
                return {"type": "http.request", "body": body, "more_body": not ended}
            if self._ended:
                self._ended = False
                return {"type": "http.request", "body": b"", "more_body": False}
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def send(self, event: dict[str, Any]) -> None:
        """Send a part of the answer; waits while the caller does not read.

        Raises:
            ClientGone: Nobody reads it.
        """
        if self._gone:
            raise ClientGone
        kind = event["type"]
        if kind == "http.response.start":
            self._start = event
            self._trailers = bool(event.get("trailers"))
            return
        if kind == "http.response.trailers":
            self._finish()
            self._wire.send_trailers(event["headers"])
            return
        body: bytes = event.get("body", b"")
        last = not event.get("more_body", False)
        end = last and not self._trailers
        if end:
            self._finish()
        if self._start is not None:
            start, self._start = self._start, None
            self._wire.send_head(start["status"], start["headers"], end=end and not body)
            if end and not body:
                return
        if body or end:
            self._wire.send_data(body, end=end)
        if not last:
            await self._wire.room()

    def _finish(self) -> None:
        self.finished = True
        self._wake()

    def keep(self, size: int) -> bool:
        """Count bytes that were read and are kept until the call ends, or (negative) no longer are.

        Returns:
            Whether there is memory for them.
        """
        self._kept += size
        return self._hold is None or self._hold(size)

    def abandon(self) -> None:
        """End: the application has. If it gave no whole answer, the caller is told so."""
        self.scope["extensions"].clear()  # it knows the exchange: a ring would wait for the collector
        if self._kept:
            self.keep(-self._kept)
        if not self.finished and not self._gone:
            self._finish()
            self._wire.abort()
