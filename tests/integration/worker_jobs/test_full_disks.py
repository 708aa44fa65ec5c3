"""A node whose disk is full, for real: jobs say so with the numbers, all else goes on, and room helps."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import job_pb2
from support.agent_world import World, until
from support.artifact_caller import ArtifactCaller
from support.job_specs import job
from support.programs import SCRIPT, program
from support.registry_world import running_registry

pytestmark = pytest.mark.chaos

DISK = 48 << 20


@contextlib.contextmanager
def small_disk(path: Path, size: int = DISK) -> Iterator[Path]:
    """A file system of its own, in memory."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "penstock-test", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def cached(disk: Path, world: World) -> version_pb2.Version:
    """A toy that the node has already; the registry of these tests does not know it."""
    version = world.push_toy()
    bundle = disk / "bundles" / version.digest.removeprefix("sha256:")
    bundle.mkdir(parents=True)
    (bundle / "behaviour.json").write_bytes(b"{}")
    return version


def make_room(disk: Path) -> None:
    """Enlarge it."""
    subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)


def half_done(disk: Path) -> list[Path]:
    """What was begun to be decoded."""
    return list(disk.glob("jobs/*/0/decoded/*/*/*.partial"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as path:
        yield path


async def failed(world: World, wanted: job_pb2.Job, number: int = 0) -> str:
    """What is said of a job that fails for lack of room."""
    seen = await world.task_state(world.want_task(wanted, number).name, "FAILED")
    assert (seen.failure_reason, seen.permanent) == ("OUT_OF_DISK", False), seen.message
    return seen.message


async def test_checkpoints_that_fill_the_disk_end_their_job_and_nothing_else(
    world: World, run_agent, artifacts: ArtifactCaller, disk: Path
) -> None:
    text = """
        import torch
        from penstock import training
        for step in range(1, 9):
            training.checkpoint(step, {"w": torch.zeros(MEGABYTES * step, 1 << 18)})
        """
    first = await program(artifacts, text.replace("MEGABYTES", "60"), name="first")
    later = await program(artifacts, text.replace("MEGABYTES * step", "20"), name="later")
    toy = cached(disk, world)
    async with run_agent(train=SCRIPT, allow_user_code=True, torch=True, data_dir=disk):
        world.want("r", toy)
        replica = await world.state("r", "READY")
        # The very first one: torch is told by the kernel, in the midst of it.
        words = await failed(world, first)
        assert "No space is left on the node's disk" in words
        assert str(disk) in words
        assert re.search(r"the job has \d+ MB in .*; of 50 MB that the disk has, \d+ MB are free", words)
        # A later one: refused before it is begun, and the one before is kept.
        words = await failed(world, later)
        assert re.search(r"A checkpoint takes about \d+ MB, and the disk of .* has \d+ MB left", words)
        assert str(disk) in words
        kept = disk / "jobs" / "later" / "0" / "checkpoints"
        assert [path.name for path in kept.iterdir() if path.name.isdigit()]
        for name in ("first", "later"):
            world.drop_task(f"jobs/{name}/tasks/0")
        # Room is made, and all is well.
        make_room(disk)
        good = await program(artifacts, text.replace("MEGABYTES * step", "8"), name="good")
        seen = await world.task_state(world.want_task(good).name, "FAILED")
        assert seen.failure_reason == "NO_MODEL"
        assert (disk / "jobs" / "good" / "0" / "checkpoints" / "8").is_dir()
        assert (await world.state("r", "READY")).pid == replica.pid


async def test_a_dataset_that_has_no_room_on_the_node_is_said_with_its_bytes(
    world: World, run_agent, artifacts: ArtifactCaller, disk: Path
) -> None:
    large = await artifacts.push("large", {"data.npz": bytes(60 << 20)})
    filling = await artifacts.push("filling", {"data.npz": os.urandom(30 << 20)})
    async with run_agent(data_dir=disk):
        words = await failed(world, job("fetch", name="a", dataset=large.name))
        assert re.search(r"needs 62914560 bytes more, and the disk of .* has \d+ left", words)
        assert str(disk) in words
        # The disk is filled by somebody else while the files arrive.
        wanted = job("fetch", name="b", dataset=filling.name, fill=str(disk / "other"), leave=8 << 20)
        words = await failed(world, wanted)
        assert "bytes more, and the disk of" in words or "No space is left on the disk of" in words
        (disk / "other").unlink()
        good = world.want_task(job("fetch", name="c", dataset=filling.name))
        await world.task_state(good.name, "SUCCEEDED")


async def test_rows_that_have_no_room_beside_what_was_fetched_are_said_with_their_bytes(
    world: World, run_agent, artifacts: ArtifactCaller, disk: Path, tmp_path: Path
) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.ones((20_000, 1000), np.float32), y=np.arange(20_000) % 2)
    packed = await artifacts.push("packed", {"data.npz": (tmp_path / "d.npz").read_bytes()})
    async with run_agent(data_dir=disk):
        words = await failed(world, job("fetch", name="a", dataset=packed.name, open=1))
        assert re.search(
            r"No space left on device; .* MB more were needed after .* MB, and .* MB are free", words
        )
        assert str(disk) in words
        assert not half_done(disk)
        make_room(disk)
        good = world.want_task(job("fetch", name="b", dataset=packed.name, open=1))
        await world.task_state(good.name, "SUCCEEDED")
        await until(lambda: not (disk / "jobs" / "b" / "0" / "decoded").exists(), "it to go with the task")


async def test_what_a_job_publishes_to_a_registry_without_room_is_said_with_its_bytes(
    world: World, run_agent, registry_database: str, short_path: Path, disk: Path
) -> None:
    async with (
        running_registry(disk, registry_database) as full,
        run_agent(registry_address=full.app.address),
    ):
        words = await failed(world, job("publish", name="a", bytes=60 << 20))
        assert re.search(r"62,914,560 bytes more are needed, and [\d,]+ are free in", words)
        assert str(disk) in words
        good = world.want_task(job("publish", name="b", bytes=1 << 20))
        await world.task_state(good.name, "SUCCEEDED")


async def test_a_bundle_that_has_no_room_on_the_node_is_said_with_its_path(
    world: World, run_agent, disk: Path
) -> None:
    async with run_agent(data_dir=disk):
        words = await failed(world, job("publish", name="a", bytes=60 << 20))
        assert "No space is left on the node's disk" in words
        assert str(disk / "jobs" / "a") in words
        good = world.want_task(job("publish", name="b", bytes=1 << 20))
        await world.task_state(good.name, "SUCCEEDED")
