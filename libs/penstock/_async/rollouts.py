"""Rollouts: how new versions take over, and what was live when."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import grpc

from penstock._async import io
from penstock._async.deployments import AsyncDeployments
from penstock.errors import DeadlineExceeded
from penstock.names import resource, short
from penstock.rollouts import describe_rollout, ended
from penstock.scheduler.v1 import deployment_pb2, rollout_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as scheduler
from penstock.transport import Attempts, new_request_id, translate

RolloutCallback = Callable[[rollout_pb2.Rollout], None]


class AsyncRollouts(AsyncDeployments):
    """How new versions take over. Where a rollout's number is 0, the latest of the deployment is meant."""

    async def set_rollout_policy(
        self, name: str, policy: deployment_pb2.RolloutPolicy
    ) -> deployment_pb2.Deployment:
        """Change how new versions take over from now on; see `penstock.rollouts.rollout_policy`."""
        wanted = deployment_pb2.Deployment(name=resource("deployments", name), rollout_policy=policy)
        return await self._update(wanted, ["rollout_policy"], new_request_id())

    async def get_rollout(self, name: str, number: int = 0) -> rollout_pb2.Rollout:
        """Return a rollout of a deployment.

        Raises:
            NotFound: There is no such deployment or rollout.
        """
        request = scheduler.GetRolloutRequest(name=_full_name(name, number))
        return await self._unary(self._scheduler.GetRollout, request)

    async def list_rollouts(self, name: str, *, limit: int | None = None) -> list[rollout_pb2.Rollout]:
        """Return the rollouts of a deployment, newest first."""
        request = scheduler.ListRolloutsRequest(parent=resource("deployments", name))
        return await self._list(self._scheduler.ListRollouts, request, lambda page: page.rollouts, limit)

    async def watch_rollout(
        self,
        name: str,
        number: int = 0,
        *,
        timeout: float = 86400.0,
        on_change: RolloutCallback | None = None,
    ) -> rollout_pb2.Rollout:
        """Wait until a rollout has ended, however it ends; return it.

        Args:
            name: Name of the deployment.
            number: Number of the rollout.
            timeout: Seconds to wait.
            on_change: Told of the rollout at once and at every change.

        Raises:
            DeadlineExceeded: It has not ended yet; the words say where it stands.
            NotFound: There is no such deployment or rollout.
        """
        attempts = Attempts(timeout, timeout)
        last: rollout_pb2.Rollout | None = None
        while True:
            pause = 0.1
            full = last.name if last is not None else _full_name(name, number)
            try:
                request = scheduler.WatchRolloutRequest(name=full)
                async for seen in self._scheduler.WatchRollout(request, timeout=attempts.left()):
                    last = seen
                    if on_change is not None:
                        on_change(seen)
                    if ended(seen):
                        return seen
            except (grpc.RpcError, DeadlineExceeded) as error:
                failure = translate(error, self.endpoint) if isinstance(error, grpc.RpcError) else error
                if isinstance(failure, DeadlineExceeded):
                    raise DeadlineExceeded(
                        f"The rollout of {short(name)} has not ended after {timeout:g} s: "
                        f"{describe_rollout(last)}"
                    ) from error
                pause = attempts.pause_after(failure)
            await io.sleep(pause)

    async def pause_rollout(self, name: str, number: int = 0) -> rollout_pb2.Rollout:
        """Hold a rollout where it is; its guards still look."""
        request = scheduler.PauseRolloutRequest(name=_full_name(name, number))
        return await self._unary(self._scheduler.PauseRollout, request)

    async def resume_rollout(self, name: str, number: int = 0) -> rollout_pb2.Rollout:
        """Let a paused rollout go on."""
        request = scheduler.ResumeRolloutRequest(name=_full_name(name, number))
        return await self._unary(self._scheduler.ResumeRollout, request)

    async def promote_rollout(self, name: str, number: int = 0) -> rollout_pb2.Rollout:
        """Pass the present step whatever the guards have seen so far."""
        request = scheduler.PromoteRolloutRequest(name=_full_name(name, number))
        return await self._unary(self._scheduler.PromoteRollout, request, retry=False)

    async def abort_rollout(self, name: str, number: int = 0) -> rollout_pb2.Rollout:
        """End a rollout and give the earlier targets all traffic."""
        request = scheduler.AbortRolloutRequest(name=_full_name(name, number))
        return await self._unary(self._scheduler.AbortRollout, request, retry=False)

    async def get_live_targets(
        self, name: str, time: datetime | None = None
    ) -> scheduler.GetLiveTargetsResponse:
        """Return what callers of a deployment got at a moment (now, without one), and since when.

        Args:
            name: Name of the deployment, which may be gone by now.
            time: The moment; one without a time zone is in UTC.

        Raises:
            NotFound: Nothing is known of that name at that moment.
        """
        request = scheduler.GetLiveTargetsRequest(name=resource("deployments", name))
        if time is not None:
            request.time.FromDatetime(time if time.tzinfo else time.replace(tzinfo=UTC))
        return await self._unary(self._scheduler.GetLiveTargets, request)


def _full_name(name: str, number: int) -> str:
    return f"{resource('deployments', name)}/rollouts/{number or '-'}"
