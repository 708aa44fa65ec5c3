"""The streams of the agents: what they report, what they are told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from penstock_kit.errors import Aborted, PenstockError, Reason, Unavailable
from penstock_scheduler.domain.job import Job, ObservedTask, Order, Task
from penstock_scheduler.domain.node import Node, NodeState, Report
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.replica import Observed, Replica, ReplicaState
from penstock_scheduler.domain.version import Version
from penstock_scheduler.usecases.ports import Wakeup

log = logging.getLogger(__name__)

STORED_SECONDS = 1.5
"""How often an agent is told what is stored of its tasks' events, if nothing else is new."""


@dataclass(frozen=True, slots=True)
class Desired:
    """One replica that should run on a node."""

    replica: Replica
    version: Version
    handed_over: bool = False
    """Others read the same queue, so that it finishes only what it has begun."""

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new."""
        return self.replica.state is ReplicaState.DRAINING


@dataclass(frozen=True, slots=True)
class DesiredTask:
    """One task of a job that should run on a node, or has ended and is not forgotten yet."""

    task: Task
    job: Job
    tasks: int
    """How many the attempt has."""
    rendezvous: str = ""
    """Where the ranks meet, once the leading task has said it; never for itself."""

    @property
    def stopping(self) -> bool:
        """Whether it is to write a checkpoint and end."""
        return self.task.order is Order.STOP


@dataclass(frozen=True, slots=True)
class Wanted:
    """The desired state of a node; its generation grows with every change."""

    generation: int
    replicas: tuple[Desired, ...]
    tasks: tuple[DesiredTask, ...] = ()


class Session:
    """One attached stream of one node."""

    def __init__(self, node: str, wanted: Wanted | None, instance: str = "") -> None:
        self.node = node
        self.instance = instance
        self._wanted = wanted
        self._ended = False
        self._why: PenstockError | None = None
        self._news = asyncio.Event()

    def tell(self, wanted: Wanted) -> None:
        """Gives a new desired state to the stream; one that was not fetched yet is replaced."""
        self._wanted = wanted
        self._news.set()

    def end(self, why: PenstockError | None) -> None:
        """Makes the stream end, with an error if there is one; the first reason counts."""
        if not self._ended:
            self._ended, self._why = True, why
            self._news.set()

    async def next(self) -> Wanted | None:
        """Waits for a desired state that was not fetched yet; None once the stream is to end.

        Raises:
            PenstockError: the stream is to end with this error.
        """
        while True:
            if self._ended:
                if self._why is not None:
                    raise self._why
                return None
            wanted, self._wanted = self._wanted, None
            if wanted is not None:
                return wanted
            self._news.clear()
            await self._news.wait()


class _Heard:
    """What is known of a node's agent."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.session: Session | None = None
        self.node: Node | None = None
        self.replicas: Mapping[str, Observed] = {}
        self.tasks: Mapping[str, ObservedTask] = {}


class AttachHub:
    """All attached streams, and the last report of every node.

    Reports are kept in memory only: they are sent anew every second. Desired states are published
    by the reconcile loop, never before it has read the database.
    """

    def __init__(self, wakeup: Wakeup, clock: Callable[[], float] = time.monotonic) -> None:
        self._wakeup = wakeup
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._wanted: dict[str, Wanted] = {}
        self._told_at: dict[str, float] = {}
        self._closed: Unavailable | None = None
        # Which installation bears the name of each node that is not LOST; None before the database was read.
        self._owners: Mapping[str, str] | None = None
        self._informed = asyncio.Event()

    async def informed(self, seconds: float) -> None:
        """Waits, so long at most, until the database was read, which says whose the names are."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._informed.wait()

    def open(self, node: str, instance: str = "") -> Session:
        """Begins a stream; an earlier one of the same installation ends.

        A name belongs to the installation that bears it until its node is LOST, also over a change of the
        scheduler that leads: were another one told what runs there, replicas would run twice.

        Args:
            node: its name.
            instance: which installation of a worker it is; empty if it does not say, and then all are one.

        Raises:
            Unavailable: another scheduler leads, this one is stopping, or it does not know yet whose the
                name is.
            Aborted: the name is another installation's; reason CONFLICT.
        """
        if self._closed is not None:
            raise self._closed
        if instance and self._owners is None:
            raise Unavailable(
                "The scheduler has not read its database yet; attach again.",
                reason=Reason.DEPENDENCY_UNAVAILABLE,
                retry_after_seconds=0.1,
            )
        owner = (self._owners or {}).get(node, "")
        heard = self._heard.setdefault(node, _Heard(self._clock()))
        holder = heard.session.instance if heard.session is not None else ""
        if instance and (owner or holder or instance) != instance:
            raise Aborted(
                f"Another machine is nodes/{node}; give every worker a name of its own. If that machine is "
                "gone, the name is free as soon as its node is LOST.",
                reason=Reason.CONFLICT,
                metadata={"node": node},
            )
        if heard.session is not None:
            heard.session.end(
                Aborted(
                    f"Another agent attached as nodes/{node}; give every worker a name of its own.",
                    reason=Reason.CONFLICT,
                    metadata={"node": node},
                )
            )
        heard.session = Session(node, self._wanted.get(node), instance)
        return heard.session

    def close(self, session: Session) -> None:
        """Ends a stream; the node's lease begins to run."""
        heard = self._heard.get(session.node)
        if heard is not None and heard.session is session:
            heard.session = None
            heard.at = self._clock()
            self._wakeup.wake()

    def report(
        self,
        session: Session,
        node: Node,
        replicas: Mapping[str, Observed],
        tasks: Mapping[str, ObservedTask],
    ) -> None:
        """Takes up a report; wakes the reconcile loop if it says anything new."""
        heard = self._heard.get(session.node)
        if heard is None or heard.session is not session:
            return
        heard.at = self._clock()
        news = node != heard.node or replicas != heard.replicas or tasks != heard.tasks
        # Kept in any case: how much memory replicas use is no news, but the next pass looks at it.
        heard.node, heard.replicas, heard.tasks = node, replicas, tasks
        if news:
            self._wakeup.wake()

    def silence(self, node: str) -> float | None:
        """Seconds since this scheduler heard of a node; None if it never did."""
        heard = self._heard.get(node)
        return None if heard is None or heard.node is None else max(0.0, self._clock() - heard.at)

    def reports(self, expected: Collection[str], since: float) -> Mapping[str, Report]:
        """The last word of every node.

        Args:
            expected: nodes that should be attached; one that was never heard is counted as silent.
            since: on the hub's clock, when this scheduler began to lead: silence before that is
                not the node's.
        """
        now = self._clock()
        reports = {
            name: Report(h.node, h.replicas, h.session is not None, max(0.0, now - max(h.at, since)), h.tasks)
            for name, h in self._heard.items()
            if h.node is not None or name in expected
        }
        for name in expected:
            if name not in reports:
                # Late, not gone: it may hang on the scheduler that led before, and has to notice.
                reports[name] = Report(None, {}, True, max(0.0, now - since))
        return reports

    def publish(self, snapshot: Snapshot) -> None:
        """Makes every node's desired state what the snapshot says."""
        self._owners = {
            name: node.instance for name, node in snapshot.nodes.items() if node.state is NodeState.READY
        }
        self._informed.set()
        per_node: dict[str, list[Desired]] = {name: [] for name in snapshot.nodes}
        answering = {
            (replica.deployment, replica.version)
            for replica in snapshot.replicas.values()
            if replica.state is ReplicaState.READY
        }
        for replica in snapshot.replicas.values():
            if replica.placed:
                ending = replica.state is ReplicaState.DRAINING
                handed_over = ending and (replica.deployment, replica.version) in answering
                ordered = Desired(replica, snapshot.versions[replica.version], handed_over)
                per_node[replica.node].append(ordered)
        tasks_per_node = _tasks_by_node(snapshot)
        for name, desired in per_node.items():
            replicas = tuple(sorted(desired, key=lambda d: d.replica.id))
            tasks = tuple(tasks_per_node[name])
            known = self._wanted.get(name)
            # A replica's spec never changes but for draining and what was measured of its version; its
            # state is the agent's own news.
            if known is not None and _gist(known.replicas) == _gist(replicas):
                before, now = _task_gist(known.tasks), _task_gist(tasks)
                if before == now and (_stored(known.tasks) == _stored(tasks) or not self._due(name)):
                    continue
            self._told_at[name] = self._clock()
            # The time keeps generations growing over restarts of the scheduler.
            generation = max(known.generation + 1 if known else 1, time.time_ns() // 1000)
            self._wanted[name] = wanted = Wanted(generation, replicas, tasks)
            heard = self._heard.get(name)
            if heard is not None and heard.session is not None:
                heard.session.tell(wanted)

    def _due(self, node: str) -> bool:
        """Whether an agent is to hear again how many events are stored: it needs that to clear up only."""
        return self._clock() - self._told_at.get(node, float("-inf")) >= STORED_SECONDS

    def follow(self, leading: bool) -> None:
        """Opens the door while this scheduler leads; ends every stream when another one does."""
        if leading:
            self._closed = None
        else:
            self._end_all(
                Unavailable(
                    "Another scheduler leads, or may by now; attach there.",
                    reason=Reason.DEPENDENCY_UNAVAILABLE,
                    retry_after_seconds=1.0,
                )
            )
            # What was heard and told grows old while another scheduler leads.
            self._heard.clear()
            self._wanted.clear()
            self._told_at.clear()
            self._owners = None
            self._informed.clear()

    def stop(self) -> None:
        """Ends every stream for good."""
        self._end_all(Unavailable("The scheduler is stopping; attach again.", reason=Reason.SHUTTING_DOWN))

    def _end_all(self, why: Unavailable) -> None:
        self._closed = why
        for heard in self._heard.values():
            if heard.session is not None:
                heard.session.end(why)


def _gist(desired: tuple[Desired, ...]) -> tuple[tuple[str, bool, int], ...]:
    return tuple((d.replica.id, d.draining, d.version.revision) for d in desired)


def _task_gist(desired: tuple[DesiredTask, ...]) -> tuple[tuple[object, ...], ...]:
    return tuple((d.task.id, d.task.order, d.rendezvous) for d in desired)


def _stored(desired: tuple[DesiredTask, ...]) -> tuple[int, ...]:
    return tuple(d.task.stored_event for d in desired)


def _tasks_by_node(snapshot: Snapshot) -> Mapping[str, list[DesiredTask]]:
    """What agents are told of tasks: those that are to run or to stop, and those whose events are missing."""
    leaders: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for task in snapshot.tasks.values():
        if task.attempt == snapshot.jobs[task.job].attempt:
            counts[task.job] += 1
            if task.index == 0:
                leaders[task.job] = task.rendezvous
    per_node: dict[str, list[DesiredTask]] = defaultdict(list)
    for id_ in sorted(snapshot.tasks):
        task = snapshot.tasks[id_]
        if not task.placed or task.order is Order.END:
            continue
        rendezvous = leaders.get(task.job, "") if task.index else ""
        job = snapshot.jobs[task.job]
        per_node[task.node].append(DesiredTask(task, job, counts[task.job], rendezvous))
    return per_node
