"""The part of SchedulerService that is about rollouts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC
from typing import Any

import grpc

from penstock.scheduler.v1 import rollout_pb2, scheduler_service_pb2_grpc
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.rpc import principal
from penstock_scheduler.api.convert import targets_to_messages, time_to_message
from penstock_scheduler.api.paging import decode_number, decode_token, encode_token, page_size
from penstock_scheduler.api.policies import duration, policy_to_message
from penstock_scheduler.domain.rollout import Evidence, Rollout
from penstock_scheduler.usecases.rollouts import Rollouts

Context = grpc.aio.ServicerContext[Any, Any]


class RolloutServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Rollouts, and what served when."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> rollout_pb2.Rollout:
        """See scheduler_service.proto."""
        deployment, number = names.parse_rollout(request.name)
        return rollout_to_message(deployment, await self._rollouts.get(deployment, number))

    async def ListRollouts(
        self, request: pb.ListRolloutsRequest, context: Context
    ) -> pb.ListRolloutsResponse:
        """See scheduler_service.proto."""
        deployment = names.parse_deployment(request.parent)
        size = page_size(request.page_size)
        before = decode_number(decode_token(request.page_token))
        found = await self._rollouts.page(deployment, before, size + 1)
        page = found[:size]
        return pb.ListRolloutsResponse(
            rollouts=[rollout_to_message(deployment, rollout) for rollout in page],
            next_page_token=encode_token(str(page[-1].number)) if len(found) > size else "",
        )

    async def WatchRollout(
        self, request: pb.WatchRolloutRequest, context: Context
    ) -> AsyncIterator[rollout_pb2.Rollout]:
        """See scheduler_service.proto."""
        deployment, number = names.parse_rollout(request.name)
        async for rollout in self._rollouts.watch(deployment, number):
            yield rollout_to_message(deployment, rollout)

    async def PauseRollout(self, request: pb.PauseRolloutRequest, context: Context) -> rollout_pb2.Rollout:
        """See scheduler_service.proto."""
        deployment, number = names.parse_rollout(request.name)
        return rollout_to_message(deployment, await self._rollouts.pause(deployment, number))

    async def ResumeRollout(self, request: pb.ResumeRolloutRequest, context: Context) -> rollout_pb2.Rollout:
        """See scheduler_service.proto."""
        deployment, number = names.parse_rollout(request.name)
        return rollout_to_message(deployment, await self._rollouts.resume(deployment, number))

    async def PromoteRollout(
        self, request: pb.PromoteRolloutRequest, context: Context
    ) -> rollout_pb2.Rollout:
        """See scheduler_service.proto."""
        deployment, number = names.parse_rollout(request.name)
        return rollout_to_message(deployment, await self._rollouts.promote(deployment, number))

    async def AbortRollout(self, request: pb.AbortRolloutRequest, context: Context) -> rollout_pb2.Rollout:
        """See scheduler_service.proto."""
        deployment, number = names.parse_rollout(request.name)
        rollout = await self._rollouts.abort(deployment, number, actor=principal())
        return rollout_to_message(deployment, rollout)

    async def GetLiveTargets(
        self, request: pb.GetLiveTargetsRequest, context: Context
    ) -> pb.GetLiveTargetsResponse:
        """See scheduler_service.proto."""
        moment = None
        if request.HasField("time"):
            try:
                moment = request.time.ToDatetime(tzinfo=UTC)
            except (ValueError, OverflowError) as error:
                raise InvalidArgument("time is no moment.", metadata={"field": "time"}) from error
        targets, since = await self._rollouts.live(names.parse_deployment(request.name), moment)
        return pb.GetLiveTargetsResponse(
            targets=targets_to_messages(targets, {}), since=time_to_message(since)
        )


def rollout_to_message(deployment: str, rollout: Rollout) -> rollout_pb2.Rollout:
    """A rollout for callers."""
    message = rollout_pb2.Rollout(
        name=names.rollout_name(deployment, rollout.number),
        state=rollout_pb2.RolloutState.Value(f"ROLLOUT_STATE_{rollout.state.name}"),
        message=rollout.message,
        policy=policy_to_message(rollout.policy),
        to=targets_to_messages(rollout.after, {}),
        step=rollout.step,
        percent=rollout.percent,
        evidence=[_evidence(each) for each in rollout.evidence],
        create_time=time_to_message(rollout.create_time),
        step_time=time_to_message(rollout.step_time),
        end_time=time_to_message(rollout.end_time),
        actor=rollout.actor,
    )
    # `from` is a word of Python's own.
    getattr(message, "from").extend(targets_to_messages(rollout.before, {}))
    return message


def _evidence(evidence: Evidence) -> rollout_pb2.Evidence:
    return rollout_pb2.Evidence(
        kind=rollout_pb2.GuardKind.Value(f"GUARD_KIND_{evidence.kind.name}"),
        metric=evidence.metric,
        before_count=evidence.before_count,
        after_count=evidence.after_count,
        before=evidence.before,
        after=evidence.after,
        limit=evidence.limit,
        against=evidence.against,
        in_favour=evidence.in_favour,
        breached=evidence.breached,
        passed=evidence.passed,
        words=evidence.words,
        time=time_to_message(evidence.time),
        percent=evidence.percent,
        held=duration(evidence.held_seconds),
    )
