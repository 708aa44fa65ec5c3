"""The loop that makes the cluster what is asked for."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from penstock_kit.errors import Aborted, Internal, PenstockError
from penstock_scheduler.domain.deployment import Deployment
from penstock_scheduler.domain.node import NodeState
from penstock_scheduler.domain.planner import Plan, Policy, Snapshot, plan
from penstock_scheduler.domain.replica import ReplicaState
from penstock_scheduler.domain.routes import Route, routes_of
from penstock_scheduler.usecases import metrics
from penstock_scheduler.usecases.attach import AttachHub
from penstock_scheduler.usecases.autoscaling import Autoscaler
from penstock_scheduler.usecases.job_ports import JobMark
from penstock_scheduler.usecases.job_results import JobResults
from penstock_scheduler.usecases.latest import Latest
from penstock_scheduler.usecases.ports import ClusterStore, Leadership, Stored, Works
from penstock_scheduler.usecases.rollout_loop import RolloutLoop
from penstock_scheduler.usecases.traffic import Traffic
from penstock_scheduler.usecases.wake import Wake

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
RETRY_SECONDS = 0.3
LATE_SECONDS = 2.0
LISTEN_SECONDS = 0.5
DOUBT_SECONDS = 6.0
"""Others depose a leader that the database did not hear of for about so long."""
PRUNE_EVERY_SECONDS = 3600.0
KEEP_STOPPED = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Gist:
    """What a watcher of a deployment would see change."""

    deployment: Deployment
    ready: tuple[tuple[str, bool], ...]


class Reconciler:
    """Loads a snapshot, plans, applies the plan in one transaction, and publishes what follows.

    Level-triggered: every pass looks at everything, so that a lost or repeated message costs
    nothing. While another scheduler leads, it only publishes what the database says.

    Args:
        works: opens transactions.
        leadership: who leads.
        hub: the agents' streams.
        wake: wakes the loop.
        policy: what the operator decided.
        traffic: what gateways report.
        results: makes results of jobs final, or deletes them.
        plan: the planner; tests give another.
    """

    def __init__(
        self,
        works: Works,
        leadership: Leadership,
        hub: AttachHub,
        wake: Wake,
        policy: Policy,
        traffic: Traffic,
        results: JobResults,
        *,
        plan: Callable[[Snapshot, Policy], Plan] = plan,
    ) -> None:
        self._works = works
        self._leadership = leadership
        self._hub = hub
        self._wake = wake
        self._policy = policy
        self._traffic = traffic
        self._results = results
        self._plan = plan
        self._rollouts = RolloutLoop(traffic)
        self._autoscaler = Autoscaler(traffic)
        self._epoch: int | None = None
        self._led_since = 0.0
        self._awake_at = float("-inf")
        self._checked_lead = float("-inf")
        self._pruned = float("-inf")
        self.routes: Latest[tuple[Route, ...]] = Latest()
        self.deployments: Latest[Mapping[str, Gist]] = Latest()
        self.jobs: Latest[Mapping[str, JobMark]] = Latest()
        self.healthy: Latest[bool] = Latest()
        self.healthy.set(False)

    @property
    def leading(self) -> bool:
        """Whether this scheduler led when it last looked."""
        return self._epoch is not None

    async def run(self) -> None:
        """Works until cancelled. While the database is away, what was last published stays."""
        while True:
            try:
                await self.step()
            except PenstockError as error:
                if self.healthy.get():
                    log.warning("the cluster is left as it is: %s", error)
                self.healthy.set(False)
                self._doubt()
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                # A fault of ours: the supervisor logs it and starts this loop again.
                self.healthy.set(False)
                raise
            else:
                await self._wake.wait(TICK_SECONDS)

    async def listen(self) -> None:
        """Notices pauses of this process, until cancelled: a pass that takes long is none."""
        while True:
            self._notice_pause()
            await asyncio.sleep(LISTEN_SECONDS)

    async def step(self) -> None:
        """One pass."""
        with metrics.PASS_SECONDS.time():
            await self._step()

    async def _step(self) -> None:
        self._notice_pause()
        await self._follow_lead()
        try:
            async with self._works() as work:
                stored = await work.cluster.load()
                snapshot = self._snapshot(stored)
                if self._epoch is not None:
                    before = snapshot
                    snapshot = await self._rollouts.move(work, snapshot, self._epoch)
                    snapshot, scaled = self._autoscaler.scale(snapshot, self._epoch)
                    changes = await asyncio.to_thread(self._plan, snapshot, self._policy)
                    changes = changes.with_deployments(scaled)
                    after = changes.after(snapshot) if changes else snapshot
                    if await self._rollouts.record(work, after) or changes or snapshot is not before:
                        await work.cluster.apply(changes, self._epoch)
                        await self._prune(work.cluster)
                        await work.commit()
                        _log(snapshot, changes)
                        snapshot = after
                    self._rollouts.done()
        except Aborted:
            # Somebody changed what the plan was made for: look again at once.
            self._checked_lead = float("-inf")
            self._wake.wake()
            return
        except Internal as refused:
            # A fault of the planner: what runs goes on, and the next pass sees a newer snapshot.
            metrics.REFUSED_PLANS.inc()
            log.error("%s", refused)
            return
        self._publish(snapshot, stored.job_marks)

    def events_came(self, last_events: Mapping[str, int]) -> None:
        """Lets watchers of jobs look at events that were stored, without a pass."""
        marks = dict(self.jobs.get() or {})
        for job_id, number in last_events.items():
            if job_id in marks:
                marks[job_id] = replace(marks[job_id], last_event=max(marks[job_id].last_event, number))
        self.jobs.set(marks)

    def _notice_pause(self) -> None:
        """Begins all leases anew if this process was paused or starved.

        It did not listen meanwhile, so that the silence says nothing about the nodes. Called at
        the beginning of a pass and once more before the silence counts: a pause may fall between.
        """
        now = time.monotonic()
        if now - self._awake_at > LATE_SECONDS:
            self._led_since = now
        self._awake_at = now

    async def _follow_lead(self) -> None:
        now = time.monotonic()
        if now - self._checked_lead < TICK_SECONDS:
            return
        epoch = await self._leadership.try_lead()
        self._checked_lead = now
        if epoch != self._epoch:
            self._epoch = epoch
            self._led_since = now
            if epoch is None:
                log.info("another scheduler leads; this one answers questions")
            else:
                log.info("leading, epoch %d", epoch)
        self._hub.follow(epoch is not None)
        self._traffic.follow(epoch is not None)

    def _doubt(self) -> None:
        """Lets the agents go when the database was away for so long that another scheduler may lead by now.

        If none does, they come back as soon as the database does, and nothing stops running meanwhile.
        """
        if self._epoch is not None and time.monotonic() - self._checked_lead > DOUBT_SECONDS:
            log.warning("another scheduler may lead by now: the agents are let go")
            self._epoch = None
            self._hub.follow(False)

    def _snapshot(self, stored: Stored) -> Snapshot:
        self._notice_pause()
        # Of a node that is LOST too: jobs may wait for it.
        homes = {home for job in stored.jobs.values() for home in job.homes}
        expected = [n.name for n in stored.nodes.values() if n.state is NodeState.READY or n.name in homes]
        return Snapshot(
            now=datetime.now(UTC),
            seed=secrets.token_hex(8),
            nodes=stored.nodes,
            deployments=stored.deployments,
            replicas=stored.replicas,
            versions=stored.versions,
            reports=self._hub.reports(expected, self._led_since),
            aliases=stored.aliases,
            jobs=stored.jobs,
            projects=stored.projects,
            tasks=stored.tasks,
            registry=self._results.words(),
        )

    async def _prune(self, cluster: ClusterStore) -> None:
        now = time.monotonic()
        if now - self._pruned > PRUNE_EVERY_SECONDS:
            self._pruned = now
            await cluster.prune(datetime.now(UTC) - KEEP_STOPPED)

    def _publish(self, snapshot: Snapshot, marks: Mapping[str, JobMark]) -> None:
        metrics.count(snapshot)
        metrics.LEADING.set(self.leading)
        if self.leading:
            self._hub.publish(snapshot)
        self._traffic.keep(snapshot.deployments)
        self.routes.set(routes_of(snapshot))
        # Those that have ended are missing: their watchers look once more, and are done.
        self.jobs.set(
            {
                id_: replace(marks[id_], revision=job.revision)
                for id_, job in snapshot.jobs.items()
                if not job.ended
            }
        )
        if self.leading:
            self._results.follow(snapshot.jobs.values())
        ready: dict[str, list[tuple[str, bool]]] = {name: [] for name in snapshot.deployments}
        for replica in snapshot.replicas.values():
            ready[replica.deployment].append((replica.id, replica.state is ReplicaState.READY))
        self.deployments.set(
            {name: Gist(d, tuple(sorted(ready[name]))) for name, d in snapshot.deployments.items()}
        )
        self.healthy.set(True)


def _log(before: Snapshot, changes: Plan) -> None:
    """Says what changes state; steps on the way there are for those who look closely."""
    for node in changes.nodes:
        known = before.nodes.get(node.name)
        moved = known is None or known.state is not node.state
        log.log(_level(moved), "node %s is %s", node.name, node.state.name)
    for replica in changes.replicas:
        old = before.replicas.get(replica.id)
        moved = old is None or old.state is not replica.state
        where = f" on {replica.node}" if replica.node else ""
        log.log(
            _level(moved), "replica %s%s is %s. %s", replica.id, where, replica.state.name, replica.message
        )
    for deployment in changes.deployments:
        moved = before.deployments[deployment.name].state is not deployment.state
        log.log(
            _level(moved),
            "deployment %s is %s. %s",
            deployment.name,
            deployment.state.name,
            deployment.message,
        )
    for name in changes.removed:
        log.info("deployment %s is gone", name)
    for job in changes.jobs:
        moved = before.jobs[job.id].state is not job.state
        log.log(_level(moved), "job %s is %s. %s", job.id, job.state.name, job.message)
    for task in changes.tasks:
        known_task = before.tasks.get(task.id)
        moved = known_task is None or known_task.state is not task.state
        log.log(_level(moved), "task %s on %s is %s. %s", task.id, task.node, task.state.name, task.message)


def _level(moved: bool) -> int:
    return logging.INFO if moved else logging.DEBUG
