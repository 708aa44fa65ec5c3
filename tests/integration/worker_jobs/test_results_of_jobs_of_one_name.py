"""Jobs of one name that come to the same result have each their own, and an attempt makes nothing twice."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.registry.v1 import artifact_pb2, registry_service_pb2, version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock_kit.rpc import open_channel
from penstock_worker.adapters.jobs.registry import JobRegistry
from penstock_worker.adapters.jobs.services import TaskClerk
from penstock_worker.domain.task import DesiredTask
from support.clerks import clerk_of
from support.registry_world import Registry, manifest

FIRST, SECOND = 1_700_000_000_000_000_000, 1_700_000_100_000_000_000
SPEC = job_pb2.Job(name="jobs/score").SerializeToString()


@pytest.fixture
async def jobs(registry: Registry) -> AsyncIterator[JobRegistry]:
    channel = open_channel(registry.app.address)
    yield JobRegistry(channel)
    await channel.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.skops").write_text("the same each time")
    return made


def clerk(jobs: JobRegistry, made: int, attempt: int = 1) -> TaskClerk:
    task = DesiredTask(
        f"jobs/score/tasks/{attempt}",
        "score",
        attempt,
        attempt,
        0,
        1,
        1,
        1,
        "train",
        SPEC,
        1,
        0,
        (),
        made=made,
    )
    return clerk_of(task, registry=jobs)


async def publish(clerk: TaskClerk, directory: Path) -> tuple[str, str]:
    """Return the names of an artifact and a version."""
    answers = {
        "artifact": "answers",
        "directory": str(directory),
        "description": {},
        "kind": artifact_pb2.ARTIFACT_KIND_PREDICTIONS,
        "format": "parquet",
    }
    packed = base64.b64encode(manifest().SerializeToString()).decode()
    model = {"model": "m", "directory": str(directory), "manifest": packed, "labels": {}, "seed": 1}
    artifact = await clerk.call("publish_artifact", 0, 1, answers)
    version = await clerk.call("publish_version", 0, 1, model)
    return artifact["name"], version["name"]


async def test_an_attempt_gets_what_the_one_before_has_made_and_another_job_of_the_name_does_not(
    jobs: JobRegistry, directory: Path
) -> None:
    made = await publish(clerk(jobs, FIRST), directory)
    await jobs.finalize_artifact(made[0])
    assert await publish(clerk(jobs, FIRST, attempt=2), directory) == made
    # Were it the same, it would be deleted if this one is cancelled.
    assert not set(await publish(clerk(jobs, SECOND), directory)) & set(made)


async def test_what_was_deleted_is_made_anew_as_often_as_it_was(
    jobs: JobRegistry, registry: Registry, directory: Path
) -> None:
    for _ in range(3):
        artifact, version = await publish(clerk(jobs, FIRST), directory)
        assert (await jobs.artifact(artifact)).state == artifact_pb2.ARTIFACT_STATE_UPLOADING
        assert (await jobs.version(version)).state == version_pb2.VERSION_STATE_UPLOADING
        await jobs.delete_artifact(artifact)
        await registry.caller.stub.DeleteVersion(registry_service_pb2.DeleteVersionRequest(name=version))
