"""What a task of several has gathered to go on from stays while its ranks read it."""

from pathlib import Path
from typing import Any

import pytest

from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import Unavailable
from penstock_worker.adapters.jobs.checkpoints import files_of
from penstock_worker.adapters.jobs.rooms import JobRoom
from penstock_worker.adapters.jobs.services import TaskClerk
from penstock_worker.domain.checkpoint import Writing
from penstock_worker.domain.task import DesiredTask
from support.clerks import clerk_of

SPEC = job_pb2.Job(name="jobs/j").SerializeToString()
TASK = DesiredTask("jobs/j/tasks/0", "j", 0, 1, 0, 2, 2, 1, "train", SPEC, 1000, 0, ())
WRITING = Writing(7, "a", 2)


class Away:
    async def artifacts_of(self, _: str) -> list[Any]:
        raise Unavailable("The registry is away.")


@pytest.fixture
def room(tmp_path: Path) -> JobRoom:
    away: Any = Away()
    nobody: Any = None
    return JobRoom(tmp_path / "j" / "0", "j", away, nobody)


@pytest.fixture
def clerk(room: JobRoom) -> TaskClerk:
    return clerk_of(TASK, room=room)


async def test_ranks_that_ask_again_get_what_was_gathered_and_nobody_is_asked(
    room: JobRoom, clerk: TaskClerk
) -> None:
    path = room.store.begin(7, 0)
    (path / "weights").write_text("7")
    room.mark_part(path, WRITING, 0)
    room.store.commit(7, 0, 1, 0)
    choice = {"step": 7, "round": "a", "parts": 2, "sources": [0, 1]}
    begun = await clerk.call("gather", 0, 1, {"choice": choice})
    (Path(begun["path"]) / "others").write_text("7")  # as another node sends it
    gathered = await clerk.call("gathered", 0, 1, {"step": 7})
    assert await clerk.call("last_checkpoint", 0, 1, {}) == {"step": 7, "path": gathered["path"]}
    assert files_of(Path(gathered["path"])) == ["others", "weights"]


async def test_where_all_began_anew_there_is_no_checkpoint(clerk: TaskClerk) -> None:
    await clerk.call("start_anew", 0, 1, {})
    assert await clerk.call("last_checkpoint", 0, 1, {}) == {}
