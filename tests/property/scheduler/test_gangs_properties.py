"""Whatever is queued: gangs are whole, nothing is given out twice, and in the end all that fits has run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_scheduler.domain.job import Job
from penstock_scheduler.domain.project import Holding, Project
from support.planner_world import PlannerWorld, job, node

PROJECTS = ("x", "y")


@st.composite
def queues(draw: st.DrawFn) -> list[Job]:
    found = []
    for number in range(draw(st.integers(1, 8))):
        tasks = draw(st.integers(1, 4))
        found.append(
            job(
                f"j{number}",
                tasks=tasks,
                least=draw(st.integers(1, tasks)),
                cores=draw(st.sampled_from([0.5, 1, 2, 4, 6])),
                project=draw(st.sampled_from(PROJECTS)),
                priority=draw(st.integers(-1, 1)),
                seconds=number,
            )
        )
    return found


@settings(max_examples=40, deadline=None)
@given(
    cores=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4),
    queue=queues(),
    quota=st.sampled_from([0, 2, 6]),
)
def test_every_gang_that_could_run_alone_runs_in_the_end(
    cores: list[int], queue: list[Job], quota: int
) -> None:
    nodes = [node(f"n{number}", cores=count) for number, count in enumerate(cores)]
    projects = [Project("x", Holding(cpu_millis=1000 * quota)), Project("y")]
    world = PlannerWorld(nodes, jobs=queue, projects=projects)
    ran: set[str] = set()
    for _ in range(len(queue) + 1):
        world.run()
        held: Counter[str] = Counter()
        for task in world.tasks:
            held[task.node] += task.resources.cpu_millis
        assert all(held[each.name] <= each.cpu_millis for each in nodes)
        of_x = sum(t.resources.cpu_millis for t in world.tasks if world.snapshot.jobs[t.job].project == "x")
        assert not quota or of_x <= 1000 * quota
        for name in world.working():
            assert len(world.nodes_of(name)) == world.snapshot.jobs[name].gang.tasks
        now = world.working()
        for waiting in world.snapshot.jobs.values():
            assert waiting.id in now or waiting.message
        if not now:
            break
        # One after the other ends, the youngest first: nobody may count on the oldest.
        last = max(now, key=lambda name: world.snapshot.jobs[name].create_time)
        ran.add(last)
        world.run(done=[last])
        left = {name: each for name, each in world.snapshot.jobs.items() if name != last}
        world.snapshot = replace(world.snapshot, jobs=left)
    for each in queue:
        slots = sum(machine.cpu_millis // each.gang.resources.cpu_millis for machine in nodes)
        asks = each.gang.tasks * each.gang.resources.cpu_millis
        if slots >= each.gang.tasks and (each.project == "y" or not quota or asks <= 1000 * quota):
            assert each.id in ran
