"""`penstock lineage`, profiles in `penstock show`, `penstock alias set --force`, against the real stubs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.errors import FailedPrecondition, Reason
from penstock.registry.v1 import gate_pb2, manifest_pb2, model_pb2, version_pb2
from penstock.registry.v1 import registry_service_pb2 as registry
from penstock_cli.__main__ import main
from support.fake_mesh import FakeMesh

READY = version_pb2.VERSION_STATE_READY


def version(number: int, parents: tuple[int, ...] = (), **lineage: Any) -> version_pb2.Version:
    return version_pb2.Version(
        name=f"models/digits/versions/{number}",
        number=number,
        state=READY,
        size_bytes=1000 * number,
        manifest=manifest_pb2.Manifest(
            runtime="torch",
            format="pt2",
            metrics={"accuracy": 0.97},
            lineage=manifest_pb2.Lineage(
                parents=[f"models/digits/versions/{parent}" for parent in parents], **lineage
            ),
        ),
    )


class LineageMesh(FakeMesh):
    """Versions 1 → 2 → 4 and 1 → 3 → 4; 4 failed its gate; 5 was made of 4."""

    def __init__(self) -> None:
        super().__init__()
        made = [
            version(1, operation="train", job="jobs/t", datasets=["artifacts/digits/versions/2"], seed=7),
            version(2, (1,), operation="compress", job="jobs/c"),
            version(3, (1,), operation="convert", parameters={"format": "onnx"}),
            version(4, (2, 3), operation="compress"),
            version(5, (4,), operation="convert"),
        ]
        made[3].manifest.gate.CopyFrom(
            gate_pb2.GateVerdict(failures=["the speed-up is 1.1, less than 2"], measured={"speed_up": 1.1})
        )
        made[0].profiles.add(
            device="EPYC",
            points=[
                version_pb2.ProfilePoint(
                    batch_size=8, p50_seconds=0.002, p99_seconds=0.004, rows_per_second=4000
                )
            ],
            load_seconds=0.25,
            memory_bytes=50_000_000,
        )
        self.versions.update({each.name: each for each in made})
        self.models["models/digits"] = model_pb2.Model(name="models/digits", latest_version=5)

    def GetLineage(self, request: Any, context: Any) -> registry.GetLineageResponse:
        assert request.name == "models/digits/versions/4"
        by_number = {each.number: each for each in self.versions.values()}
        return registry.GetLineageResponse(
            ancestors=[by_number[number] for number in (3, 2, 1)], descendants=[by_number[5]]
        )

    def SetAlias(self, request: Any, context: Any) -> model_pb2.Alias:
        if request.version == 4 and not request.force:
            raise FailedPrecondition("It did not pass its gate.", reason=Reason.GATE_FAILED)
        return super().SetAlias(request, context)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[LineageMesh]:
    with LineageMesh() as mesh:
        monkeypatch.setenv("PENSTOCK_ENDPOINT", mesh.address)
        yield mesh


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_tree_has_what_made_each_version_and_what_was_made_of_it(
    mesh: LineageMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "lineage", "digits:4")
    assert code == 0
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "digits:4  compress  pt2, 4.0 kB  accuracy=0.97"
    assert lines[1].endswith("gate failed: the speed-up is 1.1, less than 2 (speed_up=1.1)")
    text = "\n".join(lines)
    for part in ("job jobs/t", "dataset digits:2", "seed 7", "parameters format=onnx", "as above"):
        assert part in text
    # Two generations deep, and behind them what was made of it.
    assert text.index("digits:2") < text.index("digits:1") < text.index("digits:3")
    assert lines[-2].endswith("made from it")
    assert lines[-1].endswith("digits:5  convert  pt2, 5.0 kB  accuracy=0.97")


def test_scripts_get_the_lineage_as_json(mesh: LineageMesh, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "lineage", "digits:4", "--json")
    found = json.loads(out)
    assert found["version"]["name"] == "models/digits/versions/4"
    assert [each["number"] for each in found["ancestors"]] == [3, 2, 1]
    assert [each["number"] for each in found["descendants"]] == [5]


def test_a_version_is_shown_with_its_profiles_and_its_gate(
    mesh: LineageMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "show", "digits:1")
    assert "On EPYC: 50.0 MB of memory, ready after 0.25 s" in out
    lines = out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("On EPYC"))
    heading, row = lines[at + 1 : at + 3]
    assert heading.split() == ["ROWS", "MEDIAN", "MS", "P99", "MS", "ROWS/S"]
    assert row.split() == ["8", "2", "4", "4,000"]
    _, out, _ = run(capsys, "show", "digits:4")
    assert "failed: the speed-up is 1.1, less than 2" in out
    _, out, _ = run(capsys, "versions", "digits")
    (failed,) = [line for line in out.splitlines() if "failed" in line]
    assert failed.startswith("digits:4")


def test_an_alias_moves_to_a_version_that_failed_only_by_force(
    mesh: LineageMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "alias", "set", "digits", "champion", "4")
    assert code != 0
    assert "did not pass its gate" in err
    code, out, _ = run(capsys, "alias", "set", "digits", "champion", "4", "--force")
    assert code == 0
    assert "digits@champion is version 4 now." in out
