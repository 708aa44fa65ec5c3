"""`penstock nodes`: what operators say of nodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from penstock_cli.__main__ import main
from support.fake_mesh import FakeMesh

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with FakeMesh() as mesh:
        yield mesh


@pytest.fixture
def penstock(mesh: FakeMesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process; its exit status, output and errors."""
    monkeypatch.setenv("PENSTOCK_ENDPOINT", mesh.address)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_node_is_cordoned_and_taken_back(penstock: Run, mesh: FakeMesh) -> None:
    code, out, _ = penstock("nodes", "cordon", "worker-1")
    assert code == 0
    assert "takes nothing new" in out
    assert "READY, cordoned" in penstock("nodes")[1]
    assert "takes replicas again" in penstock("nodes", "uncordon", "worker-1")[1]
    assert not mesh.node.cordoned


def test_a_drain_ends_when_nothing_is_left(penstock: Run, mesh: FakeMesh) -> None:
    code, out, _ = penstock("nodes", "drain", "worker-1", "--timeout", "20")
    assert code == 0
    assert "is empty" in out
    assert "READY, draining" in penstock("nodes", "show", "worker-1")[1]
    mesh.node.draining = False
    assert "is being drained" in penstock("nodes", "drain", "worker-1", "--no-wait")[1]


def test_taints_come_and_go_one_by_one(penstock: Run, mesh: FakeMesh) -> None:
    assert penstock("nodes", "taint", "worker-1", "dedicated=research", "gpu")[0] == 0
    assert penstock("nodes", "taint", "worker-1", "dedicated=production")[0] == 0
    assert {taint.key: taint.value for taint in mesh.node.taints} == {"dedicated": "production", "gpu": ""}
    assert "dedicated=production" in penstock("nodes", "show", "worker-1")[1]
    code, out, _ = penstock("nodes", "untaint", "worker-1", "dedicated", "--json")
    assert code == 0
    assert json.loads(out)["taints"] == [{"key": "gpu"}]
    code, _, errors = penstock("nodes", "untaint", "worker-1", "dedicated")
    assert code == 2
    assert "has no taint dedicated; it has gpu" in errors


def test_a_node_that_is_not_there_is_said_so(penstock: Run) -> None:
    for words in (("cordon",), ("uncordon",), ("drain",)):
        code, _, errors = penstock("nodes", *words, "nowhere")
        assert code == 3
        assert "nowhere" in errors
