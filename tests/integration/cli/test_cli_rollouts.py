"""`penstock rollout …` and `penstock deploy --strategy`, against a server of the real stubs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from penstock.errors import FailedPrecondition, NotFound
from penstock.scheduler.v1 import deployment_pb2, rollout_pb2, scheduler_service_pb2
from penstock_cli.__main__ import main
from penstock_cli.rollout_views import rollout_view
from support.fake_mesh import FakeMesh


def rollout(state: str = "RUNNING", step: int = 1, **fields: Any) -> rollout_pb2.Rollout:
    """A canary from digits:1 to digits:2 that has come to 25 %."""
    made = rollout_pb2.Rollout(
        name="deployments/digits/rollouts/2",
        state=rollout_pb2.RolloutState.Value(f"ROLLOUT_STATE_{state}"),
        policy=deployment_pb2.RolloutPolicy(
            strategy=deployment_pb2.ROLLOUT_STRATEGY_CANARY, steps=[5, 25, 100]
        ),
        to=[deployment_pb2.Target(model="models/digits", version=2, resolved_version=2, weight=100)],
        step=step,
        percent=25,
        evidence=[
            rollout_pb2.Evidence(
                kind=rollout_pb2.GUARD_KIND_ERROR_RATE,
                against=0.2,
                in_favour=7.5,
                passed=True,
                words="0.0 % of 80 answers are errors",
            ),
            rollout_pb2.Evidence(
                kind=rollout_pb2.GUARD_KIND_LATENCY, against=12.5, words="9.0 % of 80 answers take longer"
            ),
        ],
        actor="ann",
        **fields,
    )
    getattr(made, "from").add(model="models/digits", version=1, resolved_version=1, weight=100)
    return made


class RolloutMesh(FakeMesh):
    """Knows one rollout, which ends as a test says."""

    def __init__(self) -> None:
        self.rollout = rollout()
        self.end = rollout("SUCCEEDED", 2, message="The new targets have all traffic.")
        super().__init__()

    def GetRollout(self, request: Any, context: Any) -> rollout_pb2.Rollout:
        if "digits" not in request.name:
            raise NotFound("There is no such rollout.")
        return self.rollout

    def ListRollouts(self, request: Any, context: Any) -> scheduler_service_pb2.ListRolloutsResponse:
        return scheduler_service_pb2.ListRolloutsResponse(rollouts=[self.rollout])

    def WatchRollout(self, request: Any, context: Any) -> Iterator[rollout_pb2.Rollout]:
        yield self.rollout
        yield self.end

    def PauseRollout(self, request: Any, context: Any) -> rollout_pb2.Rollout:
        return rollout("PAUSED", message="Paused at 25 %.")

    def ResumeRollout(self, request: Any, context: Any) -> rollout_pb2.Rollout:
        return rollout(message="Resumed at 25 %.")

    def PromoteRollout(self, request: Any, context: Any) -> rollout_pb2.Rollout:
        raise FailedPrecondition("Rollout 2 of digits is ROLLING_BACK and cannot be promoted.")

    def AbortRollout(self, request: Any, context: Any) -> rollout_pb2.Rollout:
        return rollout("ABORTED", message="Aborted by ann.")

    def GetLiveTargets(self, request: Any, context: Any) -> scheduler_service_pb2.GetLiveTargetsResponse:
        found = scheduler_service_pb2.GetLiveTargetsResponse(targets=self.rollout.to)
        found.since.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
        return found


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[RolloutMesh]:
    with RolloutMesh() as mesh:
        monkeypatch.setenv("PENSTOCK_ENDPOINT", mesh.address)
        yield mesh


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_a_rollout_is_shown_with_its_steps_and_guards(
    mesh: RolloutMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("rollout", "digits"), ("rollout", "show", "digits", "--number", "2")):
        code, out, _ = run(capsys, *words)
        assert code == 0
        for part in (
            "RUNNING",
            "digits:1 → digits:2",
            "5 % ✓",
            "25 % ◀",
            "error rate",
            "passed",
            "looks",
            "12.5",
        ):
            assert part in out
    assert mesh.requests["GetRollout"].name == "deployments/digits/rollouts/2"
    code, out, _ = run(capsys, "rollout", "show", "digits", "--json")
    assert json.loads(out)["percent"] == 25
    assert mesh.requests["GetRollout"].name == "deployments/digits/rollouts/-"


def test_who_watches_sees_every_change_and_fails_if_it_is_taken_back(
    mesh: RolloutMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "rollout", "watch", "digits")
    assert code == 0
    assert "SUCCEEDED. The new targets have all traffic." in out
    mesh.end = rollout("ROLLED_BACK", message="5.1 % of 256 answers are errors.")
    code, _, err = run(capsys, "rollout", "watch", "digits")
    assert code == 1
    assert "5.1 % of 256 answers are errors." in err
    code, out, _ = run(capsys, "rollout", "watch", "digits", "--json")
    assert code == 1
    assert json.loads(out)["state"] == "ROLLOUT_STATE_ROLLED_BACK"


def test_by_hand(mesh: RolloutMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert "PAUSED. Paused at 25 %." in run(capsys, "rollout", "pause", "digits")[1]
    assert "RUNNING. Resumed" in run(capsys, "rollout", "resume", "digits")[1]
    assert "ABORTED. Aborted by ann." in run(capsys, "rollout", "abort", "digits")[1]
    code, _, err = run(capsys, "rollout", "promote", "digits")
    assert code == 1
    assert "cannot be promoted" in err
    assert "RUNNING" in run(capsys, "rollout", "list", "digits")[1]
    assert run(capsys, "rollout", "show", "nothing")[0] == 3


def test_what_was_live_at_a_moment(mesh: RolloutMesh, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "rollout", "live", "digits", "--at", "2026-01-02T03:04:05Z")
    assert code == 0
    assert "digits:2 100 %, since 2026-01-01T00:00:00+00:00" in out
    moment = mesh.requests["GetLiveTargets"].time.ToDatetime(UTC)
    assert moment == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert run(capsys, "rollout", "live", "digits", "--at", "yesterday")[0] == 2


def test_deploy_says_how_new_versions_take_over(
    mesh: RolloutMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "deploy digits --model digits:1 --no-wait --strategy canary --steps 5,25%,100 --step-duration 2m"
    more = "--min-answers 7 --patience 90s --limit errors=0.02 --limit latency=2 --guard-metric accuracy=0.01"
    code, _, err = run(capsys, *words.split(), *more.split(), "--guard-metric", "-loss")
    assert code == 0, err
    policy = mesh.requests["CreateDeployment"].deployment.rollout_policy
    assert policy.strategy == deployment_pb2.ROLLOUT_STRATEGY_CANARY
    assert list(policy.steps) == [5, 25, 100]
    assert policy.step_duration.seconds == 120
    assert policy.patience.seconds == 90
    assert (policy.min_answers, policy.max_error_increase, policy.max_latency_ratio) == (7, 0.02, 2.0)
    assert [(m.name, m.lower_is_better, m.max_loss) for m in policy.metrics] == [
        ("accuracy", False, 0.01),
        ("loss", True, 0.0),
    ]
    run(capsys, "deploy", "digits", "--model", "digits:1", "--no-wait")
    assert not mesh.requests["CreateDeployment"].deployment.HasField("rollout_policy")


@pytest.mark.parametrize(
    "words",
    [
        "--strategy sideways",
        "--strategy canary --steps 5,x",
        "--strategy canary --step-duration soon",
        "--strategy canary --limit beauty=1",
        "--limit errors=0.1",
        "--strategy canary --guard-metric accuracy=much",
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_call(
    mesh: RolloutMesh, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    code, _, err = run(capsys, "deploy", "digits", "--model", "digits:1", *words.split())
    assert code == 2
    assert err
    assert not mesh.calls["CreateDeployment"]


def test_a_rollout_that_starts_or_has_no_evidence_is_drawn_too() -> None:
    console = Console(width=80, record=True)
    console.print(rollout_view(rollout_pb2.Rollout(name="deployments/d/rollouts/1")))
    assert "UNSPECIFIED" in console.export_text()
