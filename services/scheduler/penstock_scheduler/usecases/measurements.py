"""Follows what is measured of versions after they were deployed: profiles and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from penstock_kit.errors import FailedPrecondition, NotFound, PenstockError
from penstock_scheduler.domain.version import Version, VersionKey
from penstock_scheduler.usecases.ports import Registry, Wakeup, Works

log = logging.getLogger(__name__)

AT_ONCE = 8


class MeasurementFollower:
    """Asks the registry about the versions that deployments use, and keeps what is new.

    The files of a version never change; a profile or an evaluation may come at any time. The autoscaler, the
    guards of rollouts and replicas that start later then go by it. A replica that runs is not touched: it
    measures itself.

    Args:
        works: opens transactions.
        registry: asked about one version at a time, each once per round.
        wakeup: told when something was new.
        leading: whether this scheduler leads; others leave the work to it.
        seconds: between two rounds.
    """

    def __init__(
        self,
        works: Works,
        registry: Registry,
        wakeup: Wakeup,
        leading: Callable[[], bool],
        seconds: float,
    ) -> None:
        self._works = works
        self._registry = registry
        self._wakeup = wakeup
        self._leading = leading
        self._seconds = seconds

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            if self._leading():
                try:
                    await self.step()
                except PenstockError as error:
                    log.warning("new measurements of versions are not looked for now: %s", error)

    async def step(self) -> None:
        """One round. A version that the registry does not give now stays as it is."""
        async with self._works() as work:
            known = (await work.cluster.load()).versions
        limit = asyncio.Semaphore(AT_ONCE)

        async def ask(key: VersionKey) -> Version | None:
            async with limit:
                try:
                    return await self._registry.resolve(key.model, str(key.number))
                except (NotFound, FailedPrecondition):
                    return None  # deleted or archived meanwhile
                except PenstockError as error:
                    log.warning("what is known of %s stays as it is: %s", key, error)
                    return None

        found = await asyncio.gather(*(ask(key) for key in sorted(known)))
        fresh = [v for v in found if v is not None and v.document != known[v.key].document]
        if not fresh:
            return
        async with self._works() as work:
            await work.deployments.keep_versions(fresh)
            await work.commit()
        self._wakeup.wake()
