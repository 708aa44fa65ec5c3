"""Profiles and evaluations as jobs, with real models on real rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import duration_pb2, json_format

from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import job_pb2
from penstock.scheduler.v1.job_work_pb2 import EvaluateWork, ProfileWork
from penstock_worker.adapters.measuring import evaluate_job, profile_job
from penstock_worker.adapters.node_probe import processor_name
from penstock_worker.usecases.job_context import JobFailure, Stopped
from support.job_context import FileJobContext, version_of
from support.measured import iris_dataset
from support.models import build_python, build_tree_skops

VERSION, DATASET = "models/model/versions/1", "artifacts/data/versions/1"


def context_of(root: Path, job: job_pb2.Job) -> FileJobContext:
    manifest = build_tree_skops(root / "bundle")
    return FileJobContext(
        root / "job",
        job,
        versions={VERSION: version_of(root / "bundle", manifest)},
        datasets={DATASET: iris_dataset(root / "data")},
    )


def test_an_evaluation_reports_and_records_the_metrics(tmp_path: Path) -> None:
    work = EvaluateWork(version=VERSION, dataset=DATASET, record=True, held_out=0.3, seed=1)
    context = context_of(tmp_path, job_pb2.Job(name="jobs/e", evaluate=work))
    evaluate_job.run(context)
    found = context.found()
    assert found["rows"] == 45
    assert found["metrics"]["accuracy"] > 0.9
    assert set(found["metrics"]) == {"accuracy", "f1", "loss"}
    assert context.lines("recorded") == [{"version": VERSION, "metrics": found["metrics"]}]
    assert context.last_metrics() == found["metrics"]


def test_an_evaluation_of_rows_that_the_version_does_not_take_says_so(tmp_path: Path) -> None:
    work = EvaluateWork(version=VERSION, dataset=DATASET)
    context = context_of(tmp_path, job_pb2.Job(name="jobs/e", evaluate=work))
    echo = build_python(tmp_path / "echo", "class Model:\n    pass\n")
    context._versions[VERSION] = version_of(tmp_path / "echo", echo)
    with pytest.raises(JobFailure, match="does not allow"):
        evaluate_job.run(context)
    context.allowed = True
    with pytest.raises(JobFailure) as failure:
        evaluate_job.run(context)
    assert failure.value.cause == "UNSUPPORTED"


def test_a_profile_has_a_point_for_each_size_and_is_stored_on_the_version(tmp_path: Path) -> None:
    work = ProfileWork(
        version=VERSION,
        dataset=DATASET,
        batch_sizes=[1, 16],
        duration=duration_pb2.Duration(nanos=20_000_000),
    )
    context = context_of(tmp_path, job_pb2.Job(name="jobs/p", profile=work))
    profile_job.run(context)
    ((stored,),) = [[line["profile"] for line in context.lines("profiles")]]
    profile = json_format.ParseDict(stored, version_pb2.DeviceProfile())
    assert profile.device == (processor_name() or "cpu")
    assert [point.batch_size for point in profile.points] == [1, 16]
    for point in profile.points:
        assert 0 < point.p50_seconds <= point.p99_seconds
    assert profile.points[1].rows_per_second > profile.points[0].rows_per_second
    assert profile.load_seconds > 0
    assert profile.memory_bytes > 0
    assert context.found()["points"][0]["calls"] >= 5
    assert context.lines("progress")[-1]["done"] == 2


@pytest.mark.training  # a process of its own imports torch first
def test_a_profile_of_more_rows_than_one_call_takes_is_refused(tmp_path: Path) -> None:
    work = ProfileWork(version=VERSION, batch_sizes=[1, 129])
    context = context_of(tmp_path, job_pb2.Job(profile=work))
    with pytest.raises(JobFailure, match="takes at most 128 rows in one call") as failure:
        profile_job.run(context)
    assert failure.value.cause == "INVALID_RECIPE"


def test_a_profile_that_shall_stop_stops(tmp_path: Path) -> None:
    context = context_of(tmp_path, job_pb2.Job(profile=ProfileWork(version=VERSION)))
    context.stop()
    with pytest.raises(Stopped):
        profile_job.run(context)
    assert not context.lines("profiles")
