"""Makes the replicas that run on this node equal to those that the scheduler wants."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from penstock_worker.domain.supervision import DesiredReplica, ObservedReplica, ReplicaState
from penstock_worker.usecases.keeper import ReplicaKeeper, ReplicaPolicy, Surroundings

log = logging.getLogger(__name__)

FORGET_SECONDS = 15.0
"""What ended and is not wanted is reported STOPPED for so long: many statuses, so that one is heard."""
STOP_MARGIN_SECONDS = 15.0


class Reconciler:
    """Has one keeper for each replica, in a task of its own.

    `apply` may be called with the same state again and again, and with any state after any other. While
    nobody calls it (the scheduler is away) everything goes on as it is.
    """

    def __init__(self, policy: ReplicaPolicy, around: Surroundings) -> None:
        self.generation = 0
        self._policy = policy
        self._around = around
        self._keepers: dict[str, ReplicaKeeper] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, DesiredReplica] = {}
        self._stopping = False

    def apply(self, generation: int, replicas: Iterable[DesiredReplica]) -> None:
        """Take up a desired state: every replica that should run; all others are ended."""
        self.generation = generation
        self._wanted = {desired.replica: desired for desired in replicas}
        self.step()
        self._around.changed()

    def step(self) -> None:
        """Start, end and forget replicas as the desired state demands; called on every change."""
        if self._stopping:
            return  # All are ended already, and their ends are still to be told.
        for name, desired in self._wanted.items():
            keeper = self._keepers.get(name)
            if keeper is None:
                self._start(desired)
            elif not keeper.desired.same_process(desired) or (keeper.ending and not desired.draining):
                # The same name with other contents, or wanted again: end the one, then start the other.
                keeper.end()
                if self._has_ended(keeper):
                    del self._keepers[name]
                    self.step()
                    return
            elif desired.draining:
                keeper.end(handed_over=desired.handed_over)
            else:
                keeper.desired = desired  # What its next process begins with may be known better by now.
        now = time.monotonic()
        for name, keeper in list(self._keepers.items()):
            if name not in self._wanted:
                # The scheduler has given it up, as when this node was cut off: it may run elsewhere by now.
                keeper.end(handed_over=True)
                if self._has_ended(keeper) and now - keeper.stopped_at > FORGET_SECONDS:
                    del self._keepers[name]

    def observed(self) -> tuple[ObservedReplica, ...]:
        """Return every replica that runs or has just ended."""
        return tuple(keeper.observed() for keeper in self._keepers.values())

    def keepers(self) -> tuple[ReplicaKeeper, ...]:
        """Return the keepers of all of them."""
        return tuple(self._keepers.values())

    async def stop(self) -> None:
        """Drain all replicas at once and wait, bounded, until they have ended."""
        self._stopping = True
        for keeper in self._keepers.values():
            # What waits is for others, or for the agent that follows: under load the queue is never empty.
            keeper.end(handed_over=True)
        if self._running:
            await asyncio.wait(
                self._running.values(), timeout=self._policy.drain_seconds + STOP_MARGIN_SECONDS
            )

    def _start(self, desired: DesiredReplica) -> None:
        keeper = ReplicaKeeper(desired, self._policy, self._around)
        self._keepers[desired.replica] = keeper
        if desired.draining:
            keeper.end()  # Nothing of it runs here: it is STOPPED at once.
        task = self._around.spawn(f"replica {desired.replica}", keeper.run())
        self._running[desired.replica] = task
        task.add_done_callback(lambda _: self._ended(keeper))

    def _ended(self, keeper: ReplicaKeeper) -> None:
        del self._running[keeper.desired.replica]
        self._around.changed()
        self.step()

    @staticmethod
    def _has_ended(keeper: ReplicaKeeper) -> bool:
        return keeper.state is ReplicaState.STOPPED
