"""The client and the command line push, list, show, pull and delete datasets, against a real registry."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import AsyncClient
from penstock.datasets import ReadOptions, read
from penstock.errors import FailedPrecondition, InvalidArgument, NotFound, PenstockError
from penstock.registry.v1 import artifact_pb2
from penstock.registry.v1 import artifact_service_pb2 as service
from penstock.transfer import Progress
from penstock_cli.__main__ import main
from penstock_kit.artifacts import files_digest
from support.registry_world import running_registry


@pytest.fixture
async def endpoint(registry_database: str, short_path: Path) -> AsyncIterator[str]:
    async with running_registry(short_path, registry_database, registry_listen="127.0.0.1:0") as running:
        yield running.app.address


@pytest.fixture
async def client(endpoint: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(endpoint) as client:
        yield client


def folder(path: Path, rows: int = 30, name: str = "toy") -> Path:
    path = path / name
    path.mkdir()
    np.savez(path / "data.npz", x=np.arange(rows * 2.0).reshape(rows, 2), y=np.arange(rows) % 3)
    return path


async def test_a_pushed_dataset_comes_back_as_it_was_with_what_it_is(
    client: AsyncClient, tmp_path: Path
) -> None:
    steps: list[Progress] = []
    source = folder(tmp_path)
    pushed = await client.push_dataset(source, license="MIT", source="a test", progress=steps.append)
    assert (pushed.name, pushed.format) == ("artifacts/toy/versions/1", "npz")
    known = pushed.description
    assert (known["task"], known["rows"], known["label"], known["license"]) == ("tabular", 30, "y", "MIT")
    assert list(known["classes"]) == ["0", "1", "2"]
    assert list(known["class_counts"]) == [10, 10, 10]
    assert {step.phase for step in steps} == {"check", "hash", "upload"}
    assert all(step.done_bytes <= step.total_bytes for step in steps)
    found = await client.pull_dataset("toy", tmp_path / "back", progress=steps.append)
    assert found == pushed == await client.get_dataset("toy:1")
    assert (tmp_path / "back/data.npz").read_bytes() == (source / "data.npz").read_bytes()
    assert found.digest == files_digest((f.path, f.size_bytes, f.sha256) for f in found.files)
    # The same again sends nothing.
    again = await client.push_dataset(source)
    assert again.name == "artifacts/toy/versions/2"
    assert again.digest == pushed.digest
    assert [each.name for each in await client.list_datasets("toy")] == [again.name, pushed.name]
    assert [each.name for each in await client.list_datasets()] == [again.name]
    # Who does not care for a version of their own gets what there is, unless something differs.
    assert (await client.push_dataset(source, license="BSD", reuse=True)).name == "artifacts/toy/versions/3"
    assert (await client.push_dataset(source, license="BSD", reuse=True)).name == "artifacts/toy/versions/3"
    assert (await client.push_dataset(source, name="fresh", reuse=True)).name == "artifacts/fresh/versions/1"
    await client.delete_dataset("fresh:1")
    await client.delete_dataset("toy:3")
    await client.delete_dataset("toy:2")
    assert (await client.get_dataset("toy")).name == pushed.name
    with pytest.raises(InvalidArgument, match="toy:NUMBER"):
        await client.delete_dataset("toy")


async def test_a_push_that_was_cut_goes_on_under_its_id(client: AsyncClient, tmp_path: Path) -> None:
    data = b"".join(b"%d,%d\n" % (row, row % 2) for row in range(300_000))
    (tmp_path / "big.csv").write_bytes(b"a,label\n" + data)
    total = (tmp_path / "big.csv").stat().st_size
    begun = asyncio.Event()

    def watch(step: Progress) -> None:
        if step.phase == "upload" and step.done_bytes > total // 3:
            begun.set()
            raise ConnectionError("cut")

    with pytest.raises((ConnectionError, PenstockError, asyncio.CancelledError)):
        await client.push_dataset(tmp_path / "big.csv", progress=watch, request_id="again")
    assert begun.is_set()
    unfinished = await client.get_dataset("big:1")
    assert unfinished.state == artifact_pb2.ARTIFACT_STATE_UPLOADING
    pushed = await client.push_dataset(tmp_path / "big.csv", request_id="again")
    assert (pushed.name, pushed.state) == (unfinished.name, artifact_pb2.ARTIFACT_STATE_READY)
    assert pushed.description["rows"] == 300_000


async def test_bad_data_never_reach_the_registry(client: AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,label\n1,x\n,y\n")
    with pytest.raises(InvalidArgument, match="row 1, column 'a' is missing"):
        await client.push_dataset(tmp_path / "bad.csv")
    with pytest.raises(NotFound):
        await client.push_dataset(tmp_path / "none.csv")
    with pytest.raises(InvalidArgument, match="give the name alone"):
        await client.push_dataset(folder(tmp_path), name="toy:3")
    assert await client.list_datasets() == []


async def test_a_name_of_another_kind_and_wrong_names_are_refused(
    client: AsyncClient, tmp_path: Path
) -> None:
    source = folder(tmp_path)
    code = artifact_pb2.ARTIFACT_KIND_CODE
    made = await client.push_artifact("toy", code, source, [source / "data.npz"])
    assert made.kind == code
    with pytest.raises(FailedPrecondition, match="is a CODE"):
        await client.push_dataset(source)
    assert [each.name for each in await client.list_datasets(kind=code)] == [made.name]
    for name in ("a b", "toy:x", "toy:0", "/etc"):
        with pytest.raises(InvalidArgument):
            await client.get_dataset(name)


async def test_chosen_columns_stay_chosen(client: AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("name,age,size,income\nann,30,1,5.5\nbob,40,2,6.5\n")
    with pytest.raises(InvalidArgument, match="'name' is 'ann', which is no number"):
        await client.push_dataset(tmp_path / "people.csv", options=ReadOptions(label="income"))
    pushed = await client.push_dataset(
        tmp_path / "people.csv", options=ReadOptions(label="income", features=("age", "size"))
    )
    assert list(pushed.description["learn_from"]) == ["age", "size"]
    assert pushed.description["target"] == "numbers"


async def cli(endpoint: str, *words: str) -> int:
    """Run the command beside the registry."""
    return await asyncio.to_thread(main, ["datasets", *words, "--endpoint", endpoint])


async def test_the_command_line_speaks_of_datasets(
    endpoint: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert await cli(endpoint) == 0
    assert "penstock datasets push" in capsys.readouterr().err
    rows = "".join(f"{row},{row * 0.5},{row % 3},class_{row % 3}\n" for row in range(178))
    (tmp_path / "wine.csv").write_text("alcohol,ash,hue,label\n" + rows)
    licence = ("--license", "CC-BY-4.0", "--label", "kind=toy")
    assert await cli(endpoint, "push", "wine.csv", *licence) == 0
    assert "Pushed wine:1 (csv, 3.3 kB): 178 rows, 3 classes, tabular." in capsys.readouterr().out
    source = str(folder(tmp_path) / "data.npz")
    assert await cli(endpoint, "push", source, "--name", "toy", "--license", "MIT", "--json") == 0
    assert json.loads(capsys.readouterr().out)["description"]["rows"] == 30
    assert await cli(endpoint, "list") == 0
    listed = capsys.readouterr().out
    assert "toy:1" in listed
    assert "wine:1" in listed
    assert "kind=toy" in listed
    assert await cli(endpoint, "wine") == 0
    shown = capsys.readouterr().out
    assert "alcohol" in shown
    assert "class_1" in shown
    assert "████" in shown
    assert "CC-BY-4.0" in shown
    assert (
        await cli(endpoint, "push", "wine.csv", "--name", "ash", "--label-column", "ash", "--feature", "hue")
        == 0
    )
    assert await cli(endpoint, "show", "ash") == 0
    assert "0 … 4.425" in capsys.readouterr().out
    assert await cli(endpoint, "push", "corpus:python-topics", "--name", "topics") == 0
    assert await cli(endpoint, "show", "topics") == 0
    shown = capsys.readouterr().out
    assert "PSF-2.0" in shown
    assert "characters in the middle" in shown
    assert await cli(endpoint, "pull", "toy") == 0
    assert read(tmp_path / "toy").rows == 30
    assert await cli(endpoint, "delete", "toy", "--yes") == 0
    assert await cli(endpoint, "show", "toy") == 3
    assert await cli(endpoint, "list", "--kind", "predictions", "--json") == 0
    capsys.readouterr()
    assert await cli(endpoint, "push", "sklearn:digit") == 3
    said = capsys.readouterr().err
    assert "sklearn:digits" in said


async def test_a_list_goes_over_pages(client: AsyncClient, tmp_path: Path) -> None:
    source = folder(tmp_path)
    for number in range(5):
        await client.push_dataset(source, name=f"d{number}")
    assert len(await client.list_datasets(limit=3)) == 3
    page = await client._artifacts.ListArtifacts(
        service.ListArtifactsRequest(parent="artifacts/-", page_size=2)
    )
    assert len(page.artifacts) == 2
    assert page.next_page_token
