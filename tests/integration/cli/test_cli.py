"""The `penstock` command, run as people and scripts run it, against a server of the real stubs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest

from penstock.errors import Aborted, Unavailable
from penstock.scheduler.v1 import deployment_pb2
from penstock_cli.__main__ import main
from penstock_cli.output import print_table
from support.fake_mesh import FakeMesh


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Cli:
    """Runs commands in this process, with no terminal."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> Result:
        self._capsys.readouterr()
        code = main(words)
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with FakeMesh() as mesh:
        yield mesh


@pytest.fixture
def penstock(mesh: FakeMesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("PENSTOCK_ENDPOINT", mesh.address)
    return Cli(capsys)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "model.py").write_text('INPUTS = ["x:FP32:-1,2"]\nOUTPUTS = ["y:FP32:-1,2"]\n')
    return str(folder)


def test_a_model_goes_through_its_whole_life(penstock: Cli, folder: str) -> None:
    pushed = penstock("push", folder, "--alias", "champion", "--metric", "accuracy=0.9", "--label", "a=b")
    assert pushed.code == 0
    assert "Pushed digits:1" in pushed.out
    assert penstock("push", "digits", folder, "--metric", "accuracy=0.95").out.startswith("Pushed digits:2")
    assert re.search(r"digits +2 +champion→1", penstock("models").out)
    assert re.search(r"digits:1 +READY +python .* accuracy=0\.9 ", penstock("versions", "digits").out)
    assert "x:FP32:-1,2" in penstock("show", "digits:1").out
    deployed = penstock("deploy", "digits", "--model", "digits@champion")
    assert "digits is READY, 1 replica ready." in deployed.out
    assert "digits@champion 100 %" in deployed.out
    assert penstock("traffic", "digits", "1=90", "2=10").code == 0
    assert re.search(r"digits:1 90 %, digits:2 10 %", penstock("deployments").out)
    assert "update" in penstock("deployments", "history", "digits").out
    assert "digits@champion 100 %" in penstock("rollback", "digits").out
    assert penstock("alias", "set", "digits", "champion", "2").out == "digits@champion is version 2 now.\n"
    answered = penstock("predict", "digits", "--input", "[[1, 2]]")
    assert "x (FP32 1×2)" in answered.out
    assert penstock("undeploy", "digits", "--yes").out == "Deleted digits.\n"
    assert penstock("delete", "digits", "--yes").code == 0
    assert "No models yet" in penstock("models").err


@pytest.mark.parametrize(
    "words",
    [
        ("models",),
        ("models", "show", "digits"),
        ("versions", "digits"),
        ("versions", "show", "digits:1"),
        ("alias", "list", "digits"),
        ("deploy", "digits", "--no-wait"),
        ("deployments",),
        ("deployments", "show", "digits"),
        ("deployments", "history", "digits"),
        ("show", "digits"),
        ("nodes",),
        ("replicas",),
        ("predict", "digits", "-i", "[[1, 2]]"),
        ("version",),
    ],
)
def test_json_is_one_document_on_stdout(penstock: Cli, folder: str, words: tuple[str, ...]) -> None:
    penstock("push", folder, "--alias", "champion")
    penstock("deploy", "digits")
    result = penstock(*words, "--json")
    assert result.code == 0
    assert json.loads(result.out)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("frobnicate",), 2, "No such command 'frobnicate'"),
        (("modls",), 2, "Did you mean 'models'"),
        (("push",), 2, "Missing argument"),
        (("push", "/nowhere"), 3, "There is no file or directory /nowhere"),
        (("push", "a", "b", "c"), 2, "one model at a time"),
        (("push", "FOLDER", "--metric", "accuracy"), 2, "KEY=VALUE"),
        (("push", "FOLDER", "--metric", "accuracy=high"), 2, "is not a number"),
        (("push", "FOLDER", "--metric", "a=nan"), 2, "finite"),
        (("push", "FOLDER", "--label", "a=1", "--label", "a=2"), 2, "twice"),
        (("push", "FOLDER", "--input", "x"), 2, "NAME:DATATYPE:SHAPE"),
        (("push", "FOLDER", "--batch", "-1"), 2, "'--batch'"),
        (("push", "FOLDER", "--parent", "digits"), 2, "say which version"),
        (("push", "FOLDER", "digits"), 2, "The name goes before the path"),
        (("push", "a b", "FOLDER"), 2, "cannot be the name of a model"),
        (("versions", "show", "nothing:1"), 3, "no model nothing"),
        (("versions", "show", "digits:0"), 2, "MODEL:NUMBER"),
        (("versions", "show", "digits@nobody"), 3, "no alias nobody"),
        (("versions", "delete", "digits"), 2, "Say which version"),
        (("delete", "digits"), 2, "add --yes"),
        (("models", "show", "digitz"), 3, "Did you mean digits?"),
        (("show", "digitz"), 3, "Did you mean digits?"),
        (("delete", "digits:9", "--yes"), 3, "no version"),
        (("predict", "digitz", "-i", "[[1]]"), 3, "Did you mean digits?"),
        (("predict", "digits"), 2, "--input"),
        (("predict", "digits", "-i", "[[1"), 2, "is not JSON"),
        (("predict", "digits", "-i", "@nowhere.npy"), 3, "no file nowhere.npy"),
        (("predict", "digits", "-i", "z=[[1, 2]]"), 2, "has no input z; it takes x"),
        (("predict", "digits", "-i", "[[1]]", "-i", "[[2]]"), 2, "each needs its name"),
        (("predict", "digits", "-i", '[["a"]]'), 2, "takes FP32"),
        (("deploy", "digits", "--model", "other"), 3, "no model other"),
        (("deploy", "digits", "--traffic", "1=90,2=20"), 2, "must sum to 100"),
        (("deploy", "digits", "--target", "digits:1"), 2, "MODEL:NUMBER=PER_CENT"),
        (("deploy", "digits", "--target", "digits:1=100", "--model", "digits"), 2, "either --target"),
        (("deploy", "digits", "--replicas", "0"), 2, "'--replicas'"),
        (("traffic", "digits", "one"), 2, "VERSION=PER_CENT"),
        (("traffic", "digits", "1=some"), 2, "whole per cent"),
        (("rollback", "digitz"), 3, "Did you mean digits?"),
        (("models", "--endpoint", "nowhere"), 2, "is no address"),
        (("up", "--json"), 2, "--detach"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_gets_words_and_an_exit_status(
    penstock: Cli, folder: str, words: tuple[str, ...], code: int, said: str
) -> None:
    penstock("push", folder)
    penstock("deploy", "digits")
    result = penstock(*(folder if word == "FOLDER" else word for word in words))
    assert (result.code, result.out) == (code, "")
    assert said in result.err


def test_errors_are_json_too_where_json_is_asked_for(penstock: Cli) -> None:
    result = penstock("models", "show", "digits", "--json")
    assert result.code == 3
    error = json.loads(result.err)["error"]
    assert (error["code"], error["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")


def test_nobody_there_says_how_to_start_a_mesh(penstock: Cli) -> None:
    result = penstock("models", "--endpoint", "127.0.0.1:1")
    assert result.code == 4
    assert "penstock up" in result.err


def test_a_push_that_cannot_end_says_how_to_go_on(penstock: Cli, mesh: FakeMesh, folder: str) -> None:
    mesh.fail("FinalizeVersion", *[Unavailable("the registry restarts")] * 100)
    result = penstock("push", folder)
    assert result.code == 4
    mesh.fail("FinalizeVersion")
    key = re.search(r"--request-id (\S+)", result.err)
    assert key is not None
    assert mesh.requests["CreateVersion"].request_id == key[1]


def test_an_alias_that_somebody_moved_is_told(penstock: Cli, mesh: FakeMesh, folder: str) -> None:
    penstock("push", folder)
    mesh.fail("SetAlias", Aborted("somebody moved it"))
    result = penstock("alias", "set", "digits", "champion", "1", "--expect", "0")
    assert (result.code, result.err) == (1, "error: somebody moved it\n")


def test_a_deployment_that_fails_ends_with_its_reason(penstock: Cli, mesh: FakeMesh, folder: str) -> None:
    penstock("push", folder)
    mesh.final_state = deployment_pb2.DEPLOYMENT_STATE_FAILED
    result = penstock("deploy", "digits")
    assert result.code == 1
    assert "digits failed: no node has room" in result.err


def test_a_deployment_that_takes_too_long_says_why_it_is_pending(
    penstock: Cli, mesh: FakeMesh, folder: str
) -> None:
    penstock("push", folder)
    mesh.final_state = deployment_pb2.DEPLOYMENT_STATE_PENDING
    result = penstock("deploy", "digits", "--timeout", "0.3")
    assert result.code == 4
    assert "no node has room" in result.err
    assert "no node has room" in penstock("show", "digits").out


def test_inputs_come_from_files_and_stdin(
    penstock: Cli, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penstock("push", folder)
    penstock("deploy", "digits")
    np.save(tmp_path / "x.npy", np.float32([[1, 2]]))
    np.savez(tmp_path / "all.npz", x=np.float32([[1, 2]]))
    (tmp_path / "x.json").write_text('{"x": [[1, 2]]}')
    monkeypatch.setattr(sys, "stdin", io.StringIO("[[1, 2]]"))
    for text in (
        f"x=@{tmp_path}/x.npy",
        f"@{tmp_path}/x.npy",
        f"{tmp_path}/all.npz",
        f"@{tmp_path}/x.json",
        "-",
    ):
        answer = json.loads(penstock("predict", "digits", "-i", text, "--json").out)
        assert answer["outputs"]["x"] == {"datatype": "FP32", "shape": [1, 2], "data": [[1.0, 2.0]]}


def test_what_is_not_a_number_is_told_in_json_as_a_word(penstock: Cli, folder: str, tmp_path: Path) -> None:
    penstock("push", folder)
    penstock("deploy", "digits")
    np.save(tmp_path / "x.npy", np.float32([[np.nan, np.inf]]))
    answer = json.loads(penstock("predict", "digits", "-i", f"x=@{tmp_path}/x.npy", "--json").out)
    assert answer["outputs"]["x"]["data"] == [["NaN", "Infinity"]]


def test_a_pickled_array_is_never_unpickled(penstock: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    result = penstock("predict", "digits", "-i", f"@{tmp_path}/x.npy")
    assert result.code == 2
    assert "cannot be read as a numpy file" in result.err


def test_outputs_are_saved(penstock: Cli, folder: str, tmp_path: Path) -> None:
    penstock("push", folder)
    penstock("deploy", "digits")
    assert penstock("predict", "digits", "-i", "[[1, 2]]", "--save", f"{tmp_path}/out.npz").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["x"], [[1, 2]])


def test_a_download_lands_in_a_directory_of_its_own(
    penstock: Cli, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penstock("push", folder)
    monkeypatch.chdir(tmp_path)
    assert penstock("versions", "download", "digits:1").code == 0
    assert {path.name for path in (tmp_path / "digits-1").iterdir()} == {"model.py", "manifest.yaml"}


def test_a_dry_run_sends_nothing(penstock: Cli, mesh: FakeMesh, folder: str) -> None:
    assert "x:FP32:-1,2" in penstock("push", folder, "--dry-run").out
    assert not mesh.calls


def test_the_script_itself_runs_without_a_terminal(mesh: FakeMesh) -> None:
    command = [sys.executable, "-m", "penstock_cli", "models", "--endpoint", mesh.address]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "No models yet" in done.stderr


def test_an_interrupt_ends_quietly(penstock: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.Client.list_models", interrupt)
    assert penstock("models").code == 130


def test_a_fault_of_ours_is_told_without_a_traceback(penstock: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("penstock.Client.list_models", fail)
    result = penstock("models")
    assert result.code == 1
    assert "ZeroDivisionError: oops. This is a fault of penstock" in result.err


def test_a_gateway_that_answers_nonsense_is_told(penstock: Cli, mesh: FakeMesh) -> None:
    mesh.fail("ListModels", grpc.StatusCode.INTERNAL)
    assert penstock("models").code == 1


def test_no_command_shows_the_commands(penstock: Cli) -> None:
    shown = penstock()
    assert (shown.code, shown.err) == (0, "")
    assert re.search(r"^  push +Push a model", shown.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "heading"),
    [
        (("models", "digits"), "model"),
        (("deployments", "digits"), "deployment"),
        (("versions", "digits"), "VERSION"),
        (("alias", "digits"), "ALIAS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_name_where_a_command_could_be_shows_what_it_names(
    penstock: Cli, folder: str, words: tuple[str, ...], heading: str
) -> None:
    penstock("push", folder, "--alias", "champion")
    penstock("deploy", "digits")
    shown = penstock(*words)
    assert shown.code == 0
    assert shown.out.startswith(heading)


def test_a_version_without_traffic_is_shown_with_none(penstock: Cli, folder: str) -> None:
    penstock("push", folder)
    penstock("push", folder)
    penstock("deploy", "digits")
    assert "serves  digits:1 0 %, digits:2 100 %" in penstock("traffic", "digits", "1=0", "2=100").out


def test_an_alias_that_cannot_be_is_refused_before_anything_is_pushed(
    penstock: Cli, mesh: FakeMesh, folder: str
) -> None:
    refused = penstock("push", folder, "--alias", "best one")
    assert (refused.code, "name of an alias" in refused.err) == (2, True)
    assert "No models yet" in penstock("models").err


def test_a_push_that_reached_nobody_has_nothing_to_go_on_with(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    failed = Cli(capsys)("push", folder, "--endpoint", "127.0.0.1:9")
    assert failed.code == 4
    assert "--request-id" not in failed.err


def test_a_host_that_is_not_known_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Cli(capsys)("models", "--endpoint", "nohost.invalid:8080")
    assert failed.code == 4
    assert "The host of nohost.invalid:8080 is not known" in failed.err


def test_files_that_cannot_be_written_are_told_by_name(penstock: Cli, folder: str) -> None:
    penstock("push", folder)
    penstock("deploy", "digits")
    failed = penstock("predict", "digits", "--input", "[[1, 2]]", "--save", "/nowhere/outputs.npz")
    assert (failed.code, failed.err) == (1, "error: /nowhere/outputs.npz: No such file or directory.\n")


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(mesh: FakeMesh, folder: str) -> None:
    environment = {
        "PENSTOCK_ENDPOINT": mesh.address,
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    command = [sys.executable, "-m", "penstock_cli"]
    subprocess.run([*command, "push", folder, "--alias", "champion"], env=environment, check=True)
    listed = subprocess.run([*command, "models"], env=environment, capture_output=True, text=True, check=True)
    assert "champion?1" in listed.stdout


def test_a_narrow_terminal_keeps_names_and_numbers_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_cli.output._WIDTH_WITHOUT_TERMINAL", 40)
    name, why = "breast-cancer-3-3eb6bad00a", "No node has room for it. Ask for less, or add a node."
    print_table(("REPLICA", "NODE", "PROCESS#", "WHY"), [(name, "", 123456, why)], empty="None.")
    shown = capsys.readouterr().out
    assert name in shown
    assert "123456" in shown
    assert "NODE" not in shown
    assert " ".join(re.findall(r"\S+", shown)).endswith("add a node.")


def test_autoscaling_is_set_shown_and_ended(penstock: Cli, mesh: FakeMesh, folder: str) -> None:
    penstock("push", folder, "--model", "digits")
    times = ("--queue-wait-objective", "50ms", "--idle", "5m", "--cool-down", "60s")
    penstock("deploy", "digits", "--no-wait", "--min-replicas", "0", "--max-replicas", "8", *times)
    shown = penstock("deployments", "show", "digits").out
    assert "0 to 8 replicas; requests wait 50 ms at most, most of the time; fewer after 60 s" in shown
    assert "none after 300 s without a request" in shown
    assert "(0-8)" in penstock("deployments", "list").out
    penstock("deploy", "digits", "--no-wait", "--max-replicas", "4")
    paths = list(mesh.requests["UpdateDeployment"].update_mask.paths)
    assert paths == ["targets", "autoscaling.max_replicas"]
    penstock("deploy", "digits", "--no-wait", "--no-autoscaling")
    assert "autoscaling" in mesh.requests["UpdateDeployment"].update_mask.paths
    assert not mesh.requests["UpdateDeployment"].deployment.HasField("autoscaling")
    wrong = penstock("deploy", "digits", "--idle", "soon")
    assert "--idle soon: write a time such as 50ms, 60s or 5m" in wrong.err
    wrong = penstock("deploy", "digits", "--max-replicas", "3", "--no-autoscaling")
    assert "give --replicas with it" in wrong.err


def test_a_cache_is_set_shown_and_changed_in_parts(penstock: Cli, mesh: FakeMesh, folder: str) -> None:
    penstock("push", folder)
    assert penstock("deploy", "digits", "--no-wait").code == 0
    assert "equal requests" not in penstock("show", "digits").out
    assert penstock("cache", "digits").out == "digits: each is computed\n"
    changed = penstock("cache", "digits", "--on", "--ttl", "90", "--size", "1MiB")
    assert changed.out == "digits: answers kept for 90 s, at most 1.0 MB per gateway\n"
    assert penstock("deploy", "digits", "--coalesce", "--no-wait").code == 0
    assert "computed once" in penstock("deployments", "show", "digits").out
    document = json.loads(penstock("cache", "digits", "--no-coalesce", "--json").out)
    assert (document["enabled"], document["ttl"]) == (True, "90s")
    wrong = penstock("deploy", "digits", "--cache-size", "lots")
    assert wrong.code != 0
    assert "--cache-size lots: write a size such as 64MiB" in wrong.err
