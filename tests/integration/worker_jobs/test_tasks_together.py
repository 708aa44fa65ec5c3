"""Several tasks of one attempt meet, wherever they are, and share their checkpoints through the registry."""

from pathlib import Path

import pytest

from penstock.scheduler.v1 import job_pb2
from support.agent_world import World, alive, kill, until
from support.artifact_caller import ArtifactCaller
from support.job_specs import job, together

pytestmark = pytest.mark.training

INTERVAL = 5


async def both(world: World, wanted: job_pb2.Job, first: int = 0, attempt: int = 1) -> list[str]:
    """Want two tasks of an attempt, as the scheduler does: the second learns from the first where to meet."""
    leader = world.want_task(wanted, first, index=0, tasks=2, attempt=attempt)

    def address() -> str:
        seen = world.observed_task(leader.name)
        return seen.rendezvous if seen is not None else ""

    follower = world.want_task(
        wanted, first + 1, index=1, tasks=2, attempt=attempt, rendezvous=await until(address, "an address")
    )
    return [leader.name, follower.name]


async def test_two_tasks_go_on_from_a_checkpoint_of_both_when_a_rank_of_one_is_killed(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    async with run_agent(torch=True):
        names = await both(world, job("together", to=60, every=INTERVAL, trace=trace))
        await until(lambda: any(step >= 12 for step, *_ in together(trace)))
        kill(next(pid for _, rank, pid, _ in reversed(together(trace)) if rank == 1))
        seen = await world.task_state(names[0], "SUCCEEDED")
        await world.task_state(names[1], "SUCCEEDED")
        assert dict(seen.report) == {"counted": 60, "world_size": 2}
    for rank in (0, 1):
        steps = [step for step, number, _, _ in together(trace) if number == rank]
        assert sorted(set(steps)) == list(range(1, 61))
        assert len(steps) - len(set(steps)) <= INTERVAL + 1


async def test_ranks_that_were_done_begin_again_when_the_first_is_killed_while_it_publishes(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    async with run_agent(torch=True):
        names = await both(world, job("together", to=20, every=INTERVAL, trace=trace, publish=1))
        await until(lambda: {rank for step, rank, *_ in together(trace) if step == 20} == {0, 1})
        first, second = (
            next(pid for _, rank, pid, _ in reversed(together(trace)) if rank == number) for number in (0, 1)
        )
        await until(lambda: not alive(second))
        kill(first)
        (tmp_path / "trace.go").touch()
        await world.task_state(names[0], "SUCCEEDED")
        await world.task_state(names[1], "SUCCEEDED")
