"""Serving comes before jobs: a replica without a place takes that of a job, which goes on later."""

from __future__ import annotations

from typing import Any

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import job_pb2

CORE = resources_pb2.Resources(cpu_millis=1000, memory_bytes=1_000_000)


async def test_a_job_makes_room_says_for_whom_and_starts_again_when_there_is_room(
    bench: Any, client: Any
) -> None:
    await bench.agent("n1", cpu_millis=2000)
    await client.create_job("low", resources={"cpu_millis": 900}, priority=-1)
    await client.create_job("high", resources={"cpu_millis": 900}, priority=1)
    for name in ("low", "high"):
        await client.until_job("RUNNING", name)
    await client.create(resources=CORE)
    await client.until_state("READY")
    waiting = await client.until_job("QUEUED", "low")
    assert "of deployments/digits has no other place than nodes/n1" in waiting.message
    assert (waiting.restarts, waiting.attempt) == (0, 1)
    assert (await client.job("high")).state == job_pb2.JOB_STATE_RUNNING
    assert (await client.node()).cpu_millis_allocated == 1900
    await client.delete()
    again = await client.until_job("RUNNING", "low")
    assert (again.attempt, again.restarts) == (2, 0)


async def test_a_large_gang_is_not_passed_over_by_small_jobs_behind_it(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1", cpu_millis=2000)
    for name in ("first", "second"):
        await client.create_job(name, resources={"cpu_millis": 1000})
        await client.until_job("RUNNING", name)
    await client.create_job("large", resources={"cpu_millis": 1000}, nodes=2)
    await client.until_job(lambda job: "room for 0 of its 2 tasks" in job.message, "large")
    await client.create_job("small", resources={"cpu_millis": 1000})
    agent.say_task("jobs/first/tasks/0", "SUCCEEDED")
    await client.until_job("SUCCEEDED", "first")
    waiting = await client.until_job(lambda job: "is kept for jobs/large" in job.message, "small")
    assert waiting.state == job_pb2.JOB_STATE_QUEUED
    agent.say_task("jobs/second/tasks/0", "SUCCEEDED")
    await client.until_job("RUNNING", "large")
