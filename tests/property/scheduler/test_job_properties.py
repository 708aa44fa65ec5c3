"""Whatever happens to jobs, in any order: gangs are whole, ends final, results of those who succeeded."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock_scheduler.domain.job import ENDED, JobState, ObservedTask, RegistryWord, TaskState
from support.job_world import JobWorld, node

NAMES = ("a", "b", "c", "d")
NODES = ("n1", "n2", "n3")
RESULT = "models/m/versions/{}"
EVENTUALLY = 400

passes = st.sampled_from([0, 1, 2, 3])


class JobsLive(RuleBasedStateMachine):
    """Jobs of several sizes on three nodes that come and go, and a registry that says yes, no, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.world = JobWorld(*(node(name, 1.0) for name in NODES))
        self.published: dict[str, set[str]] = defaultdict(set)
        self.cancelled: set[str] = set()
        self.numbers = 0

    def go_on(self, passes: int) -> None:
        """The scheduler looks, and agents do as they are told."""
        for _ in range(passes):
            self.world.step()

    # -- what happens -----------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        tasks=st.integers(1, 8),
        least=st.integers(1, 8),
        restarts=st.integers(0, 2),
        timeout=st.sampled_from([None, None, 60]),
        passes=passes,
    )
    def submit(
        self, name: str, tasks: int, least: int, restarts: int, timeout: int | None, passes: int
    ) -> None:
        """A new name each time: an ended job stays ended."""
        if sum(not job.ended for job in self.world.snapshot.jobs.values()) < len(NAMES):
            self.numbers += 1
            self.world.submit(
                f"{name}{self.numbers}",
                tasks=tasks,
                least=min(least, tasks),
                max_restarts=restarts,
                timeout=None if timeout is None else timedelta(seconds=timeout),
            )
        self.go_on(passes)

    @rule(seconds=st.sampled_from([0.1, 1.0, 8.0, 40.0]), obey=st.booleans())
    def pass_by(self, seconds: float, obey: bool) -> None:
        """The scheduler looks; agents may hear of it late."""
        self.world.step(seconds, obey=obey)

    @rule()
    def hear(self) -> None:
        """Agents do what they were told."""
        self.world.obey()

    @rule(
        data=st.data(),
        how=st.sampled_from(
            ["succeed", "succeed", "fail", "fail", "fail for good", "vanish", "stop", "start"]
        ),
        events=st.sampled_from([0, 0, 3]),
        passes=passes,
    )
    def task_says(self, data: st.DataObject, how: str, events: int, passes: int) -> None:
        """A process ends, or its agent forgets it."""
        running = [
            (where, id_)
            for where, own in self.world.processes.items()
            for id_, seen in own.items()
            if seen.state in (TaskState.RUNNING, TaskState.STARTING) and where not in self.world.silent
        ]
        if not running:
            self.go_on(1)
            return
        where, id_ = data.draw(st.sampled_from(running))
        own = self.world.processes[where]
        made = RESULT.format(len(self.published) * 1000 + self.numbers)
        match how:
            case "vanish":
                del own[id_]
            case "succeed":
                self.published[id_.partition("/")[0]].add(made)
                own[id_] = ObservedTask(TaskState.SUCCEEDED, results=(made,), last_event=events)
            case "stop":
                own[id_] = ObservedTask(TaskState.STOPPED)
            case "start":
                own[id_] = ObservedTask(TaskState.STARTING)
            case _:
                own[id_] = ObservedTask(TaskState.FAILED, "It fell.", permanent=how != "fail")
        self.go_on(passes)

    @rule(data=st.data())
    @precondition(lambda self: self.numbers % 3 == 2)
    def cancel(self, data: st.DataObject) -> None:
        """As the use case does: not while it is FINALIZING."""
        names = [
            job.id
            for job in self.world.snapshot.jobs.values()
            if not job.ended and job.state is not JobState.FINALIZING
        ]
        if names:
            name = data.draw(st.sampled_from(sorted(names)))
            self.cancelled.add(name)
            self.world.cancel(name)

    @rule(name=st.sampled_from(NODES))
    def lose(self, name: str) -> None:
        """A node is cut off."""
        if name not in self.world.silent:
            self.world.lose(name)

    @rule(name=st.sampled_from(NODES))
    def find(self, name: str) -> None:
        """It is back, with nothing on it."""
        self.world.find(name)

    @rule(name=st.sampled_from(NODES), draining=st.sampled_from([False, False, True]))
    def drain(self, name: str, draining: bool) -> None:
        """An operator drains a node, or no longer."""
        nodes = dict(self.world.snapshot.nodes)
        if name in nodes:
            nodes[name] = replace(nodes[name], draining=draining, cordoned=draining)
            self.world.snapshot = replace(self.world.snapshot, nodes=nodes)

    @rule(final=st.booleans())
    def registry_says(self, final: bool) -> None:
        """Yes or no to all that wait for its word."""
        for job in self.world.snapshot.jobs.values():
            if job.state is JobState.FINALIZING:
                self.world.registry[job.id] = (
                    RegistryWord(final=True) if final else RegistryWord(refusal="It is empty.")
                )
            elif job.ended:
                self.world.registry[job.id] = RegistryWord(deleted=frozenset(job.leftovers))

    # -- what never happens -----------------------------------------------------------------------

    @invariant()
    def a_job_ends_once(self) -> None:
        """And stays as it ended; who was told that it is cancelled was told the truth."""
        assert all(len(ends) == 1 for ends in self.world.ends.values())
        assert all(
            ends == [JobState.CANCELLED] for name, ends in self.world.ends.items() if name in self.cancelled
        )

    @invariant()
    def an_ended_job_holds_nothing(self) -> None:
        """Nor does one that waits."""
        for task in self.world.snapshot.tasks.values():
            job = self.world.job(task.job)
            assert job.state not in ENDED | {JobState.QUEUED}
            assert task.attempt == job.attempt

    @invariant()
    def a_gang_is_whole(self) -> None:
        """What starts has all its tasks, or as many as it may go on with."""
        started = Counter(
            task.job
            for task in self.world.snapshot.tasks.values()
            if self.world.job(task.job).state is JobState.STARTING
        )
        for name, job in self.world.snapshot.jobs.items():
            if job.state is JobState.STARTING:
                assert started[name] <= job.gang.tasks
                assert started[name] >= (job.gang.least if job.attempt > 1 else 1)
                indexes = sorted(task.index for task in self.world.tasks(name))
                assert indexes[:1] == [0] or len(indexes) < job.gang.tasks

    @invariant()
    def results_are_of_those_who_succeeded(self) -> None:
        """All else that was made is to be deleted."""
        for name, job in self.world.ended.items():
            assert bool(job.results) <= (job.state is JobState.SUCCEEDED)
            assert not set(job.results) & set(job.leftovers)
            if job.state is JobState.SUCCEEDED:
                assert set(job.results) <= self.published[name]

    @invariant()
    def no_node_holds_more_than_it_has(self) -> None:
        """As the database would refuse it."""
        for name in NODES:
            held = [t for t in self.world.snapshot.tasks.values() if t.placed and t.node == name]
            assert sum(task.resources.cpu_millis for task in held) <= 1000

    @invariant()
    def restarts_are_counted(self) -> None:
        """Failures only, and never more than allowed."""
        for job in (*self.world.snapshot.jobs.values(), *self.world.ended.values()):
            assert job.restarts <= job.max_restarts

    # -- what happens in the end ------------------------------------------------------------------

    def teardown(self) -> None:
        """Once nothing disturbs them, jobs that fit end, those that never fit wait, and the plan is empty."""
        world = self.world
        for name in NODES:
            world.find(name)
            self.drain(name, draining=False)
        # Every other time all of them fail whenever they are tried, and each gives up some time.
        end = TaskState.FAILED if self.numbers % 2 else TaskState.SUCCEEDED
        for _ in range(EVENTUALLY):
            self.registry_says(final=end is TaskState.SUCCEEDED)
            changes = world.step(2.0)
            for own in world.processes.values():
                for id_, seen in own.items():
                    if seen.state in (TaskState.RUNNING, TaskState.STARTING):
                        own[id_] = ObservedTask(end)
            self.a_job_ends_once()
            self.results_are_of_those_who_succeeded()
            waits = [job.not_before for job in world.snapshot.jobs.values() if job.not_before is not None]
            if not changes and not any(world.processes.values()) and not waits:
                break
        else:
            raise AssertionError(f"it never settles: {changes}")
        # Six tasks fit the cluster; and who waits says why.
        assert all(job.fewest > 6 for job in world.snapshot.jobs.values()), world.snapshot.jobs
        assert all("room for 6" in job.message for job in world.snapshot.jobs.values())
        assert not world.snapshot.tasks


JobsLive.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestJobsLive = JobsLive.TestCase
