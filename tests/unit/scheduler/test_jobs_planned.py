"""How jobs live: restarts, losses, cancelling, making room, results."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from penstock_scheduler.domain.constraints import Constraints
from penstock_scheduler.domain.job import JobState, ObservedTask, RegistryWord, TaskState
from support.job_world import RANK, JobWorld, node

RESULT = ("models/digits/versions/2",)


def test_a_job_runs_and_succeeds_once_the_registry_has_its_results() -> None:
    world = JobWorld()
    world.submit()
    running = world.until(JobState.RUNNING)
    assert running.attempt == 1
    world.say("fit/tasks/0", TaskState.SUCCEEDED, results=RESULT, report=b"found")
    world.step()
    assert world.job().state is JobState.FINALIZING
    world.registry["fit"] = RegistryWord(problem="The registry cannot be reached.")
    world.step(100)
    assert world.job().state is JobState.FINALIZING
    assert world.job().message == "Its results are being made final. The registry cannot be reached."
    assert not world.tasks()
    world.registry["fit"] = RegistryWord(final=True)
    world.step()
    assert world.job().state is JobState.SUCCEEDED
    assert (world.job().results, world.job().report) == (RESULT, b"found")
    assert not world.step()


def test_a_failure_that_may_not_come_again_is_tried_again_later_and_later() -> None:
    world = JobWorld()
    world.submit(max_restarts=2)
    pauses = []
    for attempt in (1, 2, 3):
        world.until(JobState.RUNNING, passes=100)
        assert world.job().attempt == attempt
        (task,) = world.tasks()
        world.say(task.id, TaskState.FAILED, message="Segmentation fault.", failure_reason="SIGNAL")
        world.step()
        if world.job().state is JobState.QUEUED:
            turn = world.job().not_before
            assert turn is not None
            pauses.append((turn - world.now).total_seconds())
            assert "Segmentation fault." in world.job().message
    assert pauses == [1.0, 2.0]
    failed = world.job()
    assert (failed.state, failed.failure_reason, failed.restarts) == (JobState.FAILED, "SIGNAL", 2)
    assert failed.message == "Segmentation fault. It was started again 2 times before."


def test_what_cannot_be_done_fails_at_once_and_its_cause_outweighs_what_follows_from_it() -> None:
    world = JobWorld()
    world.submit(tasks=3)
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.FAILED, message="Connection reset by peer.")
    world.say("fit/tasks/2", TaskState.FAILED, message="No memory.", failure_reason="OOM", permanent=True)
    world.step()
    world.step()
    assert (world.job().state, world.job().failure_reason) == (JobState.FAILED, "OOM")
    assert world.job().message == "No memory."


def test_a_cause_that_is_told_while_the_others_are_ended_still_counts() -> None:
    world = JobWorld()
    world.submit(tasks=2)
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.FAILED, message="Connection reset by peer.")
    world.step(obey=False)
    assert world.job().state is JobState.STOPPING
    world.say("fit/tasks/1", TaskState.FAILED, message="No memory.", failure_reason="OOM", permanent=True)
    world.step()
    assert (world.job().state, world.job().failure_reason) == (JobState.FAILED, "OOM")


def test_a_lost_node_costs_an_attempt_and_no_restart() -> None:
    world = JobWorld(node("n1", 1.0), node("n2", 1.0), node("n3", 1.0))
    world.submit(tasks=4)
    world.until(JobState.RUNNING)
    (lost,) = {task.node for task in world.tasks() if task.index == 0}
    world.lose(lost)
    # The others fail at once, long before the node is given up.
    for task in world.tasks():
        world.say(task.id, TaskState.FAILED, message="Connection reset by peer.")
    world.step()
    assert world.job().state is JobState.STOPPING
    job = world.until(JobState.RUNNING)
    assert (job.attempt, job.restarts, job.losses) == (2, 0, 1)
    assert {task.node for task in world.tasks()} == set(world.nodes) - {lost}
    assert [task.number for task in world.tasks()] == [4, 5, 6, 7]


def test_a_job_goes_on_with_fewer_tasks_if_it_may_but_does_not_begin_so() -> None:
    world = JobWorld(node("n1", 0.5), node("n2", 0.5))
    world.submit("patient", tasks=3, least=1)
    world.submit("elastic", tasks=2, least=1)
    world.until(JobState.RUNNING, "elastic")
    assert world.job("patient").state is JobState.QUEUED
    world.cancel("patient")
    world.lose("n1")
    world.until(JobState.QUEUED, "elastic") if world.job("elastic").state is JobState.QUEUED else None
    for _ in range(12):
        world.step()
    assert world.job("elastic").state is JobState.RUNNING
    assert len(world.tasks("elastic")) == 1


def test_an_agent_that_comes_back_without_its_tasks_costs_no_restart() -> None:
    world = JobWorld(node("n1"))
    world.submit()
    world.until(JobState.RUNNING)
    world.processes["n1"].clear()
    world.step()
    assert (world.job().attempt, world.job().restarts) == (2, 0)


def test_a_task_that_fails_because_its_agent_was_restarted_costs_no_restart() -> None:
    world = JobWorld(node("n1"))
    world.submit(tasks=2)
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.FAILED, failure_reason="AGENT_RESTARTED")
    world.say("fit/tasks/1", TaskState.FAILED, message="Connection reset by peer.")
    world.step()
    world.step()
    assert (world.job().attempt, world.job().restarts, world.job().losses) == (2, 0, 1)


def test_an_agent_that_never_takes_a_task_up_is_not_waited_for_for_ever() -> None:
    world = JobWorld(node("n1"))
    world.submit(max_restarts=0)
    for _ in range(40):
        world.step(obey=False)
    assert (world.job().state, world.job().failure_reason) == (JobState.FAILED, "NOT_STARTED")


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.STOPPING])
def test_it_is_cancelled_in_every_state(state: JobState) -> None:
    world = JobWorld(node("n1", 0.25)) if state is JobState.QUEUED else JobWorld()
    world.submit()
    if state is JobState.STARTING:
        world.step(obey=False)
    elif state is not JobState.QUEUED:
        world.until(JobState.RUNNING)
    if state is JobState.STOPPING:
        world.nodes = {name: replace(each, draining=True) for name, each in world.nodes.items()}
        world.snapshot = replace(
            world.snapshot,
            nodes={n: replace(each, draining=True) for n, each in world.snapshot.nodes.items()},
        )
        world.step(obey=False)
    assert world.job().state is state
    world.cancel()
    for _ in range(3):
        world.step()
    assert world.ends["fit"] == [JobState.CANCELLED]
    assert world.job().message == "ann cancelled it."
    assert not world.tasks()


def test_who_was_cancelled_while_it_succeeded_leaves_nothing_behind() -> None:
    world = JobWorld()
    world.submit()
    world.until(JobState.RUNNING)
    world.cancel()
    world.say("fit/tasks/0", TaskState.SUCCEEDED, results=RESULT)
    for _ in range(3):
        world.step()
    assert world.job().state is JobState.CANCELLED
    assert (world.job().results, world.job().leftovers) == ((), RESULT)
    world.registry["fit"] = RegistryWord(deleted=frozenset(RESULT))
    world.step()
    assert "fit" not in world.snapshot.jobs


def test_a_success_that_comes_too_late_leaves_nothing_behind_either() -> None:
    world = JobWorld()
    world.submit(tasks=2)
    world.until(JobState.RUNNING)
    world.cancel()
    world.step(obey=False)
    # The leading task was done before it heard of it; the other one takes its time.
    world.say("fit/tasks/0", TaskState.SUCCEEDED, results=RESULT)
    world.step(obey=False)
    assert world.job().state is JobState.STOPPING
    world.step()
    world.step()
    assert (world.job().state, world.job().leftovers) == (JobState.CANCELLED, RESULT)


def test_work_that_is_done_while_it_should_make_room_is_not_done_again() -> None:
    world = JobWorld(node("n1"))
    world.submit()
    world.until(JobState.RUNNING)
    world.snapshot = replace(
        world.snapshot, nodes={n: replace(each, draining=True) for n, each in world.snapshot.nodes.items()}
    )
    world.step(obey=False)
    assert world.job().state is JobState.STOPPING
    world.say("fit/tasks/0", TaskState.SUCCEEDED)
    world.step()
    world.step()
    assert world.job().state is JobState.SUCCEEDED


def test_a_drained_node_lets_its_job_go_on_elsewhere() -> None:
    world = JobWorld()
    world.submit()
    world.until(JobState.RUNNING)
    (task,) = world.tasks()
    drained = {n: replace(each, draining=n == task.node) for n, each in world.snapshot.nodes.items()}
    world.snapshot = replace(world.snapshot, nodes=drained)
    world.step()
    for _ in range(4):
        world.step()
    (moved,) = world.tasks()
    assert moved.node != task.node
    assert (world.job().state, world.job().restarts, world.job().losses) == (JobState.RUNNING, 0, 0)


def test_who_does_not_stop_for_a_checkpoint_is_ended() -> None:
    world = JobWorld(node("n1"))
    world.submit()
    world.until(JobState.RUNNING)
    world.snapshot = replace(
        world.snapshot, nodes={n: replace(each, draining=True) for n, each in world.snapshot.nodes.items()}
    )
    for _ in range(59):
        world.step(obey=False)
    assert world.job().state is JobState.STOPPING
    for _ in range(4):
        world.step()
        world.processes["n1"].update(
            {t.id: ObservedTask(TaskState.RUNNING) for t in world.desired("n1").values()}
        )
    assert world.job().state is JobState.QUEUED


def test_a_job_that_makes_room_waits_for_its_last_events() -> None:
    world = JobWorld(node("n1"))
    world.submit()
    world.until(JobState.RUNNING)
    world.snapshot = replace(
        world.snapshot, nodes={n: replace(each, draining=True) for n, each in world.snapshot.nodes.items()}
    )
    world.step(obey=False)
    world.say("fit/tasks/0", TaskState.STOPPED, last_event=9)
    for _ in range(3):
        world.step(obey=False)
        assert world.job().state is JobState.STOPPING
    (task,) = world.tasks()
    world.snapshot = replace(world.snapshot, tasks={task.id: replace(task, stored_event=9)})
    world.step(obey=False)
    assert world.job().state is JobState.QUEUED


def test_a_job_that_runs_too_long_fails_with_all_its_attempts_counted() -> None:
    world = JobWorld(node("n1"))
    world.submit(timeout=timedelta(seconds=20))
    world.until(JobState.RUNNING)
    for _ in range(8):
        world.step()
    world.processes["n1"].clear()
    world.until(JobState.RUNNING)
    for _ in range(15):
        world.step()
    assert (world.job().state, world.job().failure_reason) == (JobState.FAILED, "TIMEOUT")
    assert world.job().ran >= timedelta(seconds=20)


def test_a_result_that_the_registry_refuses_fails_the_job_and_is_deleted() -> None:
    world = JobWorld()
    world.submit()
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.SUCCEEDED, results=RESULT)
    world.registry["fit"] = RegistryWord(refusal="It has no entrypoint.")
    for _ in range(3):
        world.step()
    assert (world.job().state, world.job().failure_reason) == (JobState.FAILED, "RESULT_REFUSED")
    assert (world.job().message, world.job().leftovers) == ("It has no entrypoint.", RESULT)


def test_what_failed_attempts_left_is_deleted_at_the_end_unless_it_is_the_result() -> None:
    world = JobWorld()
    world.submit()
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.FAILED, results=("models/digits/versions/1", *RESULT))
    world.step()
    world.until(JobState.RUNNING)
    world.say("fit/tasks/1", TaskState.SUCCEEDED, results=RESULT)
    world.registry["fit"] = RegistryWord(final=True)
    for _ in range(3):
        world.step()
    assert world.job().state is JobState.SUCCEEDED
    assert (world.job().results, world.job().leftovers) == (RESULT, ("models/digits/versions/1",))


def test_the_end_waits_for_the_last_events_but_not_for_ever() -> None:
    world = JobWorld()
    world.submit()
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.SUCCEEDED, last_event=7)
    for _ in range(15):
        world.step()
        assert world.job().state is JobState.FINALIZING
        assert world.desired("n1") or world.desired("n2")
    for _ in range(3):
        world.step()
    assert world.job().state is JobState.SUCCEEDED


def test_the_end_comes_as_soon_as_the_events_are_stored() -> None:
    world = JobWorld()
    world.submit()
    world.until(JobState.RUNNING)
    world.say("fit/tasks/0", TaskState.SUCCEEDED, last_event=7)
    world.step()
    (task,) = world.tasks()
    world.snapshot = replace(world.snapshot, tasks={task.id: replace(task, stored_event=7)})
    world.step()
    assert world.job().state is JobState.SUCCEEDED


def test_a_job_that_went_on_smaller_grows_again_when_its_node_is_back_and_it_counts_as_no_restart() -> None:
    world = JobWorld(node("n1", 0.5), node("n2", 0.5), node("n3", 0.5))
    world.submit(tasks=3, least=2)
    world.until(JobState.RUNNING)
    world.lose("n3")
    for _ in range(30):
        world.step()
    assert world.job().state is JobState.RUNNING
    assert (len(world.tasks()), world.job().attempt) == (2, 2)
    world.find("n3")
    for _ in range(100):
        world.step()
    assert world.job().attempt == 2, "not before it has worked for a while"
    for _ in range(100):
        world.step()
    assert world.job().state is JobState.RUNNING
    assert (len(world.tasks()), world.job().attempt) == (3, 3)
    assert (world.job().restarts, world.job().losses) == (0, 1)
    assert not world.step()


def test_a_job_that_went_on_smaller_stays_so_while_another_waits_or_there_is_no_room() -> None:
    world = JobWorld(node("n1", 0.5), node("n2", 0.5), node("n3", 0.5))
    world.submit(tasks=3, least=2)
    world.until(JobState.RUNNING)
    world.lose("n3")
    for _ in range(300):
        world.step()
    assert world.job().attempt == 2
    world.submit("wide", tasks=3)
    world.find("n3")
    for _ in range(30):
        world.step()
    assert (world.job().attempt, world.job("wide").state) == (2, JobState.QUEUED)


def test_a_whole_job_of_which_tasks_have_ended_goes_on_while_the_first_publishes() -> None:
    world = JobWorld(node("n1", 0.5), node("n2", 0.5), node("n3", 0.5))
    world.submit(tasks=3, least=2)
    world.until(JobState.RUNNING)
    for number in (1, 2):
        world.say(f"fit/tasks/{number}", TaskState.SUCCEEDED)
    for _ in range(300):
        world.step()
    assert (world.job().state, world.job().attempt) == (JobState.RUNNING, 1)
    assert len(world.tasks()) == 1


def test_a_job_counts_those_of_another_project_only_until_its_own_project_has_the_least() -> None:
    world = JobWorld(node("n1", 0.5))
    world.submit("first", project="research")
    world.until(JobState.RUNNING, "first")
    for name, project in (("one", "shop"), ("own", "research"), ("two", "shop"), ("three", "shop")):
        world.step()
        world.submit(name, project=project)
    world.step()
    said = {name: world.job(name).message.partition(" first")[0] for name in ("one", "own", "two", "three")}
    assert said["own"] == "1 job comes"
    assert (said["two"], said["three"]) == ("2 jobs come", "3 jobs come")
    assert not world.step(), "the next plan finds the same words"


class TestReturns:
    """A job whose newest checkpoint is on the disk of a node that was lost."""

    @staticmethod
    def lost_half_way(*, least: int = 1, keeps: bool = True) -> tuple[JobWorld, str]:
        """A job of two tasks that has lost a node, and could go on without it."""
        world = JobWorld(node("n1", 0.5), node("n2", 0.5))
        world.submit(tasks=2, least=least, keeps=keeps)
        world.until(JobState.RUNNING)
        gone = world.tasks()[1].node
        world.lose(gone)
        for _ in range(9):  # it is LOST after 7 s of silence
            world.step()
        return world, gone

    def test_it_waits_for_the_agent_to_come_back_and_goes_on_there(self) -> None:
        world, gone = self.lost_half_way()
        began = world.silent[gone]
        queued = world.job()
        assert queued.state is JobState.QUEUED
        assert queued.message == (
            f"nodes/{gone} may have its newest checkpoint, and is waited for until "
            f"{began + timedelta(seconds=15):%H:%M:%S} UTC."
        )
        assert not world.step(), "what it says must not change with every pass"
        world.find(gone)
        job = world.until(JobState.RUNNING, passes=3)
        assert (job.attempt, job.restarts, job.losses) == (2, 0, 1)
        assert sorted(task.node for task in world.tasks()) == ["n1", "n2"]

    def test_it_goes_on_without_a_node_that_does_not_come_back(self) -> None:
        world, gone = self.lost_half_way()
        began = world.silent[gone]
        world.until(JobState.RUNNING, passes=30)
        assert [task.node for task in world.tasks()] == [{"n1": "n2", "n2": "n1"}[gone]]
        assert timedelta(seconds=15) <= world.now - began <= timedelta(seconds=18)

    def test_it_does_not_take_the_place_of_another_node_meanwhile(self) -> None:
        world = JobWorld(node("n1", 0.5), node("n2", 0.5))
        world.submit(keeps=True)
        world.until(JobState.RUNNING)
        (home,) = [task.node for task in world.tasks()]
        world.lose(home)
        for _ in range(9):
            world.step()
        assert world.job().state is JobState.QUEUED
        world.find(home)
        world.until(JobState.RUNNING, passes=3)
        assert [task.node for task in world.tasks()] == [home]

    def test_its_place_is_kept_while_it_waits(self) -> None:
        world, gone = self.lost_half_way()
        world.step()
        world.submit("next")
        world.step()
        assert world.job("next").state is JobState.QUEUED
        assert "The room that is free is kept for jobs/fit" in world.job("next").message
        world.find(gone)
        world.until(JobState.RUNNING, passes=3)

    def test_its_place_is_kept_wherever_it_was_though_it_could_go_on_with_less(self) -> None:
        world = JobWorld(node("n1", 0.5), node("n2", 0.5), node("n3", 0.5))
        world.submit(tasks=3, least=1, keeps=True)
        world.until(JobState.RUNNING)
        world.lose("n2")
        for _ in range(9):
            world.step()
        world.submit("one")
        world.submit("two")
        world.step()
        assert {world.job(name).state for name in ("fit", "one", "two")} == {JobState.QUEUED}
        world.find("n2")
        world.until(JobState.RUNNING, passes=3)
        assert len(world.tasks()) == 3

    def test_the_places_of_several_jobs_are_kept_beside_each_other(self) -> None:
        world = JobWorld(node("n1", 1.0), node("n2", 1.0))
        for name, cpu_millis in (("fit", 600), ("also", 400)):
            world.submit(name, tasks=2, keeps=True, resources=replace(RANK, cpu_millis=cpu_millis))
            world.until(JobState.RUNNING, name)
            assert {task.node for task in world.tasks(name)} == {"n1", "n2"}
        world.lose("n2")
        for _ in range(9):
            world.step()
        world.submit("next", resources=replace(RANK, cpu_millis=100))
        world.step()
        assert {world.job(name).state for name in ("fit", "also", "next")} == {JobState.QUEUED}
        world.find("n2")
        for name in ("fit", "also"):
            world.until(JobState.RUNNING, name, passes=3)

    def test_an_attempt_that_nobody_took_up_changes_nothing_of_where_it_was(self) -> None:
        world, gone = self.lost_half_way()
        for _ in range(10):
            world.step(obey=False)
        assert (world.job().state, world.job().attempt) == (JobState.STARTING, 2)
        world.find(gone)
        world.step(40.0, obey=False)
        assert world.job().homes == ("n1", "n2")

    def test_a_new_leader_lets_agents_come_back_first(self) -> None:
        world, gone = self.lost_half_way()
        # Nobody led for a minute; the node is still LOST, and its agent has not attached yet.
        world.step(60.0, obey=False, unheard={gone: 1.0})
        assert world.job().state is JobState.QUEUED
        assert f"nodes/{gone} may have" in world.job().message
        world.step(20.0, unheard={gone: 21.0})
        assert world.job().attempt == 2

    def test_a_job_whose_node_ends_it_again_and_again_goes_elsewhere(self) -> None:
        world = JobWorld(node("n1", 0.5), node("n2", 0.5))
        world.submit(keeps=True)
        world.until(JobState.RUNNING)
        (home,) = [task.node for task in world.tasks()]
        for _ in range(4):
            world.lose(home)
            world.until(JobState.QUEUED)
            world.find(home)
            world.until(JobState.RUNNING, passes=100)
            assert [task.node for task in world.tasks()] == [home]
        world.lose(home)
        world.until(JobState.QUEUED)
        world.find(home)
        world.until(JobState.RUNNING, passes=100)
        assert [task.node for task in world.tasks()] != [home]
        # Where it lives longer it stays.
        world.step(200.0)
        other = {"n1": "n2", "n2": "n1"}[home]
        world.lose(other)
        world.until(JobState.QUEUED)
        world.find(other)
        world.until(JobState.RUNNING, passes=100)
        assert [task.node for task in world.tasks()] == [other]

    @pytest.mark.parametrize("how", [{"cordoned": True}, {"cordoned": True, "draining": True}])
    def test_nobody_waits_for_a_node_that_takes_nothing_new(self, how: dict[str, bool]) -> None:
        world, gone = self.lost_half_way()
        drained = replace(world.snapshot.nodes[gone], **how)
        world.snapshot = replace(world.snapshot, nodes={**world.snapshot.nodes, gone: drained})
        world.until(JobState.RUNNING, passes=3)

    def test_work_without_checkpoints_starts_again_at_once(self) -> None:
        world, _ = self.lost_half_way(keeps=False)
        assert world.job().attempt == 2

    def test_after_a_failure_it_goes_on_where_it_was_though_others_are_fuller(self) -> None:
        world = JobWorld(*(replace(node(name), labels=(("zone", name),)) for name in ("n1", "n2")))
        world.submit(keeps=True)
        world.until(JobState.RUNNING)
        (home,) = [task.node for task in world.tasks()]
        elsewhere = Constraints((("zone", {"n1": "n2", "n2": "n1"}[home]),))
        world.submit("other", tasks=3, constraints=elsewhere)
        world.until(JobState.RUNNING, "other")
        world.say("fit/tasks/0", TaskState.FAILED, message="Segmentation fault.", failure_reason="SIGNAL")
        for _ in range(4):
            world.step()
        assert world.job().attempt == 2
        assert [task.node for task in world.tasks()] == [home]
