"""Jobs, from their creation to their end, with a scripted agent and a real database."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from penstock.registry.v1 import artifact_pb2
from penstock.scheduler.v1 import job_pb2, job_service_pb2, job_work_pb2, scheduler_service_pb2
from penstock_kit.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    Unavailable,
)
from penstock_scheduler.api import jobs as jobs_api
from penstock_scheduler.app import Scheduler

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
    listed = await client.stub.ListAllocations(scheduler_service_pb2.ListAllocationsRequest(page_size=1))
    assert [(held.holder, held.name) for held in listed.allocations] == [("jobs/fit", "allocations/fit.0")]
    assert not listed.next_page_token
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


async def test_a_gang_starts_whole_or_not_at_all(bench: Any, client: Any) -> None:
    await bench.agent("n1", cpu_millis=1000)
    await bench.agent("n2", cpu_millis=1000)
    resources = {"cpu_millis": 600}
    with pytest.raises(FailedPrecondition, match="could not hold its 3 tasks"):
        await client.create_job(nodes=3, resources=resources)
    await client.create_job(nodes=2, resources=resources)
    running = await client.until_job("RUNNING")
    assert {task.node for task in running.tasks} == {"nodes/n1", "nodes/n2"}


async def test_a_repeated_request_is_the_same_job(bench: Any, client: Any) -> None:
    first = await client.create_job(request_id="r1")
    again = await client.create_job(request_id="r1")
    assert again.create_time == first.create_time
    with pytest.raises(FailedPrecondition) as caught:
        await client.create_job("other", request_id="r1")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    with pytest.raises(AlreadyExists):
        await client.create_job(request_id="r2")


async def test_names_get_their_numbers_and_unknown_ones_are_refused_at_once(client: Any) -> None:
    work = job_work_pb2.EvaluateWork(version="digits", dataset="rows", metrics=["accuracy"])
    made = await client.create_job(evaluate=work)
    assert made.evaluate.version == "models/digits/versions/1"
    assert made.evaluate.dataset == "artifacts/rows/versions/3"
    with pytest.raises(NotFound):
        await client.create_job(
            "other", evaluate=job_work_pb2.EvaluateWork(version="digits", dataset="missing")
        )
    with pytest.raises(InvalidArgument):
        await client.create_job("other", evaluate=job_work_pb2.EvaluateWork(dataset="rows"))
    with pytest.raises(NotFound):
        await client.job("other")


async def test_answers_go_to_a_new_name_or_to_earlier_answers_and_to_nothing_else(client: Any) -> None:
    await client.create()
    fields = {"deployment": "deployments/digits", "dataset": "rows"}
    with pytest.raises(FailedPrecondition, match="artifacts/rows is a DATASET; choose another name"):
        await client.create_job(
            batch_predict=job_work_pb2.BatchPredictWork(**fields, artifact="artifacts/rows")
        )
    made = await client.create_job(
        batch_predict=job_work_pb2.BatchPredictWork(**fields, artifact="artifacts/missing")
    )
    assert made.batch_predict.artifact == "artifacts/missing"


async def test_more_ranks_than_the_cluster_has_are_refused_with_what_lacks(bench: Any, client: Any) -> None:
    await bench.agent("n1", cpu_millis=2000)
    await bench.agent("n2", cpu_millis=1000)
    with pytest.raises(FailedPrecondition) as caught:
        await client.create_job(ranks_per_node=5)
    assert caught.value.reason is Reason.UNPLACEABLE
    assert caught.value.metadata["node"] == "n1"
    assert "0.5 cores" in caught.value.metadata["lacks"]
    with pytest.raises(FailedPrecondition, match="room for 3 of them") as caught:
        await client.create_job(nodes=4, ranks_per_node=2)
    assert caught.value.reason is Reason.UNPLACEABLE


async def test_a_job_that_waits_says_why(bench: Any, client: Any) -> None:
    await client.create_job()
    waiting = await client.until_job(lambda job: "No node is attached" in job.message)
    assert waiting.state == job_pb2.JOB_STATE_QUEUED
    await bench.agent("n1", cpu_millis=1000)
    await client.until_job("RUNNING")
    await client.create_job("second", ranks_per_node=2)
    waiting = await client.until_job(lambda job: "closest" in job.message, "second")
    assert "lacks" in waiting.message


async def test_an_ended_job_is_deleted_with_its_name_free_and_its_tasks_counted_on(
    bench: Any, client: Any
) -> None:
    agent = await bench.agent()
    await client.create_job()
    await client.until_job("RUNNING")
    delete = job_service_pb2.DeleteJobRequest(name="jobs/fit")
    with pytest.raises(FailedPrecondition, match="cancel it first"):
        await client.jobs.DeleteJob(delete)
    agent.say_task("jobs/fit/tasks/0", "SUCCEEDED")
    await client.until_job("SUCCEEDED")
    with pytest.raises(FailedPrecondition) as caught:
        await client.cancel_job()
    assert caught.value.reason is Reason.WRONG_STATE
    await client.jobs.DeleteJob(delete)
    with pytest.raises(NotFound):
        await client.job()
    await client.create_job()
    running = await client.until_job("RUNNING")
    # Were it 0 again, an agent that still knows the earlier one could take them for each other.
    assert running.tasks[0].name == "jobs/fit/tasks/1"


async def test_checkpoints_of_which_a_deleted_job_never_heard_go_with_it(bench: Any, client: Any) -> None:
    agent = await bench.agent(cpu_millis=8000)
    await client.create_job(nodes=2)
    await client.until_job("RUNNING")
    made = (await client.job()).create_time.ToNanoseconds()
    name = "artifacts/job-fit-checkpoint"
    bench.registry.checkpoints = {
        parent: [
            artifact_pb2.Artifact(name=f"{parent}/versions/{number}", labels=labels)
            for number, labels in enumerate(({}, {"made": str(made)}, {"made": str(made + 1)}), 1)
        ]
        for parent in (name, f"{name}-1")
    }
    agent.say_task("jobs/fit/tasks/0", "SUCCEEDED")
    await client.until_job("SUCCEEDED")
    await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name="jobs/fit"))
    # The last is of the next job of this name.
    parts = f"{name}-1/versions/1", f"{name}-1/versions/2", f"{name}/versions/1", f"{name}/versions/2"
    assert sorted(bench.registry.deleted) == sorted(parts)


async def test_jobs_are_listed_newest_first_in_pages(client: Any) -> None:
    for number in range(5):
        await client.create_job(f"job-{number}")
    names: list[str] = []
    token = ""
    while True:
        request = job_service_pb2.ListJobsRequest(page_size=2, page_token=token)
        page = await client.jobs.ListJobs(request)
        names += [job.name for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert names == [f"jobs/job-{number}" for number in (4, 3, 2, 1, 0)]
    await client.cancel_job("job-3")
    request = job_service_pb2.ListJobsRequest(
        states=[job_pb2.JOB_STATE_CANCELLED], project="projects/default"
    )
    assert [job.name for job in (await client.jobs.ListJobs(request)).jobs] == ["jobs/job-3"]


async def test_a_page_of_jobs_ends_before_it_is_too_large_to_send(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_api, "MAX_PAGE_BYTES", 100)
    for number in range(3):
        await client.create_job(f"job-{number}")
    names: list[str] = []
    token = ""
    while True:
        request = job_service_pb2.ListJobsRequest(page_size=100_000, page_token=token)
        page = await client.jobs.ListJobs(request)
        assert len(page.jobs) == 1
        names += [job.name for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert names == ["jobs/job-2", "jobs/job-1", "jobs/job-0"]


async def test_results_wait_for_the_registry_and_are_made_final_once(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create_job()
    await client.until_job("RUNNING")
    bench.registry.refusal = Unavailable("The disk is full.", reason=Reason.DEPENDENCY_UNAVAILABLE)
    agent.say_task("jobs/fit/tasks/0", "SUCCEEDED", results=[RESULT])
    await client.until_job("FINALIZING")
    with pytest.raises(FailedPrecondition, match="being made final"):
        await client.cancel_job()
    # The scheduler is killed meanwhile, and its agent with it: what is known is in the database.
    await bench.stop()
    await agent.vanish()
    bench.registry.refusal = None
    await bench.start()
    await client.until_job("SUCCEEDED")
    assert set(bench.registry.finalized) == {RESULT}


async def test_what_a_cancelled_job_made_is_deleted_even_after_a_restart(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create_job()
    await client.until_job("RUNNING")
    await bench.stop_registry()
    agent.works = lambda spec: None
    agent.say_task("jobs/fit/tasks/0", "RUNNING", results=[RESULT])
    await client.cancel_job()
    ended = await client.until_job("CANCELLED")
    assert not ended.results
    await bench.stop()
    await bench.start_registry()
    await bench.start()
    await bench.eventually(lambda: RESULT in bench.registry.deleted, "it is deleted")


async def test_what_others_made_is_neither_made_final_nor_deleted(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create_job()
    await client.until_job("RUNNING")
    agent.works = lambda spec: None
    stolen = ["models/digits/versions/1", RESULT, "artifacts/foreign/versions/1", "nonsense"]
    agent.say_task("jobs/fit/tasks/0", "SUCCEEDED", results=stolen)
    failed = await client.until_job("FAILED")
    assert failed.failure_reason == "RESULT_REFUSED"
    assert "was not made by the job fit" in failed.message
    await bench.eventually(lambda: bench.registry.deleted == [RESULT], "what it made is deleted")
    assert bench.registry.finalized == []


async def test_a_task_gets_to_know_where_the_leading_one_is(bench: Any, client: Any) -> None:
    agent = await bench.agent(cpu_millis=8000)
    agent.works = lambda spec: None
    await client.create_job(nodes=2)
    await bench.eventually(lambda: len(agent.tasks) == 2, "both are to run")
    agent.say_task("jobs/fit/tasks/1", "STARTING")
    agent.say_task("jobs/fit/tasks/0", "STARTING", rendezvous="127.0.0.1:29500")
    await bench.eventually(
        lambda: agent.tasks["jobs/fit/tasks/1"].rendezvous == "127.0.0.1:29500", "the other one is told"
    )
    first = agent.tasks["jobs/fit/tasks/0"]
    assert (first.rendezvous, first.tasks, first.attempt, first.index) == ("", 2, 1, 0)
    assert first.job.profile.version == "models/digits/versions/1"
    assert first.resources.cpu_millis == 500


@pytest.mark.training
async def test_another_scheduler_takes_a_running_job_over_as_it_is(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create_job()
    await client.until_job("RUNNING")
    second = Scheduler(bench.settings(scheduler_listen=f"unix:{bench.folder}/s2"), bench.failures.append)
    await second.start()
    try:
        other = bench.client(f"unix:{bench.folder}/s2")
        # A follower takes changes, and shows what the leader does.
        await other.create_job("more")
        await other.until_job("RUNNING", "more")
        await other.cancel_job("more")
        await other.until_job("CANCELLED", "more")
        await bench.stop()
        heir = type(agent)(f"unix:{bench.folder}/s2", "n1")
        bench.agents.append(heir)
        heir.observed_tasks = dict(agent.observed_tasks)

        async def attached() -> bool:
            await heir.vanish()
            await heir.attach()
            await bench.eventually(lambda: heir.generation > 0 or heir.error is not None)
            return heir.generation > 0

        await bench.eventually(attached, "the other one leads")
        heir.works = lambda spec: None
        heir.say_task("jobs/fit/tasks/0", "SUCCEEDED", results=[RESULT])
        done = await other.until_job("SUCCEEDED")
        assert (done.attempt, done.restarts, list(done.results)) == (1, 0, [RESULT])
    finally:
        await second.stop()


async def test_a_job_of_a_lost_node_starts_again_elsewhere_and_the_node_ends_what_it_has(
    idle_bench: Any,
) -> None:
    idle_bench.registry.push()
    await idle_bench.start(node_lease_seconds=0.3)
    first = await idle_bench.agent("n1")
    client = idle_bench.client()
    await client.create_job()
    running = await client.until_job("RUNNING")
    assert running.tasks[0].node == "nodes/n1"
    await first.vanish()
    waiting = await client.until_job(lambda job: job.attempt == 1 and job.state == job_pb2.JOB_STATE_QUEUED)
    assert "n1" in waiting.message
    await idle_bench.agent("n2")
    again = await client.until_job("RUNNING")
    assert (again.attempt, again.restarts, again.tasks[0].node) == (2, 0, "nodes/n2")
    # It comes back with the task of the first attempt, and is told to end it.
    await first.attach()
    await idle_bench.eventually(lambda: not first.tasks and not first.observed_tasks, "nothing runs twice")
    assert (await client.job()).attempt == 2


async def test_a_failed_job_starts_again_and_says_when(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create_job(max_restarts=1)
    await client.until_job("RUNNING")
    agent.works = lambda spec: None
    agent.say_task("jobs/fit/tasks/0", "FAILED", message="It fell.", failure_reason="SIGNAL")
    waiting = await client.until_job("QUEUED")
    assert waiting.message.startswith("It starts again after")
    assert waiting.message.endswith("1 of 1: It fell.")
    await bench.eventually(lambda: "jobs/fit/tasks/1" in agent.tasks, "it starts again")
    agent.say_task("jobs/fit/tasks/1", "FAILED", message="It fell.", failure_reason="SIGNAL", permanent=True)
    failed = await client.until_job("FAILED")
    assert (failed.failure_reason, failed.restarts, failed.attempt) == ("SIGNAL", 1, 2)
    assert failed.HasField("end_time")


async def test_reports_of_tasks_that_make_no_sense_end_the_stream(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    agent.works = lambda spec: None
    await client.create_job()
    await bench.eventually(lambda: agent.tasks, "it is to run")
    agent.say_task("jobs/fit/tasks/0", "PENDING")
    await bench.eventually(lambda: agent.error is not None, "the stream ends")
    assert agent.error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_job_makes_room_for_serving_and_goes_on_afterwards(bench: Any, client: Any) -> None:
    agent = await bench.agent("n1", cpu_millis=1000)
    await client.create_job()
    await client.until_job("RUNNING")
    told: list[bool] = []

    def checkpoint(spec: job_pb2.TaskSpec) -> job_pb2.ObservedTask:
        told.append(spec.stopping)
        state = job_pb2.TASK_STATE_STOPPED if spec.stopping else job_pb2.TASK_STATE_RUNNING
        return job_pb2.ObservedTask(state=state)

    agent.works = checkpoint
    await client.create("digits", resources={"cpu_millis": 800})
    await client.until_state("READY")
    assert True in told
    waiting = await client.job()
    assert waiting.state == job_pb2.JOB_STATE_QUEUED
    await client.delete("digits")
    again = await client.until_job("RUNNING")
    assert (again.attempt, again.restarts) == (2, 0)
