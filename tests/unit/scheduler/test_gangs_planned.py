"""Which jobs start, where, and which make room for serving."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock_scheduler.domain.autoscaling.evict import evicted
from penstock_scheduler.domain.job import JobState
from penstock_scheduler.domain.node import CPU_DEVICE
from penstock_scheduler.domain.planner.feasible import Need, usage_of
from penstock_scheduler.domain.planner.room import cheapest
from penstock_scheduler.domain.project import Holding, Project
from penstock_scheduler.domain.resources import Resources
from support.planner_world import CORE, GIB, PlannerWorld, deployment, job, node


def test_a_gang_starts_whole_or_not_at_all_and_says_how_much_room_there_is() -> None:
    world = PlannerWorld([node("a"), node("b")], jobs=[job("large", tasks=3, cores=4)])
    world.run()
    assert world.tasks == []
    assert world.snapshot.jobs["large"].message == "There is room for 2 of its 3 tasks."
    world.add(nodes=[node("c")])
    world.run()
    assert sorted(world.nodes_of("large")) == ["a", "b", "c"]


def test_a_gang_uses_as_few_nodes_as_it_can_and_leaves_gpus_to_those_who_need_them() -> None:
    nodes = [node("a", cores=2), node("b", cores=8), node("c", cores=4), node("g", cores=16, gpus=4)]
    world = PlannerWorld(nodes, jobs=[job("four", tasks=4)])
    world.run()
    assert world.nodes_of("four") == ["c"] * 4
    world.add(jobs=[job("ten", tasks=10)])
    world.run()
    assert set(world.nodes_of("ten")) == {"a", "b"}


def test_tasks_with_gpus_are_packed_so_that_whole_nodes_stay_free() -> None:
    one = Resources(cpu_millis=1000, gpus=1)
    world = PlannerWorld(
        [node("a", cores=8, gpus=4), node("b", cores=8, gpus=4)], jobs=[job("one", resources=one)]
    )
    world.run()
    first = world.nodes_of("one")
    world.add(jobs=[job("three", tasks=3, resources=one)])
    world.run()
    assert world.nodes_of("three") == first * 3
    held = [device for task in world.tasks for device in task.devices]
    assert len(set(held)) == 4
    assert CPU_DEVICE not in held


def test_an_elastic_gang_goes_on_smaller_after_a_node_was_lost_and_starts_whole() -> None:
    elastic = job("elastic", tasks=3, least=2, cores=4)
    world = PlannerWorld([node("a"), node("b")], jobs=[elastic])
    world.run()
    assert world.tasks == []
    world.add(nodes=[node("c")])
    world.run()
    assert len(world.tasks) == 3
    lost = replace(world.snapshot.reports["c"], attached=False, silent_seconds=99.0)
    world.snapshot = replace(world.snapshot, reports={**world.snapshot.reports, "c": lost})
    world.run()
    assert sorted(world.nodes_of("elastic")) == ["a", "b"]


def test_jobs_come_by_priority_then_age() -> None:
    waiting = [job("young", seconds=2), job("old", seconds=1), job("urgent", priority=5, seconds=3)]
    world = PlannerWorld([node("a", cores=1)], jobs=waiting)
    order = []
    for _ in range(3):
        world.run()
        (name,) = world.working()
        order.append(name)
        world.run(done=[name])
        world.snapshot = replace(
            world.snapshot, jobs={k: j for k, j in world.snapshot.jobs.items() if k not in order}
        )
    assert order == ["urgent", "old", "young"]


def test_a_large_gang_is_not_passed_over_for_ever_by_small_jobs_behind_it() -> None:
    world = PlannerWorld([node("a"), node("b")], jobs=[job(f"s{n}", seconds=n) for n in range(8)])
    world.run()
    assert len(world.working()) == 8
    world.add(jobs=[job("large", tasks=2, cores=3, seconds=10)])
    for n in range(8, 40):
        # As one ends another comes, and would always fit where the large one does not yet.
        world.add(jobs=[job(f"s{n}", seconds=10 + n)])
        oldest = min(world.working(), key=lambda name: world.snapshot.jobs[name].create_time)
        world.run(done=[oldest])
        if "large" in world.working():
            break
    assert "large" in world.working()
    # It waited for what ran before it, and for nothing else: six of eight had to end.
    assert n - 8 <= 8


def test_small_jobs_start_beside_the_room_that_is_kept_for_a_large_one() -> None:
    world = PlannerWorld([node("a", cores=4), node("b", cores=2)], jobs=[job("runs", cores=2)])
    world.run()
    assert world.nodes_of("runs") == ["b"]
    world.add(jobs=[job("half", cores=2, seconds=1)])
    world.run()
    assert world.nodes_of("half") == ["a"]
    # It fits on a, once `half` has ended; what is free of a until then is kept, and what b has free is not.
    world.add(jobs=[job("large", cores=4, seconds=2), job("small", cores=2, seconds=3)])
    world.run()
    assert "small" not in world.working()
    assert world.snapshot.jobs["small"].message == (
        "1 job comes first. The room that is free is kept for jobs/large, whose turn is first."
    )
    world.run(done=["runs"])
    assert world.nodes_of("small") == ["b"]
    assert "large" not in world.working()
    world.run(done=["half"])
    assert world.nodes_of("large") == ["a"]


def test_a_gang_that_no_node_could_ever_hold_keeps_nothing() -> None:
    world = PlannerWorld([node("a")], jobs=[job("giant", cores=64), job("small", seconds=1)])
    world.run()
    assert world.working() == {"small"}
    assert "No node has room for it. The closest, nodes/a, lacks" in (world.snapshot.jobs["giant"].message)


# -- making room for serving ------------------------------------------------------------------------


def test_a_replica_without_a_place_takes_that_of_the_cheapest_job() -> None:
    jobs = [
        job("urgent", cores=2, priority=1),
        job("old", cores=2, seconds=1),
    ]
    world = PlannerWorld([node("a")], jobs=jobs)
    world.run()
    assert world.working() == {"urgent", "old"}
    world.add(deployments=[deployment("d", resources=replace(CORE, cpu_millis=2000))])
    world.step()
    # In the pass that made it nothing is stopped yet: what is idle would make room first.
    assert world.working() == {"urgent", "old"}
    world.step()
    stopping = world.snapshot.jobs["old"]
    assert (stopping.state, "urgent" in world.working()) == (JobState.STOPPING, True)
    world.run()
    (replica,) = world.replicas
    assert replica.node == "a"
    queued = world.snapshot.jobs["old"]
    assert queued.state is JobState.QUEUED
    assert queued.message == (
        f"It made room: replicas/{replica.id} of deployments/d has no other place than nodes/a. It waits: "
        "No node has room for it. The closest, nodes/a, lacks 2 cores of CPU (needs 2 cores, "
        "0 cores free of 4 cores)."
    )
    assert queued.restarts == 0


def test_the_whole_gang_ends_though_one_of_its_nodes_is_enough() -> None:
    world = PlannerWorld([node("a"), node("b")], jobs=[job("gang", tasks=2, cores=4)])
    world.run()
    world.add(deployments=[deployment("d", resources=replace(CORE, cpu_millis=4000))])
    world.run()
    assert world.placed("d") == 1
    assert world.tasks == []
    assert world.snapshot.jobs["gang"].state is JobState.QUEUED


def test_no_more_jobs_end_than_it_takes_and_none_if_it_would_not_help() -> None:
    jobs = [job(f"j{n}", seconds=n) for n in range(4)]
    world = PlannerWorld([node("a")], jobs=jobs)
    world.run()
    world.add(deployments=[deployment("giant", resources=replace(CORE, cpu_millis=5000))])
    world.run()
    assert len(world.working()) == 4
    assert world.waits("giant").startswith("No node has room for it.")
    world.add(deployments=[deployment("d", replicas=2)])
    world.run()
    # Two replicas of a core each take the places of the two youngest.
    assert world.placed("d") == 2
    assert world.working() == {"j0", "j1"}


def test_a_job_that_made_room_is_not_placed_back_where_the_replica_waits() -> None:
    world = PlannerWorld([node("a"), node("b", cores=1)], jobs=[job("j", cores=3)])
    world.run()
    assert world.nodes_of("j") == ["a"]
    world.add(deployments=[deployment("d", resources=replace(CORE, cpu_millis=4000))])
    for _ in range(6):
        world.see()
        world.step()
        assert not (world.snapshot.jobs["j"].state is JobState.QUEUED and world.nodes_of("j"))
    assert world.placed("d") == 1
    assert world.snapshot.jobs["j"].attempt == 1


def test_what_drains_anyway_is_waited_for_before_any_job_ends() -> None:
    world = PlannerWorld(
        [node("a"), node("b")], [deployment("idle", resources=replace(CORE, cpu_millis=3000))]
    )
    world.run()
    (idle,) = world.replicas
    other = "b" if idle.node == "a" else "a"
    world.add(jobs=[job("j", cores=3)])
    world.run()
    assert world.nodes_of("j") == [other]
    world.add(deployments=[deployment("d", resources=replace(CORE, cpu_millis=3000))])
    world.step()
    gone = world.snapshot.deployments["idle"]
    world.add(deployments=[gone.advance(type(gone.state).DELETING, world.snapshot.now)])
    world.step()
    assert "j" in world.working()
    world.run()
    assert world.placed("d") == 1
    assert "j" in world.working()


def test_of_one_node_the_cheapest_jobs_make_room() -> None:
    jobs = [job("a", priority=1), job("b", cores=2, seconds=1), job("c", seconds=2)]
    world = PlannerWorld([node("n")], jobs=jobs)
    world.run()
    machine = world.snapshot.nodes["n"]
    running = [world.snapshot.jobs[name] for name in "abc"]

    def chosen(cores: int) -> set[str]:
        need = Need("torch", Resources(cpu_millis=1000 * cores, memory_bytes=GIB))
        return {j.id for j in cheapest(usage_of(machine, world.tasks), need, running, world.tasks)}

    assert chosen(1) == {"c"}
    # The two cores of b alone are enough.
    assert chosen(2) == {"b"}
    assert chosen(3) == {"b", "c"}
    assert chosen(4) == {"a", "b", "c"}
    assert chosen(5) == set()


def test_quotas_keep_jobs_waiting_and_the_first_has_its_room_kept() -> None:
    small = Project("x", Holding(cpu_millis=2000))
    world = PlannerWorld(
        [node("a", cores=8)],
        jobs=[job("one", project="x"), job("two", cores=2, project="x", seconds=1)],
        projects=[small],
    )
    world.run()
    assert world.working() == {"one"}
    assert world.snapshot.jobs["two"].message == (
        "The quota has no room: project x holds 1 of 2 cores (this needs 2). End some of it, or ask for a "
        "larger quota."
    )
    world.add(jobs=[job("three", project="x", seconds=2), job("other", project="y", seconds=3)])
    world.run()
    assert world.working() == {"one", "other"}
    assert "with what is kept for those that come first" in world.snapshot.jobs["three"].message
    world.run(done=["one"])
    assert "two" in world.working()


@pytest.mark.parametrize(("cores", "gone"), [(2, ["idle"]), (4, [])])
def test_an_idle_deployment_makes_room_only_where_jobs_leave_any(cores: int, gone: list[str]) -> None:
    two, wanted = (replace(CORE, cpu_millis=1000 * count) for count in (2, cores))
    world = PlannerWorld([node("a")], [deployment("idle", resources=two)], [job("j", cores=2)])
    world.run()
    world.add(deployments=[deployment("d", resources=wanted, seconds=1)])
    world.step()
    # What the job holds is not free when the deployment ends.
    assert list(evicted(world.snapshot, ["idle"])) == gone


def test_an_idle_deployment_makes_no_room_for_what_waits_for_its_quota() -> None:
    world = PlannerWorld(
        [node("a")],
        [deployment("idle", replicas=4), deployment("d", project="x", seconds=1)],
        projects=[Project("x", Holding(cpu_millis=500))],
    )
    world.run()
    assert "project x holds 0 of 0.5 cores" in world.waits("d")
    assert list(evicted(world.snapshot, ["idle"])) == []


def test_no_job_makes_room_for_a_replica_that_its_quota_would_keep_out_there() -> None:
    part = Resources(cpu_millis=1000, gpus=1, gpu_memory_bytes=8 * GIB)
    small, large = node("small", gpus=1, gpu_memory=8 * GIB), node("large", gpus=1, gpu_memory=80 * GIB)
    world = PlannerWorld(
        [small, replace(large, cordoned=True)],
        jobs=[job("j", resources=Resources(cpu_millis=1000, gpus=1))],
        projects=[Project("x", Holding(gpu_millis=500))],
    )
    world.run()
    assert world.working() == {"j"}
    # On the large GPU it would count a tenth; on the small one, which a job holds, the whole.
    world.add(deployments=[deployment("d", project="x", resources=part)])
    world.run()
    assert world.working() == {"j"}
    assert world.waits("d").startswith("No node has room for it.")


def test_what_waits_says_how_many_come_first_and_says_the_same_the_next_time() -> None:
    waiting = [job(f"w{n}", cores=3, seconds=n, priority=9 if n == 3 else 0) for n in range(1, 4)]
    other = job("other", cores=3, seconds=9, project="x")
    world = PlannerWorld([node("a")], jobs=[job("runs", cores=2, priority=10), *waiting, other])
    world.run()
    places = {
        name: world.snapshot.jobs[name].message.partition("No node")[0]
        for name in ("w1", "w2", "w3", "other")
    }
    # The project x holds nothing yet; among the others the priority counts, then the age.
    assert places == {
        "other": "",
        "w3": "1 job comes first. ",
        "w1": "2 jobs come first. ",
        "w2": "3 jobs come first. ",
    }
    assert not world.step()


def test_the_place_of_a_job_far_behind_is_not_counted() -> None:
    world = PlannerWorld([node("a", cores=1)], jobs=[job(f"j{n:03}", cores=2, seconds=n) for n in range(103)])
    world.run()
    assert world.snapshot.jobs["j100"].message.startswith("100 jobs come first. ")
    assert world.snapshot.jobs["j102"].message.startswith("More than 100 jobs come first. ")
