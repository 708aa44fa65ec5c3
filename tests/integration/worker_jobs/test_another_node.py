"""What a job needs and leaves goes over the registry: another node goes on where a lost one was."""

from pathlib import Path

import pytest

from penstock.registry.v1 import artifact_pb2
from penstock.registry.v1.artifact_service_pb2 import ListArtifactsRequest
from support.agent_world import World, until
from support.artifact_caller import ArtifactCaller
from support.job_specs import job, steps_of
from support.registry_world import Registry
from support.waiting import eventually

CHECKPOINT = artifact_pb2.ARTIFACT_KIND_CHECKPOINT


async def test_a_node_that_has_nothing_of_a_job_goes_on_from_the_checkpoint_in_the_registry(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    wanted = job("count", to=20, every=4, hold=10, trace=trace)
    async with run_agent(data_dir=tmp_path / "lost"):
        world.want_task(wanted)
        await until(lambda: 10 in steps_of(trace))

        async def only_the_newest_is_left() -> bool:
            found = await artifacts.stub.ListArtifacts(
                ListArtifactsRequest(parent="artifacts/job-j-checkpoint", kind=CHECKPOINT)
            )
            ready = artifact_pb2.ARTIFACT_STATE_READY
            return [(one.labels["step"], one.state) for one in found.artifacts] == [("8", ready)]

        await eventually(only_the_newest_is_left)
        world.drop_task("jobs/j/tasks/0")
        (tmp_path / "trace.go").touch()
        await until(lambda: world.observed_task("jobs/j/tasks/0").state > 3)
    before = steps_of(trace)
    async with run_agent(data_dir=tmp_path / "other"):
        again = world.want_task(wanted, 1, attempt=2)
        await world.task_state(again.name, "SUCCEEDED")
    repeated = [step for step in steps_of(trace)[len(before) :] if step in before]
    assert len(repeated) <= 4
    assert sorted(set(steps_of(trace))) == list(range(1, 21))


@pytest.mark.training
async def test_work_goes_on_and_ends_while_the_registry_is_away(
    world: World, run_agent, registry: Registry, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    wanted = job("count", to=12, every=4, hold=2, trace=trace)
    async with run_agent():
        task = world.want_task(wanted)
        await until(lambda: 2 in steps_of(trace))
        await registry.app.server.stop(0)
        (tmp_path / "trace.go").touch()
        await world.task_state(task.name, "SUCCEEDED")
    assert steps_of(trace) == list(range(1, 13))
