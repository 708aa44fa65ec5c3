"""Jobs, from their creation to their end, with a scripted agent and a real database."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.scheduler.v1 import job_pb2

RESULT = "models/digits/versions/2"


async def test_a_job_is_placed_runs_and_succeeds_with_its_result(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    made = await client.create_job()
    assert made.state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_STARTING)
    assert made.profile.version == "models/digits/versions/1"
    running = await client.until_job("RUNNING")
    (task,) = running.tasks
    assert (task.name, task.node, task.attempt) == ("jobs/fit/tasks/0", "nodes/n1", 1)
    assert (await client.node()).cpu_millis_allocated == 500
    agent.say_task("jobs/fit/tasks/0", "SUCCEEDED", results=[RESULT])
    done = await client.until_job("SUCCEEDED")
    assert list(done.results) == [RESULT]
    assert bench.registry.finalized == [RESULT]
    assert (await client.node()).cpu_millis_allocated == 0
    await bench.eventually(lambda: not agent.tasks, "nothing is to run any more")


async def test_a_running_job_is_cancelled_and_holds_nothing(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create_job()
    await client.until_job("RUNNING")
    await client.cancel_job()
    ended = await client.until_job("CANCELLED")
    assert "cancelled" in ended.message
    assert (await client.node()).cpu_millis_allocated == 0
    assert not agent.tasks


@pytest.mark.parametrize("nodes", [2, 3])
async def test_a_gang_starts_whole_or_not_at_all(bench: Any, client: Any, nodes: int) -> None:
    await bench.agent("n1", cpu_millis=1000)
    await bench.agent("n2", cpu_millis=1000)
    resources = {"cpu_millis": 600}
    if nodes == 3:
        with pytest.raises(Exception, match="could not hold its 3 tasks"):
            await client.create_job(nodes=nodes, resources=resources)
        return
    await client.create_job(nodes=nodes, resources=resources)
    running = await client.until_job("RUNNING")
    assert {task.node for task in running.tasks} == {"nodes/n1", "nodes/n2"}
