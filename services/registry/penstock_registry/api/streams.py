"""What both services of the registry do with a client's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from penstock_kit.errors import DeadlineExceeded

T = TypeVar("T")

# A client that goes on uploading sends a chunk at least this often.
UPLOAD_IDLE_SECONDS = 60.0


async def next_part(parts: AsyncIterator[T]) -> T | None:
    """Return the next message; None after the last.

    Raises:
        DeadlineExceeded: The client went quiet.
    """
    try:
        async with asyncio.timeout(UPLOAD_IDLE_SECONDS):
            return await anext(parts, None)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"No chunk came for {UPLOAD_IDLE_SECONDS:.0f} seconds; what arrived is kept. Continue the upload."
        ) from error
