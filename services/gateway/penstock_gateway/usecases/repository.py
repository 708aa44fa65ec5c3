"""Load and unload, as OIP's repository extension has them: deployments under the model's name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock_gateway.usecases.ports import Registry, Scheduler
from penstock_kit.errors import DeadlineExceeded, InvalidArgument, NotFound, Reason, Unavailable
from penstock_kit.routing.table import Table

Changed = Callable[[], asyncio.Event]


class Repository:
    """Deploys and removes models by their name.

    Args:
        table: Gives the routing table of the moment.
        changed: Gives an event that is set when the next table comes.
        registry: Knows versions.
        scheduler: Keeps deployments.
    """

    def __init__(
        self, table: Callable[[], Table], changed: Changed, registry: Registry, scheduler: Scheduler
    ) -> None:
        self._table = table
        self._changed = changed
        self._registry = registry
        self._scheduler = scheduler

    async def load(self, name: str, timeout: float) -> None:
        """Deploy the newest READY version of a model under the model's name, and wait until it answers.

        A deployment of that name is moved to the newest version.

        Args:
            name: Of the model.
            timeout: Seconds to wait; the deployment stays when they are over.

        Raises:
            InvalidArgument: The name is empty or no name.
            NotFound: No such model, or it has no READY version.
            Unavailable: It failed, or a service cannot be reached.
            DeadlineExceeded: It was not ready in time.
        """
        _check(name)
        try:
            async with asyncio.timeout(timeout):
                version = await self._registry.newest(name)
                deployment = await self._scheduler.get(name)
                if deployment is None:
                    await self._scheduler.create(name, f"models/{name}", version)
                elif deployment.versions != (version,):
                    await self._scheduler.update(name, f"models/{name}", version)
                await self._until_ready(name)
                await self._until(lambda: self._answers(name, version))
        except TimeoutError:
            raise DeadlineExceeded(
                f"Deployment {name} was not ready within {timeout:.0f} s; it goes on starting. "
                f"Look at it with `penstock deployments show {name}`."
            ) from None

    async def unload(self, name: str, timeout: float) -> None:
        """Delete the deployment of that name, and wait until nothing is routed to it.

        Raises:
            InvalidArgument: The name is empty or no name.
            NotFound: There is no such deployment.
            DeadlineExceeded: The routes still had it when time was up.
        """
        _check(name)
        try:
            async with asyncio.timeout(timeout):
                await self._scheduler.delete(name)
                await self._until(lambda: name not in self._table().routes)
        except TimeoutError:
            raise DeadlineExceeded(f"Deployment {name} was not gone within {timeout:.0f} s.") from None

    async def _until_ready(self, name: str) -> None:
        async for view in self._scheduler.watch(name):
            if view.ready:
                return
            if view.failed:
                raise Unavailable(
                    f"Model {name} could not be loaded: {view.message}",
                    reason=Reason.LOAD_FAILED,
                    metadata={"deployment": name},
                )
        raise NotFound(
            f"Deployment {name} was deleted while it was loading.", reason=Reason.DEPLOYMENT_NOT_FOUND
        )

    def _answers(self, name: str, version: int) -> bool:
        route = self._table().routes.get(name)
        return route is not None and any(t.ready and t.version == version for t in route.targets)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            changed = self._changed()
            if condition():
                return
            await changed.wait()


def _check(name: str) -> None:
    if not name:
        raise InvalidArgument("The model name is missing.")
    if "/" in name or "@" in name:
        raise InvalidArgument(
            f"{name[:64]!r} is no model name; a version is loaded with `penstock deploy`, not here."
        )
