"""Wait for a condition, never for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], Awaitable[bool]], *, within_seconds: float = 20.0) -> None:
    """Return as soon as the condition holds; fail if it does not in time."""
    async with asyncio.timeout(within_seconds):
        while not await condition():  # noqa: ASYNC110 - any condition, no event to wait for
            await asyncio.sleep(0.02)


def until(condition: Callable[[], bool], within_seconds: float = 20.0) -> None:
    """Return as soon as the condition holds, where there is no event loop; fail if it does not in time."""
    deadline = time.monotonic() + within_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_seconds:g} s")
        time.sleep(0.02)
