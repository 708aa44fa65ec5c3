"""Quotas and shares of projects, as the planner keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock_kit.errors import FailedPrecondition, InvalidArgument, Reason
from penstock_scheduler.domain.planner.turns import in_turn
from penstock_scheduler.domain.project import (
    Holding,
    Project,
    charge,
    check_quota,
    check_weight,
    quota_of,
    resources_of,
)
from penstock_scheduler.domain.replica import ReplicaState
from penstock_scheduler.domain.resources import Resources
from support.planner_world import CORE, GIB, PlannerWorld, deployment, job, node


def cores(count: float) -> Holding:
    return Holding(cpu_millis=round(1000 * count))


def held(world: PlannerWorld, project: str) -> float:
    """Cores that a project holds."""
    deployments = world.snapshot.deployments
    millis = [
        r.resources.cpu_millis
        for r in world.replicas
        if r.placed and deployments[r.deployment].project == project
    ]
    millis += [t.resources.cpu_millis for t in world.tasks if world.snapshot.jobs[t.job].project == project]
    return float(sum(millis)) / 1000


# -- quotas -----------------------------------------------------------------------------------------


def test_a_quota_holds_replicas_back_with_a_reason_and_lets_them_go_when_it_grows() -> None:
    world = PlannerWorld(
        [node(cores=8)], [deployment("d", project="x", replicas=4)], projects=[Project("x", cores(2.5))]
    )
    world.run()
    assert world.placed("d") == 2
    assert world.waits("d") == (
        "The quota has no room: project x holds 2 of 2.5 cores (this needs 1). End some of it, or ask for a "
        "larger quota."
    )
    world.add(projects=[Project("x", cores(4))])
    world.run()
    assert world.placed("d") == 4


def test_a_quota_counts_the_tasks_of_jobs_beside_replicas_and_no_other_project() -> None:
    world = PlannerWorld(
        [node(cores=8)],
        [deployment("mine", project="x", replicas=2), deployment("theirs", replicas=2)],
        [job("j", tasks=2, project="x")],
        [Project("x", cores(3))],
    )
    world.run()
    assert (world.placed("mine"), world.placed("theirs"), world.working()) == (2, 2, set())
    world.ask("mine", replicas=1)
    world.run()
    assert world.working() == {"j"}
    assert held(world, "x") == 3


def test_parts_of_gpus_count_with_that_part_and_whole_ones_whole() -> None:
    half, whole = Resources(gpus=1, gpu_memory_millis=500), Resources(gpus=2)
    assert charge(half, [16 * GIB]) == Holding(gpu_millis=500)
    assert charge(Resources(gpus=1, gpu_memory_bytes=4 * GIB), [16 * GIB]) == Holding(gpu_millis=250)
    assert charge(whole, [16 * GIB, 80 * GIB]) == Holding(gpu_millis=2000)
    world = PlannerWorld(
        [node(cores=64, gpus=8)],
        [deployment("d", project="x", replicas=6, resources=replace(half, cpu_millis=100))],
        projects=[Project("x", Holding(gpu_millis=2000))],
    )
    world.run()
    assert world.placed("d") == 4
    assert "project x holds 2 of 2 GPUs (this needs 0.5)" in world.waits("d")


def test_a_deployment_that_moves_replaces_nothing_and_counts_elsewhere() -> None:
    world = PlannerWorld(
        [node(cores=8)],
        [deployment("a", project="x", replicas=2), deployment("b", project="x", replicas=2)],
        projects=[Project("x", cores(2))],
    )
    world.run()
    assert held(world, "x") == 2
    running = {r.id for r in world.replicas if r.placed}
    (moved,) = {r.deployment for r in world.replicas if r.placed}
    world.ask(moved, project="y")
    world.run()
    assert running <= {r.id for r in world.replicas if r.state is ReplicaState.READY}
    assert (held(world, "x"), held(world, "y")) == (2, 2)


def test_below_a_quota_that_was_lowered_nothing_new_is_placed_until_enough_has_ended() -> None:
    world = PlannerWorld(
        [node(cores=8)],
        [deployment("d", project="x", replicas=4)],
        [job("j", project="x")],
        [Project("x", cores(4))],
    )
    world.run()
    world.add(projects=[Project("x", cores(2))])
    world.run()
    assert world.placed("d") == 4
    world.ask("d", replicas=2)
    world.run()
    assert (world.placed("d"), world.working()) == (2, set())
    world.ask("d", replicas=1)
    world.run()
    assert world.working() == {"j"}


# -- updates at a full quota ------------------------------------------------------------------------


def replaced(world: PlannerWorld, name: str = "d") -> int:
    """Replicas of version 2 that are READY."""
    return sum(
        r.deployment == name and r.version.number == 2 and r.state is ReplicaState.READY
        for r in world.replicas
    )


def update(world: PlannerWorld, name: str = "d", **fields: object) -> None:
    """Asks for version 2."""
    (target,) = world.snapshot.deployments[name].asked.targets
    world.ask(name, targets=(replace(target, resolved_version=2),), **fields)


@pytest.mark.parametrize("replicas", [1, 4])
def test_an_update_at_a_full_quota_exceeds_it_by_what_it_replaces_and_no_longer(replicas: int) -> None:
    world = PlannerWorld(
        [node(cores=16)],
        [deployment("d", project="x", replicas=replicas)],
        [job("j", project="x")],
        [Project("x", cores(replicas))],
    )
    world.run()
    update(world)
    world.step()
    # New before old, as always; nothing else of the project gets in between.
    assert held(world, "x") == 2 * replicas
    assert sum(r.surge for r in world.replicas) == replicas
    world.run()
    assert replaced(world) == replicas
    assert held(world, "x") == replicas
    assert not any(r.surge for r in world.replicas)
    assert world.working() == set()


def test_an_update_that_asks_for_more_than_the_quota_has_in_the_end_gets_as_much_as_that() -> None:
    world = PlannerWorld(
        [node(cores=16)],
        [deployment("d", project="x", replicas=4, resources=replace(CORE, cpu_millis=500))],
        projects=[Project("x", cores(3))],
    )
    world.run()
    update(world, resources=CORE)
    world.run()
    assert replaced(world) == 3
    assert held(world, "x") == 3
    assert "project x holds 3 of 3 cores (this needs 1)" in world.waits("d")


def test_a_single_replica_grows_into_what_its_predecessor_and_the_quota_leave_together() -> None:
    world = PlannerWorld(
        [node()],
        [deployment("d", project="x", resources=replace(CORE, cpu_millis=500))],
        projects=[Project("x", cores(1))],
    )
    world.run()
    update(world, resources=CORE)
    world.run()
    assert (replaced(world), held(world, "x")) == (1, 1)


def test_two_updates_at_once_at_a_full_quota_both_end() -> None:
    names = ("a", "b")
    world = PlannerWorld(
        [node(cores=16)],
        [deployment(name, project="x", replicas=2) for name in names],
        projects=[Project("x", cores(4))],
    )
    world.run()
    for name in names:
        update(world, name)
    world.run()
    assert [replaced(world, name) for name in names] == [2, 2]
    assert held(world, "x") == 4


def test_an_update_that_is_taken_back_and_changed_again_never_holds_more_than_twice_the_quota() -> None:
    world = PlannerWorld(
        [node(cores=32)], [deployment("d", project="x", replicas=4)], projects=[Project("x", cores(4))]
    )
    world.run()
    (target,) = world.snapshot.deployments["d"].asked.targets
    for number in (2, 3, 1, 2, 3):
        world.ask("d", targets=(replace(target, resolved_version=number),))
        world.step()
        surging = sum(r.surge for r in world.replicas if r.placed)
        assert surging <= 4
        assert held(world, "x") - surging <= 4
    world.run()
    assert held(world, "x") == 4


def test_a_node_is_drained_at_a_full_quota() -> None:
    world = PlannerWorld(
        [node("a"), node("b")], [deployment("d", project="x", replicas=2)], projects=[Project("x", cores(2))]
    )
    world.run()
    drained = replace(world.snapshot.nodes["a"], cordoned=True, draining=True)
    world.snapshot = replace(world.snapshot, nodes={**world.snapshot.nodes, "a": drained})
    world.run()
    assert {r.node for r in world.replicas} == {"b"}
    assert held(world, "x") == 2


# -- shares -----------------------------------------------------------------------------------------


def test_projects_take_turns_by_their_dominant_share_over_their_weight() -> None:
    """The example of Ghodsi et al. (2011), section 4.1: 9 cores and 18 GB for 1 and 4 against 3 and 1."""
    total = Holding(9000, 18 * GIB)
    needs = {"a": Holding(1000, 4 * GIB), "b": Holding(3000, 1 * GIB)}
    given = {"a": 0, "b": 0}
    waiting = [(name, n) for name in ("a", "b") for n in range(9)]

    def share(name: str) -> float:
        return needs[name].times(given[name]).share_of(total)

    for name, _ in in_turn(waiting, lambda each: each[0], lambda each: each[1], share):
        given[name] += 1
        if not needs["a"].times(given["a"]).plus(needs["b"].times(given["b"])).within(total):
            given[name] -= 1
            break
    assert given == {"a": 3, "b": 2}


def test_replicas_of_two_projects_that_both_want_all_share_it_by_weight() -> None:
    world = PlannerWorld(
        [node("n", cores=12)],
        [
            deployment("first", project="one", replicas=20),
            deployment("second", project="two", replicas=20, seconds=1),
        ],
        projects=[Project("one"), Project("two", weight=2.0)],
    )
    world.run()
    assert (world.placed("first"), world.placed("second")) == (4, 8)


def test_endless_small_jobs_of_two_projects_converge_to_their_weights() -> None:
    projects = [Project("one"), Project("two", weight=2.0)]
    world = PlannerWorld([node("a", cores=6), node("b", cores=6)], projects=projects)
    made = 0
    shares = []
    for turn in range(120):
        for project in ("one", "two"):
            waiting = [
                j
                for j in world.snapshot.jobs.values()
                if j.project == project and j.id not in world.working()
            ]
            for _ in range(8 - len(waiting)):
                made += 1
                world.add(jobs=[job(f"j{made:04}", project=project, seconds=turn)])
        # Whoever has run longest ends, of whichever project: two at a time.
        oldest = sorted(world.working(), key=lambda name: world.snapshot.jobs[name].placed_time or 0)[:2]
        world.see(done=oldest)
        world.step()
        world.step()
        if turn >= 20:
            shares.append((held(world, "one"), held(world, "two")))
    one, two = (sum(part) / len(shares) for part in zip(*shares, strict=True))
    assert two / one == pytest.approx(2.0, rel=0.05)
    assert one + two > 9


# -- what callers ask for ---------------------------------------------------------------------------


def test_a_quota_below_use_names_what_is_held() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        check_quota(Project("x", Holding(2000, 3 * GIB)), Holding(4000, 8 * GIB, 1000))
    assert refused.value.reason is Reason.QUOTA_BELOW_USE
    assert refused.value.message.startswith(
        "Project x holds 4 cores, more than 2 and 8192 MiB of memory, more than 3072 MiB. End some of it"
    )
    check_quota(Project("x"), Holding(4000, 8 * GIB, 1000))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e-9, 1e9])
def test_a_weight_is_a_number_above_0(weight: float) -> None:
    with pytest.raises(InvalidArgument, match="weight is"):
        check_weight(weight)
    assert check_weight(0) == 1.0


def test_a_quota_goes_there_and_back_and_bounds_nothing_that_it_cannot() -> None:
    resources = Resources(4000, GIB, 2, gpu_memory_millis=500)
    assert quota_of(resources) == Holding(4000, GIB, 2500)
    assert resources_of(Holding(4000, GIB, 2500)) == resources
    for field in ("disk_bytes", "gpu_memory_bytes"):
        with pytest.raises(InvalidArgument, match=f"cannot bound {field}"):
            quota_of(Resources(**{field: 1}))
    with pytest.raises(InvalidArgument, match="cpu_millis is -1"):
        quota_of(Resources(cpu_millis=-1))
