"""An ensemble at work: many requests on their way through one graph, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial

from penstock_kit.ensembles import MAX_DEPTH, Step
from penstock_kit.errors import Cancelled, FailedPrecondition, Internal, PenstockError, Reason
from penstock_kit.lifecycle import TaskSet, running
from penstock_kit.oip import Signature
from penstock_kit.oip.relay import RawTensor
from penstock_kit.queue.sender import RequestSender
from penstock_kit.routing.table import Table
from penstock_worker.domain.runtime import Call, Mesh
from penstock_worker.hotpath.graph import PlannedStep, Plans, Run
from penstock_worker.hotpath.steps import Answer, StepCaller

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Request:
    """One request: its call, its run, and the steps that are with other models now."""

    call: Call
    run: Run[RawTensor] | None = None
    open_calls: dict[int, bytes] = dataclasses.field(default_factory=dict)


class Ensemble:
    """Runs requests through a graph.

    Args:
        steps: The graph; it has been checked.
        signature: What the ensemble takes and gives.
        mesh: Where the rest of the mesh is.
    """

    def __init__(self, steps: Sequence[Step], signature: Signature, mesh: Mesh) -> None:
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._plans = Plans(steps, [spec.name for spec in signature.outputs])
        self._mesh = mesh
        self._sender = RequestSender(mesh.redis_url, mesh.name)
        self._caller = StepCaller(self._sender, frozenset(self._specs))
        self._running: dict[int, _Request] = {}
        self._routed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Follow the routes and reach the queues for as long as the context lasts; begins once it does."""
        # Imported here: the fork server, which imports this module, must be without grpc's threads.
        from penstock_kit.routing.watch import RouteWatcher
        from penstock_kit.rpc import open_channel

        channel = open_channel(self._mesh.scheduler_address)
        tasks = TaskSet()
        try:
            async with running([self._sender, tasks]):
                watcher = RouteWatcher(channel, self._mesh.name, self._use)
                tasks.run_forever("routes", watcher.run)
                # For as long as a replica may take to load: its agent keeps that time.
                await self._routed.wait()
                yield
        finally:
            await channel.close()

    def begin(self, calls: Sequence[Call]) -> None:
        """Begin requests."""
        for call in calls:
            self._begin(call)

    def abandon(self, calls: Sequence[Call]) -> None:
        """Give up requests; those that are done already are left alone."""
        for call in calls:
            request = self._running.get(id(call))
            if request is not None and request.run is not None:
                request.run.failed(Cancelled("Nobody waits for this request any more."))

    def _use(self, table: Table) -> None:
        self._caller.update(table)
        self._routed.set()

    def _begin(self, call: Call) -> None:
        if call.depth >= MAX_DEPTH:
            call.done(
                FailedPrecondition(
                    f"The request has come through {call.depth} ensembles, and at most {MAX_DEPTH} may be "
                    "nested. Does one of them call itself?",
                    reason=Reason.INVALID_REQUEST,
                )
            )
            return
        request = _Request(call)
        self._running[id(call)] = request
        try:
            inputs = {name: RawTensor.of(self._specs[name], array) for name, array in call.inputs.items()}
            plan = self._plans.get(call.outputs)
            request.run = Run(plan, inputs, partial(self._call, request), partial(self._done, request))
            request.run.start()
        except Exception as error:
            log.exception("a request could not be begun")
            self._done(request, Internal(f"The ensemble could not begin the request: {error}"))

    def _call(
        self, request: _Request, run: Run[RawTensor], planned: PlannedStep, inputs: dict[str, RawTensor]
    ) -> None:
        request.open_calls[planned.index] = b""
        request_id = self._caller.call(
            planned, inputs, request.call, partial(self._answered, request, run, planned)
        )
        if planned.index in request.open_calls:
            request.open_calls[planned.index] = request_id

    def _answered(self, request: _Request, run: Run[RawTensor], planned: PlannedStep, answer: Answer) -> None:
        request.open_calls.pop(planned.index, None)
        if isinstance(answer, PenstockError):
            run.failed(answer)
        else:
            run.answered(planned, answer)

    def _done(self, request: _Request, outcome: dict[str, RawTensor] | PenstockError) -> None:
        call = request.call
        if self._running.pop(id(call), None) is None:
            return
        # After a failure, other steps may still be on their way.
        for request_id in list(request.open_calls.values()):
            self._caller.cancel(request_id)
        if isinstance(outcome, PenstockError):
            call.done(outcome)
            return
        try:
            call.done({name: tensor.array(name) for name, tensor in outcome.items()})
        except PenstockError as error:
            call.done(error)
