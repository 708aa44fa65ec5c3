"""A job may have the name of one that was deleted, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.jobs.rooms import JobRoom, JobRooms
from penstock_worker.adapters.scheduler_client import _desired_task
from penstock_worker.domain.checkpoint import Writing

FIRST, SECOND = 1_700_000_000_000_000_000, 1_700_000_100_000_000_000


def rooms(directory: Path) -> JobRooms:
    unused: Any = None  # nothing is sent
    return JobRooms(directory, unused, unused)


def write_checkpoint(room: JobRoom) -> None:
    path = room.store.directory / "10"
    path.mkdir()
    room.mark_part(path, Writing(10, "", 1), 0)


async def test_a_job_does_not_go_on_from_the_checkpoint_of_a_deleted_one_of_its_name(tmp_path: Path) -> None:
    here = rooms(tmp_path)
    room = await here.enter("fit", 0, FIRST)
    write_checkpoint(room)
    other = await here.enter("other", 0, FIRST)
    write_checkpoint(other)
    here.leave(room)
    here.leave(other)
    again = await here.enter("fit", 0, SECOND)
    assert again.held() == {}
    assert len((await here.enter("other", 0, FIRST)).held()) == 1


async def test_a_job_keeps_its_checkpoints_over_attempts_agents_and_tasks(tmp_path: Path) -> None:
    here = rooms(tmp_path)
    room = await here.enter("fit", 0, FIRST)
    write_checkpoint(room)
    assert len((await here.enter("fit", 1, FIRST)).held()) == 1
    assert len((await rooms(tmp_path).enter("fit", 0, FIRST)).held()) == 1, "by the next agent"


async def test_what_an_earlier_release_has_left_of_a_job_that_goes_on_stays(tmp_path: Path) -> None:
    write_checkpoint(await rooms(tmp_path).enter("fit", 0))
    assert len((await rooms(tmp_path).enter("fit", 0, FIRST)).held()) == 1


def test_when_a_job_was_made_is_told_beside_what_its_ranks_are_told() -> None:
    spec = job_pb2.TaskSpec(name="jobs/fit/tasks/0", tasks=1)
    told = _desired_task(job_pb2.TaskSpec.FromString(spec.SerializeToString()))
    spec.job.create_time.FromNanoseconds(FIRST)
    desired = _desired_task(spec)
    assert (told.made, desired.made) == (0, FIRST)
    assert desired.spec == told.spec
