"""A job may have the name of one that was deleted, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.registry.v1 import artifact_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.jobs.rooms import JobRoom, JobRooms
from penstock_worker.adapters.scheduler_client import _desired_task
from penstock_worker.domain.checkpoint import Writing
from penstock_worker.domain.task import DesiredTask
from support.clerks import clerk_of

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


class Kept:
    """A registry with checkpoints of one artifact."""

    def __init__(self, *kept: artifact_pb2.Artifact) -> None:
        self.kept = kept

    async def artifacts_of(self, _: str) -> list[artifact_pb2.Artifact]:
        return list(self.kept)


def kept(step: int, *, made: int = 0, created: int = 0) -> artifact_pb2.Artifact:
    found = artifact_pb2.Artifact(name=f"v{step}", state=artifact_pb2.ARTIFACT_STATE_READY)
    found.labels.update({"step": str(step)} | ({"made": str(made)} if made else {}))
    if created:
        found.create_time.FromNanoseconds(created)
    return found


async def steps_of(made: int, directory: Path, *found: artifact_pb2.Artifact) -> list[int]:
    """Return the steps of the checkpoints that a job takes for its own."""
    registry: Any = Kept(*found)
    nothing: Any = None
    room = JobRoom(directory / "fit" / "0", "fit", registry, nothing)
    spec = job_pb2.Job(name="jobs/fit").SerializeToString()
    task = DesiredTask("jobs/fit/tasks/0", "fit", 0, 1, 0, 1, 1, 1, "train", spec, 1, 0, (), made=made)
    clerk = clerk_of(task, room=room, registry=registry)
    answer = await clerk.call("stored_parts", 0, 1, {"parts": 1, "optional": False})
    return sorted(step for step, _, _, _ in answer["parts"])


async def test_what_is_stored_for_a_deleted_job_is_none_of_the_next_one_of_its_name(tmp_path: Path) -> None:
    late = kept(50, made=FIRST, created=SECOND + 1)  # its upload ended when the next one was there
    assert await steps_of(SECOND, tmp_path, late, kept(10, made=SECOND)) == [10]
    assert await steps_of(FIRST, tmp_path, late, kept(10, made=SECOND)) == [50]


async def test_what_an_earlier_release_has_stored_counts_unless_it_is_older_than_the_job(
    tmp_path: Path,
) -> None:
    found = kept(50, created=SECOND - 1), kept(10, created=SECOND + 1)
    assert await steps_of(SECOND, tmp_path, *found) == [10]
    assert await steps_of(0, tmp_path, *found) == [10, 50], "where nobody knows when it was made"


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
