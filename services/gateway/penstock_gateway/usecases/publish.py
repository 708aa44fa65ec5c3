"""Tells the other gateways what this one answered without replicas, so that any of them can sum it up."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from penstock_kit.errors import PenstockError

log = logging.getLogger(__name__)

# Others forget a gateway after ten seconds.
PUBLISH_SECONDS = 2.0


class Publisher(Protocol):
    """Where it is told."""

    async def publish(self) -> None:
        """Publish the counters of now, if there are any."""
        ...


class CacheReport:
    """Publishes now and then; nothing while no deployment has a cache.

    Args:
        publisher: Where.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._away = False

    async def run(self) -> None:
        """Publish for ever."""
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            try:
                await self._publisher.publish()
                self._away = False
            except PenstockError as error:
                if not self._away:
                    log.warning("the counters of the cache cannot be published: %s", error.message)
                self._away = True
