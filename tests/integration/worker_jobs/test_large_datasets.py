"""A dataset that nobody named is not fetched at any size."""

from pathlib import Path

import pytest

from penstock.registry.v1 import artifact_pb2
from penstock_kit.errors import ResourceExhausted
from penstock_kit.rpc import open_channel
from penstock_worker.adapters.jobs.registry import JobRegistry
from penstock_worker.domain.task import DesiredTask
from support.clerks import clerk_of
from support.registry_world import Registry


async def test_a_dataset_larger_than_a_job_bears_is_refused_before_it_is_fetched(
    registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "data.npz").write_bytes(bytes(100))
    channel = open_channel(registry.app.address)
    jobs = JobRegistry(channel)
    made = await jobs.upload_artifact(
        artifact_pb2.Artifact(kind=artifact_pb2.ARTIFACT_KIND_DATASET, format="npz"),
        "artifacts/large",
        tmp_path,
        key="k",
    )
    # It has no cache of bundles: nothing can be fetched.
    task = DesiredTask("jobs/c/tasks/0", "c", 0, 1, 0, 1, 1, 1, "convert", b"", 1, 0, ())
    clerk = clerk_of(task, registry=jobs)
    with pytest.raises(ResourceExhausted, match="has 100 bytes, over 99"):
        await clerk.call("artifact", 0, 1, {"name": made.name, "most_bytes": 99})
    await channel.close()
