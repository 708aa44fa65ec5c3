"""Whatever of a task is killed: the work goes on from its last checkpoint, or the scheduler is told."""

import os
from pathlib import Path

from support.agent_world import World, alive, children_of, kill, until
from support.job_specs import job, steps_of, together
from support.task_events import Events


async def launcher_of(world: World, task: str) -> int:
    def found() -> int:
        seen = world.observed_task(task)
        return seen.pid if seen is not None else 0

    return int(await until(found, "a launcher"))


async def test_a_rank_that_is_killed_starts_again_and_repeats_no_more_than_one_interval(
    world: World, run_agent, events: Events, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    async with run_agent():
        task = world.want_task(job("count", to=30, every=4, hold=11, trace=trace))
        await until(lambda: 11 in steps_of(trace))
        (rank,) = children_of(await launcher_of(world, task.name))
        kill(rank)
        (tmp_path / "trace.go").touch()
        seen = await world.task_state(task.name, "SUCCEEDED")
        await events.until(task.name, lambda found: len(found) >= seen.last_event)
        assert any("ended by SIGKILL. It goes on" in line for line in await events.lines(task.name))
    assert steps_of(trace) == [*range(1, 12), *range(9, 31)]


async def test_a_launcher_that_is_killed_takes_its_ranks_with_it_and_starts_again(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    async with run_agent():
        task = world.want_task(job("count", to=20, every=4, hold=10, trace=trace))
        await until(lambda: 10 in steps_of(trace))
        launcher = await launcher_of(world, task.name)
        (rank,) = children_of(launcher)
        kill(launcher)
        await until(lambda: not alive(rank))
        (tmp_path / "trace.go").touch()
        await world.task_state(task.name, "SUCCEEDED")
    assert steps_of(trace) == [*range(1, 11), *range(9, 21)]


async def test_a_rank_that_dies_again_and_again_ends_the_task(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    async with run_agent(worker_job_regroups=1):
        task = world.want_task(job("count", to=20, every=100, hold=10, trace=trace))
        for times in (1, 2):
            await until(lambda times=times: steps_of(trace).count(10) == times)
            (rank,) = children_of(await launcher_of(world, task.name))
            kill(rank)
        seen = await world.task_state(task.name, "FAILED")
        assert (seen.failure_reason, seen.permanent) == ("KILLED", False)


async def test_two_ranks_meet_and_one_that_is_killed_makes_both_go_on_from_the_checkpoint(
    world: World, run_agent, events: Events, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    async with run_agent(torch=True):
        task = world.want_task(job("together", ranks=2, to=60, every=5, trace=trace))
        await until(lambda: any(step >= 12 for step, *_ in together(trace)))
        victim = next(pid for _, rank, pid, _ in reversed(together(trace)) if rank == 1)
        kill(victim)
        seen = await world.task_state(task.name, "SUCCEEDED")
        assert seen.report["counted"] == 60
        await events.until(task.name, lambda found: len(found) >= seen.last_event)
        assert any("The ranks start again" in line for line in await events.lines(task.name))
    for rank in (0, 1):
        steps = [step for step, number, _, _ in together(trace) if number == rank]
        assert sorted(set(steps)) == list(range(1, 61))
        assert len(steps) - len(set(steps)) <= 5
    assert len({pid for _, _, pid, _ in together(trace)}) == 4
    assert os.getpid() not in {pid for _, _, pid, _ in together(trace)}
