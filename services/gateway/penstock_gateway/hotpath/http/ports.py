"""What the server and those who answer say to each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from penstock_kit.errors import PenstockError

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class ClientGone(ConnectionError):
    """The caller went away: nobody reads what is sent."""


class Responder(Protocol):
    """One call that waits for its whole answer. Each call is answered once; after that, nothing happens.

    Attributes:
        work: What the plan's `run` returned.
    """

    work: Any

    def answer_message(self, payload: bytes) -> None:
        """Answer a gRPC call with one message, uncompressed, and OK."""
        ...

    def answer_grpc(self, trailers: Headers, body: bytes = b"", headers: Headers = ()) -> None:
        """Answer a gRPC call.

        Args:
            trailers: Status, words, details.
            body: Framed messages.
            headers: Beside content-type.
        """
        ...

    def answer_http(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer an HTTP request. Content-Length is added here, and is the body's even for HEAD."""
        ...


class Plan(Protocol):
    """How calls with one head are served without a task: the whole body in, the whole answer out.

    Attributes:
        timeout: Seconds from the head on, after which an unfinished body is refused.
        limit: Bytes of a body at most.
    """

    timeout: float
    limit: int

    def run(self, responder: Responder, body: bytes) -> Any:
        """Begin to work on a call; what is returned identifies the work. Must not raise."""
        ...

    def cancel(self, work: Any) -> None:
        """Stop working: the caller went away."""
        ...

    def refuse(self, responder: Responder, error: PenstockError) -> None:
        """Answer a call whose body did not come, or must not."""
        ...
