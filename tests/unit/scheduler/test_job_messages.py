"""What callers and agents may say of jobs, and what is made of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_scheduler.adapters.event_stream import MAX_EVENT_BYTES, event_from_bytes
from penstock_scheduler.api.job_messages import asked_from_message, observed_tasks_from_messages
from penstock_scheduler.domain.job import EventKind, TaskState
from penstock_scheduler.domain.resources import MIB
from penstock_scheduler.usecases.jobs import Reference

PROFILE = job_work_pb2.ProfileWork(version="digits@champion")


def asked(**fields: Any) -> Any:
    fields = {"name": "jobs/fit", "profile": PROFILE, **fields}
    return asked_from_message(job_pb2.Job(**fields), "ann")


def test_a_rank_holds_half_a_core_and_512_mib_and_a_task_as_often_as_it_has_ranks() -> None:
    gang = asked(nodes=3, ranks_per_node=4).job.gang
    assert (gang.tasks, gang.least) == (3, 3)
    assert (gang.resources.cpu_millis, gang.resources.memory_bytes) == (2000, 4 * 512 * MIB)
    gpus = asked(ranks_per_node=2, resources=resources_pb2.Resources(gpus=1, gpu_memory_bytes=5)).job.gang
    assert (gpus.resources.gpus, gpus.resources.gpu_memory_bytes) == (2, 5)


def test_long_work_keeps_checkpoints_where_it_runs() -> None:
    train = job_work_pb2.TrainWork(dataset="digits", model="models/digits")
    train.recipe.epochs = 1
    assert asked(profile=None, train=train).job.gang.keeps
    assert not asked().job.gang.keeps


@pytest.mark.parametrize(
    ("said", "meant"), [(0, 3), (-1, 0), (7, 7)], ids=["nothing", "never", "a number of times"]
)
def test_restarts_are_three_unless_more_is_said(said: int, meant: int) -> None:
    assert asked(max_restarts=said).job.max_restarts == meant


@pytest.mark.parametrize(
    "fields",
    [
        {"nodes": -1},
        {"nodes": 5000},
        {"ranks_per_node": -2},
        {"nodes": 2, "min_nodes": 3},
        {"priority": 101},
        {"max_restarts": -2},
        {"name": "jobs/"},
        {"name": "deployments/fit"},
        {"project": "projects/a b"},
        {"timeout": timedelta(seconds=-1)},
        {"resources": resources_pb2.Resources(memory_bytes=-1)},
        {"profile": None},
        {"profile": job_work_pb2.ProfileWork(version="models/digits")},
        {"profile": job_work_pb2.ProfileWork(version="digits:zero")},
        {"profile": job_work_pb2.ProfileWork(version="digits", dataset="a/b")},
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        asked(**fields)


def test_what_is_output_only_is_not_a_callers_to_say() -> None:
    made = asked(state=job_pb2.JOB_STATE_SUCCEEDED, results=["models/a/versions/1"], created_by="eve")
    kept = job_pb2.Job.FromString(made.write({made.references[0]: "models/digits/versions/4"}))
    assert (kept.state, list(kept.results), kept.created_by) == (job_pb2.JOB_STATE_UNSPECIFIED, [], "ann")
    assert (kept.profile.version, kept.project) == ("models/digits/versions/4", "projects/default")


def test_everything_that_a_job_names_is_found_and_replaced() -> None:
    compress = job_work_pb2.CompressWork(version="digits:3", dataset="rows:2")
    step = compress.steps.add(name="distill")
    step.parameters["teacher"] = "big"
    made = asked(profile=None, compress=compress)
    assert set(made.references) == {
        Reference("artifact", "artifacts/rows/versions/2"),
        Reference("version", "digits", "3"),
        Reference("version", "big", ""),
    }
    kept = job_pb2.Job.FromString(made.write({each: f"<{each.name}>" for each in made.references}))
    assert kept.compress.dataset == "<artifacts/rows/versions/2>"
    assert kept.compress.steps[0].parameters["teacher"] == "<big>"


def test_tasks_are_named_by_job_and_number() -> None:
    assert names.parse_task(names.task_name("fit", 0)) == ("fit", 0)
    assert names.parse_task("jobs/a.b/tasks/12") == ("a.b", 12)
    for wrong in ("jobs/fit", "jobs/fit/tasks/", "jobs/fit/tasks/-1", "jobs/fit/tasks/01", "jobs//tasks/1"):
        with pytest.raises(InvalidArgument):
            names.parse_task(wrong)


@pytest.mark.parametrize(
    "task",
    [
        job_pb2.ObservedTask(name="jobs/fit/tasks/0"),
        job_pb2.ObservedTask(name="jobs/fit/tasks/0", state=job_pb2.TASK_STATE_PENDING),
        job_pb2.ObservedTask(name="jobs/fit", state=job_pb2.TASK_STATE_RUNNING),
        job_pb2.ObservedTask(name="jobs/fit/tasks/0", state=job_pb2.TASK_STATE_RUNNING, pid=-1),
        job_pb2.ObservedTask(name="jobs/fit/tasks/0", state=job_pb2.TASK_STATE_RUNNING, last_event=-1),
        job_pb2.ObservedTask(
            name="jobs/fit/tasks/0",
            state=job_pb2.TASK_STATE_SUCCEEDED,
            results=["models/a/versions/1"] * 2000,
        ),
    ],
)
def test_reports_of_tasks_that_make_no_sense_are_refused(task: job_pb2.ObservedTask) -> None:
    with pytest.raises(InvalidArgument):
        observed_tasks_from_messages([task])


def test_a_report_is_taken_up_as_it_is_and_nobody_twice() -> None:
    task = job_pb2.ObservedTask(
        name="jobs/fit/tasks/3", state=job_pb2.TASK_STATE_FAILED, message="a\0b", permanent=True
    )
    found = observed_tasks_from_messages([task])["fit/tasks/3"]
    assert (found.state, found.message, found.permanent) == (
        TaskState.FAILED,
        "a\N{REPLACEMENT CHARACTER}b",
        True,
    )
    with pytest.raises(InvalidArgument, match="twice"):
        observed_tasks_from_messages([task, task])


def test_an_event_too_large_to_keep_leaves_a_line_in_its_place() -> None:
    event = job_pb2.JobEvent(task="jobs/fit/tasks/0", number=7)
    event.metrics.values.update({f"metric {number}": 1.0 for number in range(5000)})
    assert event.ByteSize() > MAX_EVENT_BYTES
    kept = event_from_bytes(event.SerializeToString())
    assert kept is not None
    # Were it passed over, it would be sent again and again, and nothing after it stored.
    assert (kept.number, kept.kind, kept.metrics) == (7, EventKind.LOG, {})
    assert "not kept" in job_pb2.JobEvent.FromString(kept.document).log.text


@pytest.mark.parametrize(
    "event",
    [
        job_pb2.JobEvent(task="jobs/fit/tasks/0"),
        job_pb2.JobEvent(task="jobs/fit", number=1),
        job_pb2.JobEvent(number=1),
    ],
)
def test_an_event_of_nobody_is_passed_over(event: job_pb2.JobEvent) -> None:
    assert event_from_bytes(event.SerializeToString()) is None


def test_a_metric_that_is_no_number_is_kept_in_the_event_alone() -> None:
    event = job_pb2.JobEvent(task="jobs/fit/tasks/0", number=1)
    event.metrics.values.update({"loss": float("nan"), "accuracy": 0.5})
    kept = event_from_bytes(event.SerializeToString())
    assert kept is not None
    assert kept.metrics == {"accuracy": 0.5}
