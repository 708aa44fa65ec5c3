"""Calls of an ensemble's steps: routed as a gateway routes, queued where the step's replicas read.

The sender holds each call until it is answered, so that a step's replica may die, or Redis lose its data,
without the ensemble noticing more than the time it takes. One event loop; nothing here blocks.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, RequestHeader
from penstock_kit.ensembles import Step
from penstock_kit.errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PenstockError,
    Reason,
    ResourceExhausted,
    Unavailable,
    error_for,
)
from penstock_kit.oip.relay import RawTensor, Relay
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.ports import Sender
from penstock_kit.routing.table import Table, Target, not_ready
from penstock_worker.domain.runtime import Call
from penstock_worker.hotpath.graph import PlannedStep

Answer = dict[str, RawTensor] | PenstockError
Done = Callable[[Answer], None]
_RETRY_SECONDS = 1.0


@dataclasses.dataclass(slots=True)
class _Open:
    """A call that is not answered yet."""

    step: Step
    queue: str
    own: frozenset[str]
    done: Done


class StepCaller:
    """Calls deployed models for the steps of ensembles.

    Args:
        sender: This process's end of all queues.
        inputs: Names of the ensemble's inputs: what a caller may have got wrong.
        draw: Gives fractions for the choice by weight.
    """

    def __init__(
        self, sender: Sender, inputs: frozenset[str], draw: Callable[[], float] = random.random
    ) -> None:
        self._sender = sender
        self._inputs = inputs
        self._draw = draw
        self._relay = Relay()
        self._open: dict[bytes, _Open] = {}
        self.table = Table()

    def update(self, table: Table) -> None:
        """Take a new routing table; calls in queues that vanished go to where their step leads now."""
        gone = self.table.queues() - table.queues()
        self.table = table
        for request_id, call in list(self._open.items()) if gone else ():
            if call.queue not in gone:
                continue
            try:
                successor = self._resolve(call.step).queue
            except PenstockError as error:
                self._sender.fail(call.queue, error, (request_id,))
            else:
                self._sender.reroute(call.queue, successor, (request_id,))
                call.queue = successor

    def call(self, planned: PlannedStep, inputs: dict[str, RawTensor], outer: Call, done: Done) -> bytes:
        """Call a step.

        Args:
            planned: The step.
            inputs: By the model's names.
            outer: The request that it is for: its deadline, priority and trace are the call's.
            done: Gets the model's outputs by its names, or the step's error; once, later or at once.

        Returns:
            What `cancel` takes; empty if it has failed already.
        """
        step = planned.step
        own = frozenset(name for name, tensor in planned.inputs if tensor in self._inputs)
        try:
            target = self._resolve(step)
            self._admit(step, target)
            payload = self._relay.request(step.deployment, inputs, [name for name, _ in planned.outputs])
            header = RequestHeader(
                deadline_unix_micros=outer.deadline_unix_micros,
                format=PAYLOAD_FORMAT_OIP_GRPC,
                model_name=step.deployment,
                traceparent=outer.traceparent,
                depth=outer.depth + 1,
            )
            call = _Open(step, target.queue, own, done)

            def ended(outcome: Reply | BaseException) -> None:
                self._open.pop(header.id, None)
                done(self._answer(call, planned, outcome))

            self._sender.submit_call(target.queue, header, payload, outer.priority, ended)
        except PenstockError as error:
            done(named(step, error))
            return b""
        self._open[header.id] = call
        return header.id

    def cancel(self, request_id: bytes) -> None:
        """Take a call off its queue; its `done` gets Cancelled."""
        self._sender.cancel(request_id)

    def problem(self, steps: tuple[Step, ...]) -> str:
        """Return why a request would not be answered now, naming the step; empty if it would."""
        for step in steps:
            try:
                self._resolve(step)
            except PenstockError as error:
                return named(step, error).message
        return ""

    def _resolve(self, step: Step) -> Target:
        """Return who computes a step now.

        Raises:
            Unavailable: Nobody does. Whatever the reason, it is not the caller's doing, and may pass.
        """
        try:
            route = self.table.find(step.deployment)
            target = route.select(step.selector, self._draw())
        except (NotFound, InvalidArgument) as error:
            raise Unavailable(
                error.message, reason=Reason.NOT_READY, metadata=error.metadata, retry_after_seconds=1.0
            ) from error
        if not target.ready and not route.may_wait:
            raise not_ready(route)
        return target

    def _admit(self, step: Step, target: Target) -> None:
        limit = self.table.routes[step.deployment].max_queue_depth
        waiting = self._sender.unanswered(target.queue)
        if waiting >= limit:
            raise ResourceExhausted(
                f"Deployment {step.deployment} has {waiting} unanswered requests of this ensemble, the most "
                "it takes. Retry later, or add replicas.",
                reason=Reason.OVERLOADED,
                metadata={"deployment": step.deployment},
                retry_after_seconds=_RETRY_SECONDS,
            )

    def _answer(self, call: _Open, planned: PlannedStep, outcome: Reply | BaseException) -> Answer:
        step = call.step
        if isinstance(outcome, PenstockError):
            return named(step, outcome)
        if not isinstance(outcome, Reply):
            return Cancelled(f"Step {step.name} was given up: nobody waits for it any more.")
        if outcome.header.code:
            return named(step, _blamed(call, _error_of(outcome)))
        try:
            tensors = self._relay.answer(outcome.payload)
        except PenstockError as error:
            return named(step, error)
        missing = [name for name, _ in planned.outputs if name not in tensors]
        if missing:
            return named(step, Internal(f"The model gave no output {missing[0]}.", reason=Reason.MODEL_ERROR))
        return tensors


def named(step: Step, error: PenstockError) -> PenstockError:
    """Return an error with the name of the step before its words."""
    return error_for(
        int(error.code),
        f"Step {step.name}: {error.message}",
        reason=error.reason,
        metadata={"deployment": step.deployment, **error.metadata, "step": step.name},
        retry_after_seconds=error.retry_after_seconds,
    )


def _error_of(reply: Reply) -> PenstockError:
    header = reply.header
    try:
        reason = Reason(header.reason)
    except ValueError:
        reason = Reason.UNSPECIFIED  # a newer replica's word
    return error_for(header.code, header.message, reason=reason, metadata=dict(header.metadata))


def _blamed(call: _Open, error: PenstockError) -> PenstockError:
    """Return a step's error with the code that says whose doing it is.

    A tensor that the ensemble's caller sent may be the caller's mistake. One that another step gave is not:
    then the ensemble does not fit its models.
    """
    if error.reason is not Reason.INVALID_TENSOR or error.metadata.get("input") in call.own:
        return error
    return FailedPrecondition(
        f"{error.message} Another step gave it: the ensemble does not fit the models that are deployed now.",
        reason=Reason.MANIFEST_MISMATCH,
        metadata=error.metadata,
    )
