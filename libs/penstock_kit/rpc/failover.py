"""One channel over several addresses of a service, any of which may be away, or not the one that leads.

    open_channel("10.0.0.1:7102,10.0.0.2:7102")

gRPC's own lists of addresses know connections only: a scheduler that follows is connected and refuses, and
names cannot be listed at all. Here each address has a channel of its own. Calls go to the one that answered
last; one that answers UNAVAILABLE is left for the next.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from penstock_kit.errors import Code, DeadlineExceeded, InvalidArgument, PenstockError, Unavailable

ROUNDS = 5
"""How often a unary call is tried at all addresses: as often as gRPC tries at one (gRFC A6)."""
FIRST_PAUSE_SECONDS = 0.05
LAST_PAUSE_SECONDS = 1.0


def addresses_of(text: str) -> tuple[str, ...]:
    """Return the addresses of a service: "host:port" or "unix:/path", with commas between several.

    Raises:
        InvalidArgument: There is none.
    """
    found = tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not found:
        raise InvalidArgument(f"{text!r} names no address; give host:port or unix:/path, or several: a,b.")
    return found


class FailoverChannel(grpc.aio.Channel):
    """Looks like one channel.

    Args:
        channels: One for each address, at least one. They must not retry by themselves.
        retry_seconds: Deadline of unary calls that give none. Such calls are tried again on UNAVAILABLE, here
            and at the other addresses, within their deadline. None: no call is retried, and a broken
            address is left for the next call only.
    """

    def __init__(self, channels: Sequence[grpc.aio.Channel], *, retry_seconds: float | None = None) -> None:
        self._channels = tuple(channels)
        self._retry_seconds = retry_seconds
        self.current = 0

    def leave(self, index: int) -> None:
        """Use another address than this one from now on; nothing if that is so already."""
        if self.current == index:
            self.current = (index + 1) % len(self._channels)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close all."""
        await asyncio.gather(*(channel.close(grace) for channel in self._channels))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the one in use."""
        return self._channels[self.current].get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait for another state of the one in use."""
        await self._channels[self.current].wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the one in use is connected."""
        await self._channels[self.current].channel_ready()

    def unary_unary(self, *args: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`. A call that is retried can be awaited, and no more."""
        methods = [channel.unary_unary(*args, **named) for channel in self._channels]
        if self._retry_seconds is None:
            return self._chosen(methods)
        return self._retried(methods, self._retry_seconds)

    def unary_stream(self, *args: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._chosen([channel.unary_stream(*args, **named) for channel in self._channels])

    def stream_unary(self, *args: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._chosen([channel.stream_unary(*args, **named) for channel in self._channels])

    def stream_stream(self, *args: Any, **named: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._chosen([channel.stream_stream(*args, **named) for channel in self._channels])

    def _chosen(self, methods: Sequence[Any]) -> Callable[..., _Watched]:
        def call(*args: Any, **named: Any) -> _Watched:
            index = self.current
            return _Watched(methods[index](*args, **named), lambda: self.leave(index))

        return call

    def _retried(self, methods: Sequence[Any], default_seconds: float) -> Callable[..., Any]:
        async def call(request: Any, *, timeout: float | None = None, **named: Any) -> Any:
            loop = asyncio.get_running_loop()
            end = loop.time() + (default_seconds if timeout is None else timeout)
            pause = FIRST_PAUSE_SECONDS
            for tried in range(1, ROUNDS * len(methods) + 1):
                index = self.current
                left = max(end - loop.time(), 0)
                try:
                    return await methods[index](request, timeout=left, **named)
                except Unavailable:
                    self.leave(index)
                    if tried == ROUNDS * len(methods):
                        raise
                    if tried % len(methods) == 0:
                        if loop.time() + pause >= end:
                            raise
                        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
                        pause = min(2 * pause, LAST_PAUSE_SECONDS)
                except DeadlineExceeded:
                    # It may be a process that was stopped, or a machine that is cut off.
                    self.leave(index)
                    raise
            raise AssertionError("unreachable")

        return call


class _Watched:
    """A call; its address is left if it turns out to be unavailable."""

    def __init__(self, call: Any, unavailable: Callable[[], None]) -> None:
        self._call = call
        self._unavailable = unavailable

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except (PenstockError, grpc.aio.AioRpcError) as error:
            self._look_at(error)
            raise

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                yield message
        except (PenstockError, grpc.aio.AioRpcError) as error:
            self._look_at(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def _look_at(self, error: PenstockError | grpc.aio.AioRpcError) -> None:
        code = int(error.code) if isinstance(error, PenstockError) else error.code().value[0]
        if code == Code.UNAVAILABLE:
            self._unavailable()
