"""Several tasks of one attempt meet, wherever they are, and share their checkpoints through the registry."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.scheduler.v1 import job_pb2
from support.agent_world import World, alive, kill, until
from support.artifact_caller import ArtifactCaller
from support.job_specs import job, together
from support.registry_world import Registry

pytestmark = pytest.mark.training

INTERVAL = 5


async def both(
    world: World, wanted: job_pb2.Job, first: int = 0, attempt: int = 1, other: World | None = None
) -> list[str]:
    """Want two tasks of an attempt, as the scheduler does: the second learns from the first where to meet."""
    leader = world.want_task(wanted, first, index=0, tasks=2, attempt=attempt)

    def address() -> str:
        seen = world.observed_task(leader.name)
        return seen.rendezvous if seen is not None else ""

    follower = (other or world).want_task(
        wanted, first + 1, index=1, tasks=2, attempt=attempt, rendezvous=await until(address, "an address")
    )
    return [leader.name, follower.name]


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[World]:
    """What the scheduler wants of another node."""
    found = World(f"unix:{tmp_path}/elsewhere.sock")
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
def other_node(elsewhere: World, tmp_path: Path) -> dict[str, object]:
    """How its agent differs."""
    return {
        "data_dir": tmp_path / "other",
        "scheduler_address": elsewhere.address,
        "worker_listen": f"unix:{tmp_path}/other.sock",
        "worker_node": "other-node",
    }


@pytest.mark.parametrize(("uploads", "ranks"), [("slow", 2), ("never", 1)])
async def test_two_tasks_go_on_from_a_checkpoint_of_both_when_a_rank_of_one_is_killed(
    world: World, run_agent, registry: Registry, tmp_path: Path, uploads: str, ranks: int
) -> None:
    trace = tmp_path / "trace"
    async with run_agent(torch=True):
        names = await both(world, job("together", ranks=ranks, to=60, every=INTERVAL, trace=trace))
        # A checkpoint comes each 50 ms, and its upload takes longer: the kill always meets one.
        await until(lambda: any(step >= 3 for step, *_ in together(trace)))
        if uploads == "never":
            await registry.app.server.stop(0)
        await until(lambda: any(step >= 12 for step, *_ in together(trace)))
        kill(next(pid for _, rank, pid, _ in reversed(together(trace)) if rank == ranks))
        seen = await world.task_state(names[0], "SUCCEEDED")
        await world.task_state(names[1], "SUCCEEDED")
        assert dict(seen.report) == {"counted": 60, "world_size": 2 * ranks}
    for rank in range(2 * ranks):
        steps = [step for step, number, _, _ in together(trace) if number == rank]
        assert sorted(set(steps)) == list(range(1, 61))
        assert len(steps) - len(set(steps)) <= INTERVAL + 1


async def test_what_fewer_tasks_have_written_is_gone_on_from_when_the_others_come(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    wanted = job("together", to=40, every=INTERVAL, trace=trace, hold=22)
    wanted.min_nodes = 1
    async with run_agent(torch=True):
        leader = world.want_task(wanted, index=0, tasks=2)
        # Without the other after LAST_CALL_SECONDS.
        await until(lambda: any(step == 22 for step, *_ in together(trace)))
        address = world.observed_task(leader.name).rendezvous
        follower = world.want_task(wanted, 1, index=1, tasks=2, rendezvous=address)
        await until(lambda: any(ranks == 2 for *_, ranks in together(trace)))
        (tmp_path / "trace.go").touch()
        seen = await world.task_state(leader.name, "SUCCEEDED")
        await world.task_state(follower.name, "SUCCEEDED")
    assert dict(seen.report) == {"counted": 40, "world_size": 2}
    assert min(step for step, _, _, ranks in together(trace) if ranks == 2) == 21


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


async def test_nodes_go_on_from_their_own_disks_though_the_registry_has_nothing(
    world: World,
    elsewhere: World,
    other_node: dict[str, object],
    run_agent,
    artifacts: ArtifactCaller,
    registry: Registry,
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    wanted = job("together", to=40, every=INTERVAL, hold=12, trace=trace)
    async with run_agent(torch=True), run_agent(torch=True, **other_node):
        names = await both(world, wanted, other=elsewhere)
        await until(lambda: {rank for step, rank, *_ in together(trace) if step == 7} == {0, 1})
        await registry.app.server.stop(0)
        await until(lambda: {rank for step, rank, *_ in together(trace) if step == 12} == {0, 1})
        for node, name in zip((world, elsewhere), names, strict=True):
            node.drop_task(name)
            await until(lambda node=node, name=name: stopped(node, name))
        before = len(together(trace))
        (tmp_path / "trace.go").touch()
        # The tasks change places: each node lacks what the other has.
        again = await both(elsewhere, wanted, 2, attempt=2, other=world)
        seen = await elsewhere.task_state(again[0], "SUCCEEDED")
        assert dict(seen.report) == {"counted": 40, "world_size": 2}
    assert min(step for step, *_ in together(trace)[before:]) == 11


def stopped(node: World, name: str) -> bool:
    seen = node.observed_task(name)
    return seen is None or seen.state == job_pb2.TASK_STATE_STOPPED


async def test_an_agent_that_follows_does_not_start_the_first_of_several_tasks_again(
    world: World, run_agent, tmp_path: Path
) -> None:
    wanted = job("together", to=20, every=INTERVAL, trace=tmp_path / "trace")
    leader = world.want_task(wanted, index=0, tasks=2)
    async with run_agent(torch=True):
        await until(lambda: (seen := world.observed_task(leader.name)) and seen.rendezvous)
    world.statuses.clear()
    async with run_agent(torch=True):
        # The store where the ranks meet went with the agent: another attempt must begin.
        seen = await world.task_state(leader.name, "FAILED")
    assert (seen.failure_reason, seen.permanent) == ("AGENT_RESTARTED", False)
