"""What a job compresses goes to the deployment that it names, with a scripted agent and a real database."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.scheduler.v1 import deployment_pb2, job_work_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import NotFound, Reason, Unavailable

RESULT = "models/digits/versions/2"


def compression(deployment: str = "deployments/digits") -> job_work_pb2.CompressWork:
    return job_work_pb2.CompressWork(
        version="digits:1",
        dataset="digits",
        steps=[job_work_pb2.CompressionStep(name="clip")],
        deployment=deployment,
    )


def report(passed: bool) -> dict[str, Any]:
    return {"report": {"gate": {"passed": passed}}}


async def test_what_passed_its_gate_is_rolled_out_once(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    bench.registry.push("digits", 2).manifest.lineage.job = "jobs/fit"
    await client.create_job(compress=compression())
    running = await client.until_job("RUNNING")
    bench.registry.refusal = Unavailable("The disk is full.", reason=Reason.DEPENDENCY_UNAVAILABLE)
    agent.say_task(running.tasks[0].name, "SUCCEEDED", results=[RESULT], **report(True))
    await client.until_job("FINALIZING")
    await bench.stop()
    bench.registry.refusal = None
    await bench.start()
    done = await client.until_job("SUCCEEDED")
    assert "digits gets digits:2 by its rollout" in done.message
    asked = await client.get()
    assert [target.resolved_version for target in asked.targets] == [2]
    assert asked.revision == 2
    assert asked.updated_by == "jobs/fit"
    assert asked.rollout_policy.strategy == deployment_pb2.ROLLOUT_STRATEGY_CANARY
    assert list(asked.rollout_policy.steps)[-1] == 100

    await agent.vanish()
    await agent.attach()
    # Its first step begins, and passes over the cluster go on.
    name = f"{asked.name}/rollouts/2"

    async def begun() -> bool:
        found = await client.stub.GetRollout(pb.GetRolloutRequest(name=name))
        return found.message == "The new targets get 1 % of the traffic."

    await bench.eventually(begun, "its first step begins")


async def test_what_failed_its_gate_goes_nowhere(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create()
    await client.until_state("READY")
    bench.registry.push("digits", 2).manifest.lineage.job = "jobs/fit"
    await client.create_job(compress=compression())
    running = await client.until_job("RUNNING")
    agent.say_task(running.tasks[0].name, "SUCCEEDED", results=[RESULT], **report(False))
    done = await client.until_job("SUCCEEDED")
    assert "did not pass its gate" in done.message
    assert (await client.get()).revision == 1


async def test_a_deployment_that_is_gone_by_then_fails_no_job(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    with pytest.raises(NotFound, match="no deployment digits"):
        await client.create_job(compress=compression())
    await client.create()
    await client.until_state("READY")
    bench.registry.push("digits", 2).manifest.lineage.job = "jobs/fit"
    await client.create_job(compress=compression())
    running = await client.until_job("RUNNING")
    await client.delete()
    agent.say_task(running.tasks[0].name, "SUCCEEDED", results=[RESULT], **report(True))
    done = await client.until_job("SUCCEEDED")
    assert "digits does not get digits:2" in done.message
