"""What conversions, profiles and evaluations may ask for."""

from __future__ import annotations

import pytest
from google.protobuf import duration_pb2

from penstock.scheduler.v1 import job_pb2
from penstock.scheduler.v1.job_work_pb2 import ConvertWork, EvaluateWork, ProfileWork
from penstock_kit import jobs
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs import convert

VERSION = "models/digits/versions/3"


def refused(job: job_pb2.Job) -> tuple[str, str]:
    with pytest.raises(InvalidArgument) as error:
        jobs.check(job)
    return error.value.message, error.value.metadata["field"]


def test_what_a_worker_can_do_passes() -> None:
    work = ConvertWork(version=VERSION, format="onnx", tolerance=0.01)
    work.parameters.update({"opset": 18.0})
    jobs.check(job_pb2.Job(convert=work))
    jobs.check(job_pb2.Job(profile=ProfileWork(version=VERSION, batch_sizes=[1, 8])))
    jobs.check(job_pb2.Job(evaluate=EvaluateWork(version=VERSION, dataset="digits", metrics=["f1"])))


def test_a_conversion_has_defaults_for_all_that_was_not_said() -> None:
    plan = convert.plan(ConvertWork(version=VERSION, format="onnx"))
    assert plan.tolerance == 0.001
    assert dict(plan.parameters) == {"rows": 256, "opset": 20}


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    words, field = refused(job_pb2.Job(convert=ConvertWork(version=VERSION, format="onxx")))
    assert "did you mean 'onnx'" in words
    assert field == "job.convert.format"


def test_an_option_of_another_format_is_refused() -> None:
    work = ConvertWork(version=VERSION, format="pt2")
    work.parameters.update({"opset": 20})
    words, field = refused(job_pb2.Job(convert=work))
    assert "no parameter 'opset'" in words
    assert field == "job.convert.parameters"


@pytest.mark.parametrize("tolerance", [-1.0, 0.9, float("nan")])
def test_a_tolerance_that_says_nothing_is_refused(tolerance: float) -> None:
    job = job_pb2.Job(convert=ConvertWork(version=VERSION, format="onnx", tolerance=tolerance))
    assert refused(job)[1] == "job.convert.tolerance"


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (job_pb2.Job(convert=ConvertWork(format="onnx")), "job.convert.version"),
        (job_pb2.Job(convert=ConvertWork(version=VERSION)), "job.convert.format"),
        (job_pb2.Job(profile=ProfileWork()), "job.profile.version"),
        (job_pb2.Job(profile=ProfileWork(version=VERSION, batch_sizes=[0])), "job.profile.batch_sizes"),
        (
            job_pb2.Job(profile=ProfileWork(version=VERSION, duration=duration_pb2.Duration(seconds=10_000))),
            "job.profile.duration",
        ),
        (job_pb2.Job(evaluate=EvaluateWork(dataset="digits")), "job.evaluate.version"),
        (job_pb2.Job(evaluate=EvaluateWork(version=VERSION)), "job.evaluate.dataset"),
        (
            job_pb2.Job(evaluate=EvaluateWork(version=VERSION, dataset="d", metrics=["acuracy"])),
            "job.evaluate.metrics",
        ),
        (
            job_pb2.Job(evaluate=EvaluateWork(version=VERSION, dataset="d", held_out=1.0)),
            "job.evaluate.held_out",
        ),
    ],
)
def test_what_no_worker_could_do_is_refused_with_the_field(job: job_pb2.Job, field: str) -> None:
    assert refused(job)[1] == field
