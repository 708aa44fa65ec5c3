"""`penstock train`, `compress` … and `penstock jobs …`, against a server of the real stubs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2
from rich.console import Console
from rich.text import Text

from penstock.errors import NotFound, Reason
from penstock.scheduler.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc
from penstock_cli import session
from penstock_cli.__main__ import main
from penstock_cli.job_views import Account, curve, job_view
from penstock_kit.jobs import compress, training
from support.fake_mesh import FakeMesh

LOG = job_service_pb2.JOB_EVENT_KIND_LOG


class JobMesh(FakeMesh, job_service_pb2_grpc.JobServiceServicer):
    """Takes a job, lets it run for two changes, and ends it as a test says."""

    def __init__(self) -> None:
        super().__init__()
        job_service_pb2_grpc.add_JobServiceServicer_to_server(self, self._server)
        self.job = job_pb2.Job()
        self.standing = job_pb2.Job(state=job_pb2.JOB_STATE_RUNNING)
        self.end = job_pb2.Job(
            state=job_pb2.JOB_STATE_SUCCEEDED,
            results=["models/digits/versions/1"],
            metrics={"held_out/accuracy": 0.98},
        )
        self.events = [
            job_pb2.JobEvent(
                sequence=step,
                metrics=job_pb2.MetricPoint(step=step, values={"train/loss": 2.0 / step, "lr": 0.1}),
            )
            for step in range(1, 8)
        ]
        self.events += [
            job_pb2.JobEvent(sequence=8, log=job_pb2.LogLine(text="epoch 1 is done")),
            job_pb2.JobEvent(sequence=9, log=job_pb2.LogLine(text="epoch 2 is done")),
        ]

    def _now(self, **fields: Any) -> job_pb2.Job:
        seen = job_pb2.Job()
        seen.CopyFrom(self.job)
        seen.MergeFrom(job_pb2.Job(**fields))
        return seen

    def CreateJob(self, request: Any, context: Any) -> job_pb2.Job:
        self.job = request.job
        return self._now(state=job_pb2.JOB_STATE_QUEUED)

    def GetJob(self, request: Any, context: Any) -> job_pb2.Job:
        if self.job.name and request.name != self.job.name:
            raise NotFound(
                f"There is no {request.name}.",
                reason=Reason.RESOURCE_NOT_FOUND,
                metadata={"job": request.name.removeprefix("jobs/")},
            )
        seen = self._now()
        seen.MergeFrom(self.standing)
        return seen

    def ListJobs(self, request: Any, context: Any) -> job_service_pb2.ListJobsResponse:
        return job_service_pb2.ListJobsResponse(jobs=[self._now(state=job_pb2.JOB_STATE_RUNNING)])

    def CancelJob(self, request: Any, context: Any) -> job_pb2.Job:
        self.end = job_pb2.Job(state=job_pb2.JOB_STATE_CANCELLED, message="Cancelled by ann.")
        return self._now(state=job_pb2.JOB_STATE_STOPPING)

    def DeleteJob(self, request: Any, context: Any) -> empty_pb2.Empty:
        return empty_pb2.Empty()

    def WatchJob(self, request: Any, context: Any) -> Iterator[job_pb2.Job]:
        progress = job_pb2.JobProgress(done=30, total=100, unit="steps", phase="epoch 3 of 10")
        yield self._now(state=job_pb2.JOB_STATE_QUEUED, message="No node has room for it.")
        yield self._now(state=job_pb2.JOB_STATE_RUNNING, progress=progress)
        seen = self._now()
        seen.MergeFrom(self.end)
        yield seen

    def ListJobEvents(self, request: Any, context: Any) -> job_service_pb2.ListJobEventsResponse:
        found = [e for e in self.events if (e.HasField("log") if LOG in request.kinds else True)]
        left = [event for event in found if event.sequence > request.after]
        page = left[:4]  # pages, although nobody asked for small ones
        return job_service_pb2.ListJobEventsResponse(events=page, more=len(left) > len(page))

    def WatchJobEvents(self, request: Any, context: Any) -> Iterator[job_pb2.JobEvent]:
        yield from (event for event in self.events if event.sequence > request.after)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobMesh]:
    with JobMesh() as mesh:
        monkeypatch.setenv("PENSTOCK_ENDPOINT", mesh.address)
        yield mesh


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_training_is_queued_with_all_that_its_options_say_and_followed_to_its_end(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "train digits:2 --model digits -a cnn --set channels=[16,32] -o sgd --lr 0.1 --epochs 5"
    words += " --optimizer-parameter momentum=0.9 --optimizer-parameter nesterov=true --schedule cosine"
    words += " --class-weight 3=2.5 --strategy ddp --ranks 2 --cpu 0.5 --memory 256MiB --seed 7"
    words += " --patience 3 --project research --time-limit 1h"
    code, out, _ = run(capsys, *words.split())
    assert code == 0
    job = mesh.job
    assert job.name.startswith("jobs/train-")
    assert (job.project, job.ranks_per_node, job.nodes) == ("projects/research", 2, 1)
    assert (job.resources.cpu_millis, job.resources.memory_bytes) == (500, 256 * 1024 * 1024)
    assert job.timeout.seconds == 3600
    work = job.train
    assert (work.dataset, work.model, work.seed) == ("digits:2", "models/digits", 7)
    recipe = work.recipe
    assert recipe.architecture == "cnn"
    assert list(recipe.architecture_parameters["channels"]) == [16, 32]
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("sgd", 0.1)
    assert dict(recipe.optimizer.parameters) == {"momentum": 0.9, "nesterov": True}
    assert (recipe.schedule.name, recipe.epochs, recipe.strategy.name) == ("cosine", 5, "ddp")
    assert dict(recipe.class_weights) == {"3": 2.5}
    assert recipe.early_stopping.patience == 3
    for part in ("No node has room for it.", "30 %", "epoch 3 of 10", "SUCCEEDED", "digits:1"):
        assert part in out


def test_a_job_that_fails_ends_the_command_with_its_cause(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.end = job_pb2.Job(
        state=job_pb2.JOB_STATE_FAILED, message="The loss is NaN at step 12.", failure_reason="DIVERGED"
    )
    code, _, err = run(capsys, "train", "digits", "--model", "digits", "--name", "mine")
    assert code == 1
    assert "The loss is NaN at step 12." in err
    assert "penstock jobs logs mine" in err
    code, out, err = run(capsys, "train", "digits", "--model", "digits", "--json")
    assert code == 1
    assert json.loads(out)["failureReason"] == "DIVERGED"


def test_who_detaches_is_told_how_to_follow(mesh: JobMesh, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "profile", "digits@champion", "--batch-size", "1", "--batch-size", "8", "-d")
    assert code == 0
    assert "penstock jobs watch profile-" in out
    assert list(mesh.job.profile.batch_sizes) == [1, 8]
    assert mesh.calls["WatchJob"] == 0


def test_a_compression_says_its_steps_or_searches_and_has_a_gate(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--step", "prune_channels:ratio=0.5", "--step", "quantize:scheme=static_int8,rows=512"]
    words = ["compress", "digits:1", "--dataset", "digits", *steps, "--max-loss", "0.01", "--max-size", "0.3"]
    assert run(capsys, *words)[0] == 0
    work = mesh.job.compress
    assert [(step.name, dict(step.parameters)) for step in work.steps] == [
        ("prune_channels", {"ratio": 0.5}),
        ("quantize", {"scheme": "static_int8", "rows": 512}),
    ]
    assert (work.gate.max_metric_loss, work.gate.max_size_ratio) == (0.01, 0.3)
    assert not work.gate.HasField("min_speed_up")
    assert not work.HasField("search")
    words = "compress digits --dataset digits --search --budget 5m --min-speed-up 2 --deploy digits"
    assert run(capsys, *words.split())[0] == 0
    work = mesh.job.compress
    assert work.search.budget.seconds == 300
    assert (work.gate.min_speed_up, work.deployment) == (2, "deployments/digits")


def test_other_kinds_carry_what_they_are_given(mesh: JobMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            capsys, *["convert", "digits:1", "--to", "onnx", "--dataset", "digits", "--parameter", "opset=20"]
        )[0]
        == 0
    )
    assert (mesh.job.convert.format, mesh.job.convert.parameters["opset"]) == ("onnx", 20)
    assert (
        run(capsys, *["evaluate", "digits:1", "digits", "--metric", "f1", "--record", "--held-out", "0.2"])[0]
        == 0
    )
    assert (list(mesh.job.evaluate.metrics), mesh.job.evaluate.record) == (["f1"], True)
    words = "batch-predict digits digits --to answers --column x=pixels --chunk-rows 100"
    assert run(capsys, *words.split())[0] == 0
    work = mesh.job.batch_predict
    assert (work.deployment, work.artifact) == ("deployments/digits", "artifacts/answers")
    assert dict(work.inputs) == {"x": "pixels"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compress digits --dataset digits", "--step"),
        ("compress digits --dataset digits --step clip --search", "--search"),
        ("compress digits --dataset digits --step clip --budget 5m", "--budget"),
        ("train digits --model digits --set hidden=[1", "not valid JSON"),
        ("train digits --model digits --set hidden", "KEY=VALUE"),
        ("train digits --model digits --time-limit soon", "--time-limit"),
        ("train digits --model digits --time-limit 0s", "longer than 0 s"),
        ("profile digits --duration 999999999999h", "ten years at most"),
        ("train digits --model digits --parameter a=1", "--script"),
        ("batch-predict digits digits --to a --column x", "INPUT=COLUMN"),
        ("jobs list --state RUNING", "Did you mean RUNNING?"),
        ("jobs run nothing.yaml", "cannot be read"),
    ],
)
def test_a_mistake_is_named_before_anything_is_queued(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    code, _, err = run(capsys, *words.split())
    assert code in (2, 3)
    assert said in err
    assert mesh.calls["CreateJob"] == 0


def test_jobs_are_listed_shown_read_cancelled_and_deleted(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", "digits", "--model", "digits", "--name", "mine", "-d")
    code, out, _ = run(capsys, "jobs")
    assert code == 0
    assert "mine" in out
    assert "RUNNING" in out
    assert run(capsys, "jobs", "mine")[1].count("train") >= 1
    assert run(capsys, "jobs", "logs", "mine")[1] == "epoch 1 is done\nepoch 2 is done\n"
    code, out, _ = run(capsys, "jobs", "metrics", "mine")
    assert "train/loss" in out
    assert "0.28571" in out
    code, _, err = run(capsys, "jobs", "metrics", "mine", "--metric", "train/los")
    assert code == 3
    assert "Did you mean train/loss?" in err
    code, _, err = run(capsys, "jobs", "show", "mime")
    assert code == 3
    assert "Did you mean mine?" in err
    code, out, _ = run(capsys, "jobs", "cancel", "mine")
    assert "CANCELLED" in out
    assert run(capsys, "jobs", "delete", "mine", "--yes")[0] == 0
    assert mesh.requests["DeleteJob"].name == "jobs/mine"


def test_a_job_that_was_shown_as_json_can_be_run_from_a_file(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(capsys, "train", "digits", "--model", "digits", "--name", "mine", "--epochs", "4", "-d")
    file = tmp_path / "job.json"
    file.write_text(run(capsys, "jobs", "show", "mine", "--json")[1])
    assert run(capsys, "jobs", "run", str(file), "-d")[0] == 0
    assert mesh.job.train.recipe.epochs == 4
    file.write_text("train: {dataset: digits, modell: x}")
    code, _, err = run(capsys, "jobs", "run", str(file))
    assert code == 2
    assert "there is no field train.modell. Did you mean model?" in err
    file.write_text("train: {model: m, recipe: {optimizer: {name: sgd, parameters: {any: 1}}, epoch: 3}}")
    code, _, err = run(capsys, "jobs", "run", str(file))
    assert code == 2
    assert "there is no field train.recipe.epoch. Did you mean epochs?" in err


def test_a_job_of_long_ago_says_that_its_log_is_not_kept(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.job = job_pb2.Job(name="jobs/old")
    mesh.events = []
    assert "old has written nothing yet." in run(capsys, "jobs", "logs", "old")[2]
    mesh.standing = job_pb2.Job(state=job_pb2.JOB_STATE_SUCCEEDED, last_event=7)
    mesh.standing.end_time.FromSeconds(1_760_000_000)
    assert "not kept any longer" in run(capsys, "jobs", "logs", "old")[2]
    assert "not kept any longer" in run(capsys, "jobs", "metrics", "old")[2]


def test_who_watches_sees_progress_a_curve_and_the_log(mesh: JobMesh) -> None:
    account = Account()
    for event in mesh.events:
        account.hear(event)
    job = job_pb2.Job(
        name="jobs/mine",
        train={"dataset": "digits"},
        state=job_pb2.JOB_STATE_RUNNING,
        progress=job_pb2.JobProgress(done=30, total=100, phase="epoch 3 of 10"),
        metrics={"train/loss": 0.25},
    )
    job.progress.remaining.FromSeconds(90)
    console = Console(width=100, force_terminal=False, record=True)
    with console.capture() as seen:
        console.print(job_view(job, account))
    for part in ("RUNNING", "30 %", "epoch 3 of 10", "1.5 min left", "train/loss", "epoch 2 is done"):
        assert part in seen.get()


def test_a_curve_fits_into_a_narrow_terminal(mesh: JobMesh) -> None:
    account = Account()
    for event in mesh.events:
        account.hear(event)
    lines = curve(account.curves, width=40).splitlines()
    assert max(len(Text.from_ansi(line).plain) for line in lines) <= 40


def test_who_watches_at_a_wrong_address_is_told_at_once(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_RETRY_SECONDS", 0.1)
    monkeypatch.setenv("PENSTOCK_ENDPOINT", "127.0.0.1:1")
    code, _, err = run(capsys, "jobs", "watch", "mine", "--json")
    assert code == 4
    assert "127.0.0.1:1" in err


def test_a_terminal_is_drawn_from_events_and_states_that_come_in_two_threads(
    mesh: JobMesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    mesh.events = [
        job_pb2.JobEvent(sequence=n, metrics=job_pb2.MetricPoint(step=n, values={"train/loss": 2.0 / n}))
        for n in range(1, 5001)
    ]
    mesh.job = job_pb2.Job(name="jobs/mine", train={"dataset": "digits"})
    code, out, _ = run(capsys, "jobs", "watch", "mine")
    assert code == 0
    for part in ("mine", "SUCCEEDED", "train/loss", "digits:1"):
        assert part in out


def test_what_recipes_are_made_of_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    names = {entry["name"]: entry for entry in json.loads(run(capsys, "recipes", "--json")[1])}
    assert {
        *training.ARCHITECTURES,
        *training.OPTIMIZERS,
        *training.STRATEGIES,
        *compress.STEPS,
    } <= names.keys()
    assert "nesterov" in run(capsys, "recipes", "sgd")[1]
    code, _, err = run(capsys, "recipes", "adamm")
    assert code == 3
    assert "Did you mean adam" in err
