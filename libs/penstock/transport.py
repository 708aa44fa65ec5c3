"""One gRPC channel to a gateway: options, deadlines, retries, errors.

Retries are ours rather than gRPC's own (which stop after five attempts): while a gateway restarts, a
call should go on trying until its time is up. Only UNAVAILABLE is retried, and only where a second
execution does no harm.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from penstock.errors import DeadlineExceeded, InvalidArgument, PenstockError, Reason, Unavailable
from penstock.rpc_errors import from_rpc_error, is_detailed

DEFAULT_ENDPOINT = "127.0.0.1:8080"
DEFAULT_TIMEOUT_SECONDS = 30.0
# One message carries a whole request of tensors; the server has its own limit and says so.
MAX_MESSAGE_BYTES = 1 << 30
OIP_SERVICE = "inference.GRPCInferenceService"

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0

Option = tuple[str, int | str]


def channel_options() -> Sequence[Option]:
    """Return the options of the channel: message limits, keepalive, quick reconnects."""
    return (
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Each client has its own connection: closing one never disturbs another.
        ("grpc.use_local_subchannel_pool", 1),
    )


def check_endpoint(endpoint: str) -> str:
    """Return `host:port` (or `unix:/path`) in the form grpc takes; `http://` in front is forgiven.

    Raises:
        InvalidArgument: It is no address.
    """
    target = endpoint.strip().removeprefix("http://").removeprefix("grpc://").rstrip("/")
    if target.startswith("unix:"):
        return target
    if target.startswith("https://"):
        raise InvalidArgument(f"{endpoint}: TLS is not offered yet; give HOST:PORT.")
    host, colon, port = target.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidArgument(f"{endpoint!r} is no address: give HOST:PORT, such as {DEFAULT_ENDPOINT}.")
    return target


def translate(error: grpc.RpcError, endpoint: str) -> PenstockError:
    """Return the error of our tree; one that grpc made itself says where it could not get."""
    translated = from_rpc_error(error)
    # What a mesh said itself stays, be it that something behind it cannot be connected to.
    unanswered = isinstance(translated, Unavailable) and not is_detailed(error)
    if unanswered and "resolving" in translated.message:
        return Unavailable(
            f"The host of {endpoint} is not known. Name another address with --endpoint or "
            "PENSTOCK_ENDPOINT.",
            reason=Reason.DEPENDENCY_UNAVAILABLE,
            metadata={"endpoint": endpoint, "cause": translated.message},
        )
    if unanswered and "connect" in translated.message.lower():
        return Unavailable(
            f"Nothing answers at {endpoint}. Start a mesh with `penstock up`, or name another address "
            "with --endpoint or PENSTOCK_ENDPOINT.",
            reason=Reason.DEPENDENCY_UNAVAILABLE,
            metadata={"endpoint": endpoint, "cause": translated.message},
        )
    return translated


@dataclass(slots=True)
class Attempts:
    """Decides, failure by failure, whether a call is tried again and after which pause.

    Args:
        timeout: Seconds until the caller's deadline.
        retry_seconds: Seconds from the first failure in which UNAVAILABLE is retried; 0 for never. Not from
            the first attempt: a call that waited long at a gateway that then dies is worth a retry too.
    """

    timeout: float
    retry_seconds: float
    _start: float = field(default_factory=time.monotonic)
    _pause: float = _FIRST_PAUSE_SECONDS
    count: int = 1
    _last: Unavailable | None = None
    _failing_since: float | None = None

    def left(self) -> float:
        """Return the seconds left until the deadline.

        Raises:
            DeadlineExceeded: None are left.
        """
        left = self._start + self.timeout - time.monotonic()
        if left <= 0:
            raise self._too_late()
        return left

    def pause_after(self, error: PenstockError) -> float:
        """Return the seconds to wait before the next attempt; raise `error` if there is to be none."""
        if isinstance(error, DeadlineExceeded) and (self._last or "Deadline Exceeded" in error.message):
            # gRPC's own words say less than what was met on the way here.
            raise self._too_late() from error
        if not isinstance(error, Unavailable):
            raise error
        self._last = error
        # Jitter: callers that lost one gateway together do not come back together.
        pause = error.retry_after_seconds or self._pause * random.uniform(0.7, 1.3)  # noqa: S311  # nosec B311
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        failing = now - self._failing_since + pause
        if failing >= self.retry_seconds or now - self._start + pause >= self.timeout:
            raise error
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        self.count += 1
        return pause

    def answered(self) -> None:
        """Forget earlier failures: a stream that was broken goes on, and the next break is another one."""
        self._last = None
        self._failing_since = None
        self._pause = _FIRST_PAUSE_SECONDS

    def _too_late(self) -> PenstockError:
        return self._last or DeadlineExceeded(
            f"No answer within {self.timeout:g} s; allow more time, or add replicas."
        )


def new_request_id() -> str:
    """Return a fresh key that makes the retry of one mutation safe."""
    return str(uuid.uuid4())
