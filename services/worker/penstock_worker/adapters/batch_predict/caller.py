"""Calls of one deployment through the mesh's own queue, at low priority.

The sender holds each call until it is answered, so neither a dying replica nor a Redis that loses its data
is noticed here but by the time it takes. One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, RequestHeader
from penstock_kit.errors import (
    NotFound,
    PenstockError,
    Reason,
    Unavailable,
    error_for,
)
from penstock_kit.lifecycle import TaskSet, running
from penstock_kit.oip.datatypes import Array
from penstock_kit.oip.relay import RawTensor, Relay
from penstock_kit.queue.keys import PRIORITY_LOW
from penstock_kit.queue.sender import RequestSender
from penstock_kit.routing.table import Table, Target, not_ready
from penstock_worker.domain.runtime import Mesh

# For a request that waits behind everybody else's, and for a model that must be loaded first.
CALL_SECONDS = 60.0
ROUTES_SECONDS = 30.0


class DeploymentCaller:
    """Calls a deployment.

    Args:
        mesh: Where the queues and the routes are.
        deployment: Its name, without deployments/.
    """

    def __init__(self, mesh: Mesh, deployment: str) -> None:
        self._mesh = mesh
        self._deployment = deployment
        self._sender = RequestSender(mesh.redis_url, mesh.name)
        self._relay = Relay()
        self._table = Table()
        self._routed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Follow the routes and reach the queues for as long as the context lasts.

        Raises:
            Unavailable: No scheduler said the routes within half a minute.
        """
        # Imported here: the launcher, which imports this module before it forks, must be without grpc's
        # threads.
        from penstock_kit.routing.watch import RouteWatcher
        from penstock_kit.rpc import open_channel

        channel = open_channel(self._mesh.scheduler_address)
        tasks = TaskSet()
        try:
            async with running([self._sender, tasks]):
                tasks.run_forever("routes", RouteWatcher(channel, self._mesh.name, self._use).run)
                try:
                    async with asyncio.timeout(ROUTES_SECONDS):
                        await self._routed.wait()
                except TimeoutError as error:
                    raise Unavailable("The scheduler did not say who answers; it may be away.") from error
                yield
        finally:
            await channel.close()

    def target(self) -> Target:
        """Return the version that answers most of the deployment's requests now.

        Raises:
            Unavailable: The deployment does not answer now, or is not there.
        """
        try:
            route = self._table.find(self._deployment)
        except NotFound as error:
            raise Unavailable(error.message, reason=error.reason, retry_after_seconds=1.0) from error
        candidates = [one for one in route.targets if one.weight > 0] or list(route.targets)
        if not candidates or (not route.may_wait and not any(one.ready for one in candidates)):
            raise not_ready(route)
        return max(candidates, key=lambda one: (one.ready, one.weight, one.version))

    async def call(
        self, target: Target, inputs: Mapping[str, RawTensor], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Return the model's outputs, each [rows, …].

        Raises:
            PenstockError: The model refused them, or nobody answered in time.
        """
        payload = self._relay.request(self._deployment, inputs, outputs)
        header = RequestHeader(
            deadline_unix_micros=int((time.time() + CALL_SECONDS) * 1e6),
            format=PAYLOAD_FORMAT_OIP_GRPC,
            model_name=self._deployment,
        )
        answer = self._sender.submit(target.queue, header, payload, PRIORITY_LOW)
        try:
            reply = await answer
        except asyncio.CancelledError:
            self._sender.cancel(header.id)
            raise
        if reply.header.code:
            raise _error_of(reply.header)
        return {name: tensor.array(name) for name, tensor in self._relay.answer(reply.payload).items()}

    def _use(self, table: Table) -> None:
        """Take a new table; what waits in queues that are no more is answered, to be asked elsewhere."""
        for queue in self._table.queues() - table.queues():
            self._sender.fail(
                queue,
                Unavailable(
                    "The version that was asked is not deployed any more.",
                    reason=Reason.NOT_READY,
                    retry_after_seconds=0.1,
                ),
            )
        self._table = table
        self._routed.set()


def _error_of(header: object) -> PenstockError:
    code, number = getattr(header, "code", 0), getattr(header, "reason", 0)
    try:
        reason = Reason(number)
    except ValueError:
        reason = Reason.UNSPECIFIED  # a newer replica's word
    return error_for(
        code,
        getattr(header, "message", ""),
        reason=reason,
        metadata=dict(getattr(header, "metadata", {})),
    )
