"""What happens in jobs: through Redis into Postgres, each event once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from penstock.scheduler.v1 import job_pb2, job_service_pb2
from penstock_kit.errors import NotFound
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.keys import JOB_EVENT_FIELD, JOB_EVENTS
from penstock_scheduler.adapters import job_events as job_event_rows
from penstock_scheduler.app import Scheduler
from penstock_scheduler.domain import job_events
from penstock_scheduler.domain.job import EventKind

TASK = "jobs/fit/tasks/0"
PATIENCE_SECONDS = 60.0
CHECKPOINT = "artifacts/fit-checkpoint/versions/1"
AN_INSTANT = 1e-9
"""Days that are over by the time that anybody looks."""


class Sender:
    """Writes events as an agent does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def send(self, *events: job_pb2.JobEvent) -> None:
        await self._connection.pipeline(
            [(b"XADD", JOB_EVENTS, b"*", JOB_EVENT_FIELD, event.SerializeToString()) for event in events]
        )

    async def left(self) -> int:
        return int(await self._connection.command(b"XLEN", JOB_EVENTS))


def line(number: int, text: str = "") -> job_pb2.JobEvent:
    event = job_pb2.JobEvent(task=TASK, number=number, log=job_pb2.LogLine(text=text or f"line {number}"))
    event.time.FromSeconds(1_790_000_000 + number)
    return event


def metrics(number: int, loss: float) -> job_pb2.JobEvent:
    event = job_pb2.JobEvent(
        task=TASK, number=number, metrics=job_pb2.MetricPoint(step=number, values={"train/loss": loss})
    )
    event.time.FromSeconds(1_790_000_000 + number)
    return event


@pytest.fixture
async def sender(redis_url: str) -> AsyncIterator[Sender]:
    """An agent's way to Redis, with an empty stream."""
    connection = await Connection.connect(Address.parse(redis_url), "test")
    await connection.command(b"DEL", JOB_EVENTS)
    yield Sender(connection)
    connection.close()


@pytest.fixture
async def running(idle_bench: Any, redis_url: str) -> Any:
    """A bench whose job runs."""
    idle_bench.registry.push()
    idle_bench.overrides["redis_url"] = redis_url
    await idle_bench.start()
    idle_bench.runner = await idle_bench.agent()
    client = idle_bench.client()
    await client.create_job()
    await client.until_job("RUNNING")
    return idle_bench


async def events_of(client: Any, **fields: Any) -> list[job_pb2.JobEvent]:
    request = job_service_pb2.ListJobEventsRequest(parent="jobs/fit", **fields)
    return list((await client.jobs.ListJobEvents(request)).events)


async def test_events_are_stored_once_in_order_and_the_agent_is_told(running: Any, sender: Sender) -> None:
    client = running.client()
    await sender.send(line(1), metrics(2, 0.5), line(1), line(3), metrics(2, 0.5), metrics(4, 0.25))
    job = await client.until_job(lambda job: job.last_event == 4)
    assert dict(job.metrics) == {"train/loss": 0.25}
    assert [(event.sequence, event.number) for event in await events_of(client)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
    ]
    logs = await events_of(client, kinds=[job_service_pb2.JOB_EVENT_KIND_LOG], after=1)
    assert [event.log.text for event in logs] == ["line 3"]
    await running.eventually(lambda: running.runner.tasks[TASK].stored_event == 4, "the agent is told")

    async def is_empty() -> bool:
        return await sender.left() == 0

    await running.eventually(is_empty, "what is stored is taken out of the stream")


async def test_what_comes_after_a_gap_waits_until_it_is_sent_again(running: Any, sender: Sender) -> None:
    client = running.client()
    await sender.send(line(1), line(3), line(4))
    await running.eventually(lambda: running.runner.tasks[TASK].stored_event == 1, "the first is stored")
    await sender.send(line(2), line(3), line(4))
    await client.until_job(lambda job: job.last_event == 4)
    assert [event.log.text for event in await events_of(client)] == [f"line {n}" for n in (1, 2, 3, 4)]


async def test_nonsense_in_the_stream_stops_nothing(running: Any, sender: Sender) -> None:
    connection = sender._connection
    await connection.command(b"XADD", JOB_EVENTS, b"*", JOB_EVENT_FIELD, b"\xff\xff")
    await connection.command(b"XADD", JOB_EVENTS, b"*", b"other", b"x")
    stranger = line(1)
    stranger.task = "jobs/nobody/tasks/0"
    await sender.send(stranger, line(1, "a\0b" + "x" * 5000))
    client = running.client()
    await client.until_job(lambda job: job.last_event == 1)
    (event,) = await events_of(client)
    assert event.log.text.startswith("a\N{REPLACEMENT CHARACTER}b")
    assert len(event.log.text) == 4000


async def test_a_watch_gives_all_events_and_ends_with_the_job(running: Any, sender: Sender) -> None:
    client = running.client()
    seen: list[int] = []

    async def watch() -> None:
        request = job_service_pb2.WatchJobEventsRequest(name="jobs/fit")
        async for event in client.jobs.WatchJobEvents(request):
            seen.append(event.number)  # noqa: PERF401 - the test looks at it meanwhile

    watching = asyncio.create_task(watch())
    checkpoint = job_pb2.CheckpointNote(step=5, artifact=CHECKPOINT)
    first = job_pb2.JobEvent(task=TASK, number=1, checkpoint=checkpoint)
    await sender.send(first)
    await running.eventually(lambda: seen == [1], "the first has come")
    # The task has ended before its last events are stored: the job waits for them.
    running.runner.works = lambda spec: None
    running.runner.say_task(TASK, "SUCCEEDED", last_event=3)
    await client.until_job("FINALIZING")
    await sender.send(line(2), line(3))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await watching
    assert seen == [1, 2, 3]
    assert (await client.job()).state == job_pb2.JOB_STATE_SUCCEEDED
    await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name="jobs/fit"))
    assert running.registry.deleted == [CHECKPOINT]


async def test_a_log_without_end_is_cut_off_and_says_so(
    running: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_events, "MAX_LOG_LINES", 3)
    client = running.client()
    await sender.send(*(line(number) for number in range(1, 8)), metrics(8, 1.0))
    await running.eventually(lambda: running.runner.tasks[TASK].stored_event == 8, "all are taken in")
    events = await events_of(client)
    assert [event.number for event in events] == [1, 2, 3, 4, 8]
    assert "further ones are not kept" in events[3].log.text


async def test_a_program_that_names_new_metrics_for_ever_does_not_make_the_job_grow(
    running: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_events, "MAX_METRICS", 3)
    monkeypatch.setattr(job_events, "MAX_CHECKPOINTS", 2)
    client = running.client()
    named = [
        job_pb2.JobEvent(
            task=TASK,
            number=n,
            metrics=job_pb2.MetricPoint(step=n, values={"loss": 1.0 / n, f"loss{n}": 1.0}),
        )
        for n in range(1, 9)
    ]
    notes = [
        job_pb2.JobEvent(
            task=TASK, number=n, checkpoint=job_pb2.CheckpointNote(step=n, artifact=f"{CHECKPOINT[:-1]}{n}")
        )
        for n in range(9, 13)
    ]
    await sender.send(*named[:4])
    await client.until_job(lambda job: job.last_event == 4)
    await sender.send(*named[4:], *notes)
    job = await client.until_job(lambda job: job.last_event == 12)
    assert dict(job.metrics) == {"loss": 0.125, "loss1": 1.0, "loss2": 1.0}
    assert len(await events_of(client)) == 12
    running.runner.works = lambda spec: None
    running.runner.say_task(TASK, "SUCCEEDED", last_event=12)
    await client.until_job("SUCCEEDED")
    await client.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name="jobs/fit"))
    assert sorted(running.registry.deleted) == [f"{CHECKPOINT[:-1]}{n}" for n in (11, 12)]


@pytest.mark.training
async def test_old_progress_is_thinned_out(
    running: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_event_rows, "LIMITS", {EventKind.METRICS: 100})
    client = running.client()
    async with asyncio.timeout(PATIENCE_SECONDS):
        for first in range(1, 601, 100):
            await sender.send(*(metrics(number, 1.0 / number) for number in range(first, first + 100)))
    await client.until_job(lambda job: job.last_event == 600)
    events = await events_of(client, page_size=10_000)
    assert len(events) < 600
    assert events[-1].number == 600
    assert events[0].number <= 10


@pytest.mark.training
async def test_events_wait_while_redis_is_away(idle_bench: Any, redis_url: str, sender: Sender) -> None:
    idle_bench.registry.push()
    await idle_bench.start()  # where it looks for Redis there is nothing
    agent = await idle_bench.agent()
    client = idle_bench.client()
    await client.create_job()
    await client.until_job("RUNNING")
    await sender.send(line(1))
    await idle_bench.stop()
    await idle_bench.start(redis_url=redis_url)
    await agent.vanish()
    await agent.attach()
    await client.until_job(lambda job: job.last_event == 1)


@pytest.mark.training
async def test_the_stream_is_read_by_the_scheduler_that_leads_alone(
    running: Any, sender: Sender, redis_url: str
) -> None:
    other = running.client(f"unix:{running.folder}/s2")
    second = Scheduler(
        running.settings(scheduler_listen=f"unix:{running.folder}/s2"), running.failures.append
    )
    await second.start()
    try:
        await sender.send(*(line(number) for number in range(1, 40)))
        # A follower shows what the leader has stored.
        job = await other.until_job(lambda job: job.last_event == 39)
        assert job.state == job_pb2.JOB_STATE_RUNNING
        request = job_service_pb2.ListJobEventsRequest(parent="jobs/fit")
        found = (await other.jobs.ListJobEvents(request)).events
        assert [event.number for event in found] == list(range(1, 40))
    finally:
        await second.stop()


@pytest.mark.training
async def test_a_page_of_long_lines_ends_before_it_is_too_large_to_send(running: Any, sender: Sender) -> None:
    client = running.client()
    await sender.send(*(line(number, "x" * 4000) for number in range(1, 1201)))
    await client.until_job(lambda job: job.last_event == 1200)
    numbers: list[int] = []
    more = True
    while more:
        request = job_service_pb2.ListJobEventsRequest(
            parent="jobs/fit", page_size=10_000, after=len(numbers)
        )
        page = await client.jobs.ListJobEvents(request)
        assert page.ByteSize() < 5 * 1024 * 1024
        numbers += [event.number for event in page.events]
        more = page.more
    assert numbers == list(range(1, 1201))


async def end_with_a_checkpoint(running: Any, sender: Sender) -> Any:
    client = running.client()
    checkpoint = job_pb2.CheckpointNote(step=5, artifact=CHECKPOINT)
    await sender.send(line(1), metrics(2, 0.5), job_pb2.JobEvent(task=TASK, number=3, checkpoint=checkpoint))
    running.runner.works = lambda spec: None
    running.runner.say_task(TASK, "SUCCEEDED", last_event=3, results=["models/digits/versions/2"])
    await client.until_job("SUCCEEDED")
    return client


async def test_a_job_of_long_ago_loses_its_events_and_checkpoints_and_keeps_the_rest(
    running: Any, sender: Sender
) -> None:
    client = await end_with_a_checkpoint(running, sender)
    await running.scheduler.retention.step()
    assert len(await events_of(client)) == 3
    await running.stop()
    scheduler = await running.start(job_details_days=AN_INSTANT)
    await client.until_job("SUCCEEDED")  # once it answers
    await scheduler.retention.step()
    assert await events_of(client) == []
    assert running.registry.deleted == [CHECKPOINT]
    kept = await client.job()
    assert (dict(kept.metrics), kept.last_event) == ({"train/loss": 0.5}, 3)
    assert list(kept.results) == ["models/digits/versions/2"]
    async with asyncio.timeout(PATIENCE_SECONDS):
        watch = client.jobs.WatchJobEvents(job_service_pb2.WatchJobEventsRequest(name="jobs/fit"))
        assert [event async for event in watch] == []
    assert not await scheduler.retention.step()
    assert running.registry.deleted == [CHECKPOINT]


async def test_a_job_of_very_long_ago_is_deleted_and_what_runs_or_was_made_stays(
    running: Any, sender: Sender
) -> None:
    client = await end_with_a_checkpoint(running, sender)
    await client.create_job("other")
    await running.stop()
    scheduler = await running.start(job_details_days=0, jobs_days=AN_INSTANT)
    await client.until_job("SUCCEEDED")  # once it answers
    await scheduler.retention.step()
    with pytest.raises(NotFound):
        await client.job()
    assert not (await client.job("other")).HasField("end_time")
    assert running.registry.deleted == [CHECKPOINT]
