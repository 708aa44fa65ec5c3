"""What callers do with rollouts: look, and take a hand. The loop moves them; see `rollout_loop`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from penstock_kit.errors import FailedPrecondition, NotFound, Reason
from penstock_scheduler.domain.deployment import Deployment, Target
from penstock_scheduler.domain.rollout import Rollout, RolloutState
from penstock_scheduler.domain.rollout.decide import take_back
from penstock_scheduler.usecases.latest import Latest
from penstock_scheduler.usecases.ports import Wakeup, Work, Works
from penstock_scheduler.usecases.reconcile import Gist

LATEST = 0
"""Number that stands for a deployment's latest rollout."""


class Rollouts:
    """What callers do with rollouts.

    Args:
        works: opens transactions.
        wakeup: told of every change.
        changes: the loop's news, for those who watch.
    """

    def __init__(self, works: Works, wakeup: Wakeup, changes: Latest[Mapping[str, Gist]]) -> None:
        self._works = works
        self._wakeup = wakeup
        self._changes = changes

    async def get(self, name: str, number: int) -> Rollout:
        """One rollout; `LATEST` is the latest.

        Raises:
            NotFound: there is no such deployment or rollout.
        """
        async with self._works() as work:
            return await self._find(work, name, number)

    async def page(self, name: str, before: int, limit: int) -> Sequence[Rollout]:
        """The rollouts of a deployment, newest first, below the number `before` (0: all).

        Raises:
            NotFound: there is no such deployment.
        """
        async with self._works() as work:
            return await work.rollouts.page(await _deployment(work, name), before, limit)

    async def watch(self, name: str, number: int) -> AsyncIterator[Rollout]:
        """Gives the rollout at once and after every change, until it has ended.

        Raises:
            NotFound: there is no such deployment or rollout, or it is gone.
        """
        generation = self._changes.generation
        sent = await self.get(name, number)
        yield sent
        while not sent.ended:
            generation, _ = await self._changes.newer(generation)
            now = await self.get(name, sent.number)
            if now != sent:
                sent = now
                yield sent

    async def pause(self, name: str, number: int) -> Rollout:
        """Holds it where it is; its guards still look. Pausing it twice is no error.

        Raises:
            NotFound: there is no such deployment or rollout.
            FailedPrecondition: it has ended, goes back, or has not begun to move.
        """

        def paused(deployment: Deployment, rollout: Rollout, now: datetime) -> Deployment:
            if rollout.state is RolloutState.PAUSED:
                return deployment
            _demand(deployment, rollout, "paused", RolloutState.RUNNING)
            held = rollout.advance(RolloutState.PAUSED, now, f"Paused at {rollout.percent} %.")
            return replace(deployment, rollout=held)

        return await self._hand(name, number, paused, "")

    async def resume(self, name: str, number: int) -> Rollout:
        """Lets it go on. Resuming one that runs is no error.

        Raises:
            NotFound: there is no such deployment or rollout.
            FailedPrecondition: it has ended or goes back.
        """

        def resumed(deployment: Deployment, rollout: Rollout, now: datetime) -> Deployment:
            if rollout.state is RolloutState.RUNNING:
                return deployment
            _demand(deployment, rollout, "resumed", RolloutState.PAUSED)
            words = f"Resumed at {rollout.percent} %."
            return replace(deployment, rollout=rollout.advance(RolloutState.RUNNING, now, words))

        return await self._hand(name, number, resumed, "")

    async def promote(self, name: str, number: int) -> Rollout:
        """Passes the present step, whatever the guards have seen so far.

        Raises:
            NotFound: there is no such deployment or rollout.
            FailedPrecondition: it has ended, goes back, or has no replica that would answer.
        """

        def promoted(deployment: Deployment, rollout: Rollout, now: datetime) -> Deployment:
            _demand(deployment, rollout, "promoted", RolloutState.RUNNING, RolloutState.PAUSED)
            if rollout.absent:
                raise FailedPrecondition(
                    f"Rollout {rollout.number} of {name} cannot be promoted: {rollout.message}",
                    reason=Reason.WRONG_STATE,
                    metadata={"deployment": name},
                )
            onward = rollout.next_step(now)
            serving = deployment.asked if onward.ended else deployment.serving
            return replace(deployment, rollout=onward, serving=serving)

        return await self._hand(name, number, promoted, "")

    async def abort(self, name: str, number: int, *, actor: str) -> Rollout:
        """Ends it; the earlier targets have all traffic and are asked for again, as a new revision.

        Raises:
            NotFound: there is no such deployment or rollout.
            FailedPrecondition: it has ended or goes back by itself.
        """

        def aborted(deployment: Deployment, rollout: Rollout, now: datetime) -> Deployment:
            _demand(
                deployment,
                rollout,
                "aborted",
                RolloutState.STARTING,
                RolloutState.RUNNING,
                RolloutState.PAUSED,
            )
            words = f"Aborted by {actor or 'an operator'}."
            return take_back(deployment, RolloutState.ABORTED, now, actor, words)

        return await self._hand(name, number, aborted, "aborted")

    async def live(self, name: str, moment: datetime | None) -> tuple[tuple[Target, ...], datetime]:
        """What callers of a deployment got at a moment, now without one, and since when.

        Raises:
            NotFound: nothing is known of that name at that moment.
        """
        async with self._works() as work:
            found = await work.rollouts.served_at(name, moment or datetime.now(UTC))
        if found is None:
            raise NotFound(
                f"Nothing is known of a deployment {name} at that time; it was made later, or never.",
                reason=Reason.DEPLOYMENT_NOT_FOUND,
                metadata={"deployment": name},
            )
        return found

    async def _hand(
        self,
        name: str,
        number: int,
        change: Callable[[Deployment, Rollout, datetime], Deployment],
        cause: str,
    ) -> Rollout:
        """Changes the present rollout of a deployment; nobody else changes it meanwhile."""
        async with self._works() as work:
            deployment = await _deployment(work, name, lock=True)
            rollout = await self._find(work, name, number)
            present = deployment.rollout
            if present is None or present.number != rollout.number:
                _demand(deployment, rollout, "changed any more")
                raise _unknown(name, number)
            changed = change(deployment, present, datetime.now(UTC))
            if changed is not deployment and changed.rollout is not None:
                moved = replace(changed.rollout, hands=present.hands + 1)
                changed = replace(changed, rollout=moved)
                await work.deployments.replace(changed)
                await work.rollouts.keep(changed, moved)
                if cause:
                    await work.deployments.add_revision(changed, f"rollout {moved.number} {cause}")
                await work.commit()
                present = moved
        self._wakeup.wake()
        return present

    async def _find(self, work: Work, name: str, number: int) -> Rollout:
        deployment = await _deployment(work, name)
        if number == LATEST:
            newest = await work.rollouts.page(deployment, 0, 1)
            found = newest[0] if newest else None
        else:
            found = await work.rollouts.get(deployment, number)
        if found is None:
            raise _unknown(name, number)
        return found


def _demand(deployment: Deployment, rollout: Rollout, verb: str, *states: RolloutState) -> None:
    if rollout.state not in states:
        words = f" {rollout.message}" if rollout.message else ""
        raise FailedPrecondition(
            f"Rollout {rollout.number} of {deployment.name} is {rollout.state.name} and cannot be {verb}."
            f"{words}",
            reason=Reason.WRONG_STATE,
            metadata={
                "deployment": deployment.name,
                "rollout": str(rollout.number),
                "state": rollout.state.name,
            },
        )


async def _deployment(work: Work, name: str, *, lock: bool = False) -> Deployment:
    deployment = await work.deployments.get(name, lock=lock)
    if deployment is None:
        raise NotFound(
            f"There is no deployment {name}; list them with `penstock deployments`.",
            reason=Reason.DEPLOYMENT_NOT_FOUND,
            metadata={"deployment": name},
        )
    return deployment


def _unknown(name: str, number: int) -> NotFound:
    which = f"rollout {number}" if number else "rollout"
    return NotFound(
        f"Deployment {name} has no {which}; list them with `penstock rollout list {name}`. A rollout begins "
        "when a deployment with a rollout policy is given a new version.",
        metadata={"deployment": name},
    )
