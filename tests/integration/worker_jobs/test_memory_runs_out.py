"""Work that takes more memory than it was given: ended with the numbers, once, and all else goes on."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.scheduler.v1 import job_pb2
from support.agent_world import World, alive, until
from support.artifact_caller import ArtifactCaller
from support.job_specs import job

pytestmark = pytest.mark.chaos

GRANT = 250_000_000
RECIPE = "penstock_worker.adapters.training.job:run"


def started(trace: Path) -> list[int]:
    """The processes of a `grow`."""
    return [int(line) for line in trace.read_text().splitlines()] if trace.exists() else []


async def test_a_rank_over_what_its_job_asked_for_is_ended_with_the_numbers_and_not_again(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace, other = tmp_path / "trace", tmp_path / "other"
    wanted = job("grow", trace=trace, bytes=2 * GRANT)
    wanted.resources.memory_bytes = GRANT
    async with run_agent():
        beside = world.want_task(job("count", name="other", to=5, every=1, hold=3, trace=other))
        await until(lambda: "3" in other.read_text().splitlines() if other.exists() else False)
        (tmp_path / "trace.go").touch()
        task = world.want_task(wanted, memory_bytes=GRANT)
        seen = await world.task_state(task.name, "FAILED")
        assert (seen.failure_reason, seen.permanent) == ("OUT_OF_MEMORY", True)
        used = re.search(r"It uses (\d+) MB of memory; it was given 250 MB, and was ended", seen.message)
        assert used is not None
        assert int(used[1]) > 250
        (rank,) = started(trace)
        assert not alive(rank)
        (tmp_path / "other.go").touch()
        await world.task_state(beside.name, "SUCCEEDED")


async def test_a_recipe_over_what_its_job_asked_for_is_ended_likewise(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 256), dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=rows, y=np.arange(20_000) % 2)
    data = await artifacts.push("rows", {"data.npz": (tmp_path / "d.npz").read_bytes()})
    wanted = job("")
    wanted.train.dataset = data.name
    wanted.train.recipe.architecture = "mlp"
    wanted.train.recipe.architecture_parameters.update({"hidden": [8192]})
    wanted.train.recipe.batch_size = 16_000
    wanted.train.recipe.epochs = 50
    wanted.resources.memory_bytes = GRANT
    async with run_agent(train=RECIPE, torch=True):
        seen = await world.task_state(world.want_task(wanted, memory_bytes=GRANT).name, "FAILED")
        assert (seen.failure_reason, seen.permanent) == ("OUT_OF_MEMORY", True)
        assert "it was given 250 MB" in seen.message or "each rank has 238" in seen.message


async def test_a_dataset_larger_than_the_memory_of_the_job_is_learnt_from_by_two_ranks(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).standard_normal((2 * GRANT // 4096, 1024), dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=rows, y=np.arange(len(rows)) % 2)
    data = await artifacts.push("rows", {"data.npz": (tmp_path / "d.npz").read_bytes()})
    wanted = job("", ranks=2)
    wanted.train.dataset = data.name
    wanted.train.recipe.architecture = "linear"
    wanted.train.recipe.strategy.name = "ddp"
    wanted.train.recipe.batch_size = 4096
    wanted.train.recipe.epochs = 2
    wanted.resources.memory_bytes = GRANT
    async with run_agent(train=RECIPE, torch=True):
        task = world.want_task(wanted, memory_bytes=2 * GRANT)
        most = 0

        def ended() -> bool:
            nonlocal most
            seen = world.observed_task(task.name)
            most = max(most, seen.memory_bytes if seen is not None else 0)
            return seen is not None and seen.state in (
                job_pb2.TASK_STATE_SUCCEEDED,
                job_pb2.TASK_STATE_FAILED,
            )

        await until(ended, seconds=90)
        await world.task_state(task.name, "SUCCEEDED")
    assert 0 < most < rows.nbytes


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group of the second kind below one's own, with so much memory."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.rpartition(":")[2] for line in lines if line.startswith("0::")), None)
    if own is None:
        pytest.skip("there are no control groups of the second kind here")
    group = Path("/sys/fs/cgroup") / own.lstrip("/") / "penstock-test"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group may be made here: {error.strerror}")
    try:
        if not (group / "memory.max").exists():
            pytest.skip("control groups do not limit memory here")
        (group / "memory.max").write_text(str(limit))
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        group.rmdir()


async def test_a_rank_that_the_kernel_ends_for_lack_of_memory_is_told_from_one_that_somebody_killed(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    with control_group(GRANT) as group:
        async with run_agent():
            task = world.want_task(job("grow", trace=trace, bytes=4 * GRANT), memory_bytes=8 * GRANT)
            await until(lambda: started(trace))
            (group / "cgroup.procs").write_text(str(started(trace)[0]))
            (tmp_path / "trace.go").touch()
            seen = await world.task_state(task.name, "FAILED")
            assert (seen.failure_reason, seen.permanent) == ("OUT_OF_MEMORY", False)
            assert re.search(
                r"killed because the node was short of memory: the task had \d+ MB of the", seen.message
            )
            assert len(started(trace)) == 1
