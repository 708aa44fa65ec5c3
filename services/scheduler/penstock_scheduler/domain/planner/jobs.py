"""Moves jobs along their states: what agents and the registry say, restarts, cancelling, making room.

Only the leader's loop changes a job's state, here, in one transaction with its tasks and what they hold; so a
job ends in one terminal state, however many things happen to it at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from penstock_scheduler.domain.job import (
    Job,
    JobState,
    ObservedTask,
    Order,
    RegistryWord,
    Stop,
    Task,
    TaskState,
)
from penstock_scheduler.domain.node import Node, NodeState, Report
from penstock_scheduler.domain.planner.feasible import Placement

TIMEOUT = "TIMEOUT"
NOT_STARTED = "NOT_STARTED"
RESULT_REFUSED = "RESULT_REFUSED"
UNKNOWN_FAILURE = "FAILED"
AGENT_RESTARTED = "AGENT_RESTARTED"
"""An agent's word for a task that cannot go on because the agent itself was ended."""

GROWS = "it starts again with more of its tasks, for which there is room now."
FINALIZING = "Its results are being made final."
LONGEST_BACK_OFF = timedelta(seconds=60)
MANY_ATTEMPTS = 5
SHORT_ATTEMPT = timedelta(seconds=30)
"""A job whose many attempts were short on average leaves its nodes: they may be what ends them."""
_NOTHING = RegistryWord()


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """How long jobs' agents are waited for.

    Attributes:
        start_seconds: an agent that is connected takes up a new task within so long, or it never will.
        checkpoint_seconds: a task that makes room ends within so long, or it is ended.
        grow_seconds: a job that goes on with fewer tasks than it asked for runs for so long before it starts
            again with more, for which there is room by then.
        return_seconds: a job waits for so long for a node that was lost with its newest checkpoint, before
            it goes on elsewhere, or with fewer tasks. Longer than an agent takes to be started again.
        events_seconds: the events of a task that has ended are waited for so long; agents send what was lost
            again after 10 s.
    """

    start_seconds: float = 30.0
    checkpoint_seconds: float = 60.0
    grow_seconds: float = 180.0
    return_seconds: float = 15.0
    events_seconds: float = 15.0


DEFAULT_JOB_POLICY = JobPolicy()


def back_off(failures: int) -> timedelta:
    """How long a job waits after so many failures: 1, 2, 4 … 60 s."""
    return min(timedelta(seconds=2.0 ** min(failures - 1, 10)), LONGEST_BACK_OFF)


class JobDraft:
    """The jobs as they would be, while the plan is made.

    Args:
        jobs: those of the snapshot.
        tasks: likewise.
        now: the moment.
        policy: how long agents are waited for.
    """

    def __init__(
        self,
        jobs: Mapping[str, Job],
        tasks: Mapping[str, Task],
        now: datetime,
        policy: JobPolicy = DEFAULT_JOB_POLICY,
    ) -> None:
        self._before = jobs
        self._tasks_before = tasks
        self._now = now
        self._policy = policy
        self.jobs = dict(jobs)
        self.tasks = {id_: task for id_, task in tasks.items() if task.state is not TaskState.STOPPED}
        self._of: dict[str, list[str]] = defaultdict(list)
        self._on: dict[str, list[str]] = defaultdict(list)
        self._lost: dict[str, str] = {}
        self._failed: dict[str, list[tuple[Task, ObservedTask]]] = defaultdict(list)
        self._done: dict[str, ObservedTask] = {}
        self._made: dict[str, list[str]] = defaultdict(list)
        for id_, task in self.tasks.items():
            self._of[task.job].append(id_)
            self._on[task.node].append(id_)

    # -- what is there ----------------------------------------------------------------------------

    def holding(self, node: str) -> list[Task]:
        """The tasks that hold a part of a node."""
        return [task for id_ in self._on[node] if (task := self.tasks[id_]).placed]

    def tasks_of(self, job: str) -> list[Task]:
        """The tasks of a job that hold something."""
        return [task for id_ in self._of[job] if (task := self.tasks[id_]).placed]

    def waiting(self) -> list[Job]:
        """The jobs that wait for a place and whose turn has come."""
        return [job for job in self.jobs.values() if not job.cancelling and job.waits(self._now)]

    def homes(self, job: Job) -> tuple[str, ...]:
        """The nodes where a job that waits should go on."""
        return () if _ends_soon(job) else job.homes

    def shunned(self, job: Job) -> tuple[str, ...]:
        """The nodes that it should leave, if there are others."""
        return job.homes if _ends_soon(job) else ()

    def awaited(self, job: Job, nodes: Mapping[str, Node], reports: Mapping[str, Report]) -> str:
        """Why a job waits for a node to come back; empty if it waits for none."""
        for name in self.homes(job):
            node = nodes.get(name)
            if node is None or node.state is not NodeState.LOST or node.cordoned:
                continue
            heard = node.last_seen_time or job.update_time
            report = reports.get(name)
            if report is not None and report.node is None:
                # It could not be heard before this scheduler began to lead.
                heard = max(heard, self._now - timedelta(seconds=report.silent_seconds))
            until = heard + timedelta(seconds=self._policy.return_seconds)
            if self._now < until:
                why = f"nodes/{name} may have its newest checkpoint"
                return f"{why}, and is waited for until {until:%H:%M:%S} UTC."
        return ""

    def smaller(self) -> list[Job]:
        """The jobs that have run for long enough with fewer tasks than they asked for."""
        since = self._now - timedelta(seconds=self._policy.grow_seconds)
        return [
            job
            for job in self.jobs.values()
            if job.gang.least < job.gang.tasks
            and job.state is JobState.RUNNING
            and not job.cancelling
            and job.placed_time is not None
            and job.placed_time <= since
            and self._works_smaller(job)
        ]

    def _works_smaller(self, job: Job) -> bool:
        """Whether its attempt began with fewer tasks than it asked for, and none of them has ended.

        Tasks that have ended hold nothing any more, while the first publishes what all of them made.
        """
        working = [task for task in self.tasks_of(job.id) if task.working]
        began_with = job.tasks_made - working[0].number + working[0].index if working else 0
        return 0 < len(working) == began_with < job.gang.tasks

    # -- stages, in order -------------------------------------------------------------------------

    def lose(self, node: str, why: str) -> None:
        """Gives up the tasks of a node that is gone or became too small."""
        for task in self.holding(node):
            self.tasks[task.id] = task.stopped(self._now, why)
            self._lost[task.job] = why

    def follow(self, reports: Mapping[str, Report], nodes: Mapping[str, Node]) -> None:
        """Takes up what agents say of their tasks."""
        for name, report in reports.items():
            node = nodes.get(name)
            if report.node is None or node is None or node.state is not NodeState.READY:
                continue
            for task in self.holding(name):
                self.tasks[task.id] = self._observe(task, report.tasks.get(task.id))

    def move(self, registry: Mapping[str, RegistryWord], nodes: Mapping[str, Node]) -> None:
        """Moves every job as far as it goes."""
        for id_, job in self.jobs.items():
            job = self._remember(job)
            word = registry.get(id_, _NOTHING)
            if job.ended:
                job = self._clean(job, word)
            elif job.state is JobState.QUEUED and job.cancelling:
                job = self._end(job, JobState.CANCELLED, job.message)
            if job.state in (JobState.STARTING, JobState.RUNNING):
                job = self._work(job, nodes)
            self._let_go(job)
            if job.state is JobState.STOPPING:
                job = self._stop(job)
            if job.state is JobState.FINALIZING:
                job = self._finalize(job, word)
            self.jobs[id_] = job

    def make_room(self, job_id: str, why: str) -> None:
        """Has a job write a checkpoint and go back into the queue."""
        job = self.jobs[job_id]
        if job.state in (JobState.STARTING, JobState.RUNNING):
            self.jobs[job_id] = self._begin_stop(job, Stop.YIELD, why)

    def seat(self, job_id: str, places: Iterable[Placement]) -> None:
        """Starts an attempt of a job that waits, a task at each place."""
        job, now = self.jobs[job_id], self._now
        attempt, number = job.attempt + 1, job.tasks_made
        seated = list(places)
        for index, place in enumerate(seated):
            task = Task(
                job=job_id,
                number=number + index,
                index=index,
                attempt=attempt,
                resources=job.gang.resources,
                create_time=now,
                update_time=now,
                state=TaskState.STARTING,
                node=place.usage.node.name,
                devices=place.devices,
            )
            self.tasks[task.id] = task
            self._of[job_id].append(task.id)
            self._on[task.node].append(task.id)
        self.jobs[job_id] = replace(
            job.advance(JobState.STARTING, now, "Its processes start."),
            attempt=attempt,
            tasks_made=number + len(seated),
            start_time=job.start_time or now,
            placed_time=now,
            not_before=None,
        )

    def explain(self, reasons: Mapping[str, str]) -> None:
        """Says of jobs that go on waiting why."""
        for id_, why in reasons.items():
            self.jobs[id_] = self.jobs[id_].says(why, self._now)

    def changed_jobs(self) -> tuple[Job, ...]:
        """Those that differ from the snapshot."""
        return tuple(job for id_, job in self.jobs.items() if _differs(self._before.get(id_), job))

    def changed_tasks(self) -> tuple[Task, ...]:
        """Those that differ from the snapshot."""
        return tuple(task for id_, task in self.tasks.items() if _differs(self._tasks_before.get(id_), task))

    # -- tasks ------------------------------------------------------------------------------------

    def _observe(self, task: Task, seen: ObservedTask | None) -> Task:
        """The task as its agent sees it; `None` means that the agent does not have it."""
        if seen is not None and task.working:
            if seen.state is TaskState.FAILED and seen.failure_reason == AGENT_RESTARTED:
                self._lost[task.job] = f"The agent of nodes/{task.node} was restarted."
            elif seen.state is TaskState.FAILED:
                self._failed[task.job].append((task, seen))
            if seen.state is TaskState.SUCCEEDED and task.index == 0:
                self._done[task.job] = seen
            self._made[task.job].extend(seen.results)
        if task.order is Order.END:
            runs = seen is not None and seen.state in (TaskState.STARTING, TaskState.RUNNING)
            return task if runs else task.stopped(self._now, task.message if seen is None else seen.message)
        if seen is None or seen.state in (TaskState.STOPPED, TaskState.PENDING):
            return self._observe_gone(task, seen)
        moved = replace(
            task,
            state=seen.state if task.working else task.state,
            message=seen.message,
            pid=seen.pid,
            rendezvous=seen.rendezvous,
        )
        if moved.working:
            return replace(moved, update_time=self._now) if moved.state is not task.state else moved
        # While it works its events come and come, and are no news.
        return replace(
            moved, last_event=seen.last_event, update_time=self._now if task.working else task.update_time
        )

    def _observe_gone(self, task: Task, seen: ObservedTask | None) -> Task:
        """A task that should run, and of which nothing does."""
        if task.order is Order.STOP and task.working and seen is not None and seen.last_event:
            # It stays in the desired state until its last events are stored: its agent forgets them then.
            if seen.last_event != task.last_event:
                return replace(task, last_event=seen.last_event, update_time=self._now)
            return task if self._awaits_events(task) else task.stopped(self._now, seen.message)
        if not task.working or task.order is Order.STOP:
            return task.stopped(self._now, task.message if seen is None else seen.message)
        if seen is None and task.state is TaskState.STARTING:
            # Its agent may not have heard of it yet.
            if (self._now - task.update_time).total_seconds() <= self._policy.start_seconds:
                return task
            why = f"nodes/{task.node} did not take it up for {self._policy.start_seconds:g} s."
            silent = ObservedTask(TaskState.FAILED, why, failure_reason=NOT_STARTED)
            self._failed[task.job].append((task, silent))
            return task.stopped(self._now, why)
        why = f"The agent of nodes/{task.node} was restarted."
        self._lost[task.job] = why
        return task.stopped(self._now, why)

    def _let_go(self, job: Job) -> None:
        """Frees tasks that have ended, once their events are stored or were waited for long enough."""
        for task in self.tasks_of(job.id):
            if not task.working and not self._awaits_events(task):
                self.tasks[task.id] = task.stopped(self._now)

    def _awaits_events(self, task: Task) -> bool:
        """Whether events of a task that has ended are still to be stored, and worth waiting for."""
        waited = (self._now - task.update_time).total_seconds()
        return task.stored_event < task.last_event and waited <= self._policy.events_seconds

    def _order(self, job: Job, order: Order) -> None:
        for task in self.tasks_of(job.id):
            if task.working:
                self.tasks[task.id] = task.told(order, self._now)

    # -- jobs -------------------------------------------------------------------------------------

    def _work(self, job: Job, nodes: Mapping[str, Node]) -> Job:
        """STARTING and RUNNING."""
        if job.cancelling:
            return self._begin_stop(job, Stop.CANCEL, job.message)
        if job.id in self._done:
            return self._finish(job)
        if failed := self._failed.get(job.id):
            # The one that says most counts: the others fail because it did.
            task, seen = max(failed, key=lambda each: (each[1].permanent, -each[0].index))
            why = seen.message or f"Task {task.index} on nodes/{task.node} failed."
            known = replace(job, failure_reason=seen.failure_reason or UNKNOWN_FAILURE)
            return self._begin_stop(known, Stop.FAIL if seen.permanent else Stop.RETRY, why)
        if job.id in self._lost:
            return self._begin_stop(job, Stop.LOSS, self._lost[job.id])
        if job.timeout and job.ran_for(self._now) > job.timeout:
            why = f"It ran for longer than its timeout, {job.timeout.total_seconds():g} s."
            return self._begin_stop(replace(job, failure_reason=TIMEOUT), Stop.FAIL, why)
        tasks = self.tasks_of(job.id)
        for task in tasks:
            node = nodes.get(task.node)
            if node is not None and node.draining:
                return self._begin_stop(job, Stop.YIELD, f"nodes/{task.node} is being drained.")
        if job.state is JobState.STARTING and all(task.state is not TaskState.STARTING for task in tasks):
            homes = tuple(sorted({task.node for task in tasks})) if job.gang.keeps else ()
            return replace(job, homes=homes).advance(JobState.RUNNING, self._now)
        return job

    def _begin_stop(self, job: Job, stop: Stop, why: str) -> Job:
        self._order(job, Order.STOP if stop is Stop.YIELD else Order.END)
        moved = replace(job, stop=stop, ran=job.ran_for(self._now), placed_time=None)
        return moved.advance(JobState.STOPPING, self._now, why)

    def _finish(self, job: Job) -> Job:
        """The leading task has all there is to have, whatever became of the others."""
        done = self._done[job.id]
        self._order(job, Order.END)
        finished = replace(
            job,
            results=tuple(dict.fromkeys(done.results)),
            report=done.report,
            ran=job.ran_for(self._now),
            placed_time=None,
            stop=None,
            failure_reason="",
        )
        return finished.advance(JobState.FINALIZING, self._now, FINALIZING)

    def _stop(self, job: Job) -> Job:
        """STOPPING: what was decided may still change, until nothing is held any more."""
        job = self._decide_again(job)
        if job.id in self._done and job.stop not in (Stop.CANCEL, Stop.FAIL):
            return self._finish(job)
        if self.tasks_of(job.id):
            since = (self._now - job.update_time).total_seconds()
            if job.stop is Stop.YIELD and since > self._policy.checkpoint_seconds:
                self._order(job, Order.END)
            return job
        match job.stop:
            case Stop.CANCEL:
                return self._end(job, JobState.CANCELLED, job.message)
            case Stop.FAIL:
                return self._end(job, JobState.FAILED, job.message)
            case Stop.RETRY if job.restarts >= job.max_restarts:
                times = f" It was started again {job.restarts} times before." if job.restarts else ""
                return self._end(job, JobState.FAILED, job.message + times)
        return self._queue(job)

    def _queue(self, job: Job) -> Job:
        """Back into the queue, to start again from the last checkpoint."""
        now = self._now
        again = replace(job, stop=None, failure_reason="", not_before=None)
        if job.stop is Stop.RETRY:
            restarts = job.restarts + 1
            turn = now + back_off(restarts)
            again = replace(again, restarts=restarts, not_before=turn)
            words = (
                f"It starts again after {turn:%H:%M:%S} UTC, {restarts} of {job.max_restarts}: {job.message}"
            )
        elif job.stop is Stop.LOSS:
            # A job that takes its nodes down with it must not do so many times a second.
            turn_after_loss = now + back_off(job.losses) if job.losses else None
            again = replace(again, losses=job.losses + 1, not_before=turn_after_loss)
            words = f"It starts again: {job.message}"
        else:
            words = f"It made room: {job.message}"
        return again.advance(JobState.QUEUED, now, words)

    def _decide_again(self, job: Job) -> Job:
        """Who cancels comes first, then what cannot be done, then a node that was lost."""
        if job.cancelling:
            if job.stop is Stop.CANCEL:
                return job
            stop, reason, why = Stop.CANCEL, "", job.message
        elif job.stop is Stop.FAIL:
            return job
        elif permanent := [seen for _, seen in self._failed.get(job.id, ()) if seen.permanent]:
            stop, reason = Stop.FAIL, permanent[0].failure_reason or UNKNOWN_FAILURE
            why = permanent[0].message
        elif job.id in self._lost and job.stop is Stop.RETRY:
            # The others failed because a node was gone, before anybody knew.
            stop, reason, why = Stop.LOSS, "", self._lost[job.id]
        else:
            return job
        self._order(job, Order.END)
        return replace(job, stop=stop, failure_reason=reason, message=why, update_time=self._now)

    def _finalize(self, job: Job, word: RegistryWord) -> Job:
        if self.tasks_of(job.id):
            return job
        if word.refusal:
            refused = replace(job, failure_reason=RESULT_REFUSED)
            return self._end(refused, JobState.FAILED, word.refusal)
        if word.final or not job.results:
            return self._end(job, JobState.SUCCEEDED, word.note)
        return job.says(f"{FINALIZING} {word.problem}".strip(), self._now)

    def _end(self, job: Job, state: JobState, why: str) -> Job:
        made = dict.fromkeys((*job.leftovers, *job.results))
        kept = job.results if state is JobState.SUCCEEDED else ()
        leftovers = tuple(name for name in made if name not in kept)
        report = job.report if state is JobState.SUCCEEDED else b""
        ended = replace(job, results=kept, leftovers=leftovers, report=report, stop=None, not_before=None)
        return ended.advance(state, self._now, why)

    def _clean(self, job: Job, word: RegistryWord) -> Job:
        left = tuple(name for name in job.leftovers if name not in word.deleted)
        return job if left == job.leftovers else replace(job, leftovers=left)

    def _remember(self, job: Job) -> Job:
        """Keeps in mind what its tasks made, to be deleted when it has ended, unless it is its result."""
        fresh = [name for name in dict.fromkeys(self._made.get(job.id, ())) if name not in job.leftovers]
        return replace(job, leftovers=(*job.leftovers, *fresh)) if fresh else job


def _ends_soon(job: Job) -> bool:
    return job.attempt >= MANY_ATTEMPTS and job.ran < job.attempt * SHORT_ATTEMPT


def _differs(old: object, new: object) -> bool:
    return old is not new and old != new
