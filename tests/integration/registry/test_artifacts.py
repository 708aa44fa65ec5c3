"""Datasets, checkpoints, predictions, code: announced, received, found, read back; and all that is wrong."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock.registry.v1 import artifact_pb2
from penstock.registry.v1 import artifact_service_pb2 as pb
from penstock_kit.artifacts import files_digest
from penstock_kit.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PenstockError,
    Reason,
)
from penstock_kit.rpc import open_channel
from support.artifact_caller import ArtifactCaller
from support.registry_world import Registry, running_registry, sha256, skops_bytes

READY = artifact_pb2.ARTIFACT_STATE_READY
UPLOADING = artifact_pb2.ARTIFACT_STATE_UPLOADING
CHECKPOINT = artifact_pb2.ARTIFACT_KIND_CHECKPOINT
BIG = bytes(range(256)) * 4096 * 3  # 3 MiB


@pytest.fixture
async def artifacts(registry: Registry) -> AsyncIterator[ArtifactCaller]:
    channel = open_channel(registry.app.address)
    yield ArtifactCaller(channel)
    await channel.close()


async def test_a_pushed_dataset_is_found_and_read_back(artifacts: ArtifactCaller) -> None:
    files = {"data.npz": BIG, "notes/read me.txt": b"notes", "empty": b""}
    description = {"rows": 150, "classes": ["a", "b"], "columns": [{"name": "x", "shape": [4]}], "share": 0.5}
    pushed = await artifacts.push("iris", files, description=description, labels={"team": "flowers"})
    assert pushed.name == "artifacts/iris/versions/1"
    assert pushed.state == READY
    assert pushed.size_bytes == sum(map(len, files.values()))
    assert pushed.created_by == "anonymous"
    assert pushed.digest == files_digest((path, len(data), sha256(data)) for path, data in files.items())
    for name in ("artifacts/iris", pushed.name):
        found = await artifacts.get(name)
        assert found == pushed
        assert found.description["rows"] == 150
        assert list(found.description["classes"]) == ["a", "b"]
    for path, data in files.items():
        assert await artifacts.download(pushed.name, path) == data
        assert await artifacts.download(pushed.name, path, offset=len(data) // 2) == data[len(data) // 2 :]
    assert (await artifacts.finalize(pushed.name)) == pushed


async def test_the_newest_ready_one_is_meant_without_a_number(artifacts: ArtifactCaller) -> None:
    with pytest.raises(NotFound, match="READY"):
        await artifacts.get("artifacts/iris")
    first = await artifacts.push("iris", {"data.npz": b"1"})
    second = await artifacts.push("iris", {"data.npz": b"2"})
    third = await artifacts.create("iris", {"data.npz": b"3"})
    assert third.state == UPLOADING
    assert (await artifacts.get("artifacts/iris")).name == second.name
    await artifacts.delete(second.name)
    assert (await artifacts.get("artifacts/iris")).name == first.name
    # No number comes back: lineage and caches know an artifact by its name.
    await artifacts.delete(third.name)
    assert (await artifacts.create("iris")).name == "artifacts/iris/versions/4"


async def test_artifacts_announced_at_once_are_numbered_without_gap(artifacts: ArtifactCaller) -> None:
    made = await asyncio.gather(*(artifacts.create("iris") for _ in range(12)))
    assert sorted(int(one.name.rpartition("/")[2]) for one in made) == list(range(1, 13))
    with pytest.raises(InvalidArgument):
        await artifacts.create("iris", format="xls")
    assert (await artifacts.create("iris")).name.endswith("/13")


async def test_a_name_belongs_to_one_kind_as_long_as_one_of_it_is_there(artifacts: ArtifactCaller) -> None:
    pushed = await artifacts.push("iris")
    with pytest.raises(FailedPrecondition, match="is a DATASET; choose another name for a CHECKPOINT"):
        await artifacts.create("iris", kind=CHECKPOINT, format="")
    await artifacts.delete(pushed.name)
    made = await artifacts.create("iris", kind=CHECKPOINT, format="")
    assert made.name == "artifacts/iris/versions/2"
    assert made.kind == CHECKPOINT


async def test_the_same_request_is_one_artifact(artifacts: ArtifactCaller) -> None:
    made = await asyncio.gather(*(artifacts.create(request_id="same") for _ in range(6)))
    assert {one.name for one in made} == {"artifacts/iris/versions/1"}
    with pytest.raises(InvalidArgument) as reused:
        await artifacts.create(request_id="same", labels={"a": "b"})
    assert reused.value.reason is Reason.REQUEST_ID_REUSED


async def test_contents_stored_before_are_not_sent_again(
    registry: Registry, artifacts: ArtifactCaller
) -> None:
    await artifacts.push("first", {"data.npz": BIG})
    again = await artifacts.create("second", {"other.npz": BIG})
    assert again.files[0].received_bytes == len(BIG)
    assert (await artifacts.finalize(again.name)).state == READY
    assert len([path for path in (registry.data_dir / "artifacts").rglob("*") if path.is_file()]) == 1


async def test_an_upload_that_broke_off_goes_on_in_another_process(
    registry: Registry, artifacts: ArtifactCaller, registry_database: str, short_path: Path
) -> None:
    made = await artifacts.create("iris", {"data.npz": BIG})
    await artifacts.upload(made.name, "data.npz", BIG[:1_500_000], chunk=100_000)
    with pytest.raises(FailedPrecondition, match="lacks 1 of 1 files"):
        await artifacts.finalize(made.name)
    with pytest.raises(FailedPrecondition, match="cannot be downloaded"):
        await artifacts.download(made.name, "data.npz")
    other = short_path / "other"
    other.mkdir()
    async with running_registry(other, registry_database, data_dir=registry.data_dir) as restarted:
        channel = open_channel(restarted.app.address)
        caller = ArtifactCaller(channel)
        assert (await caller.get(made.name)).files[0].received_bytes == 1_500_000
        with pytest.raises(InvalidArgument, match="beyond"):
            await caller.upload(made.name, "data.npz", BIG, offset=1_500_001)
        await caller.upload(made.name, "data.npz", BIG, offset=1_000_000)
        assert (await caller.finalize(made.name)).state == READY
        assert await caller.download(made.name, "data.npz") == BIG
        await channel.close()


async def test_wrong_bytes_are_forgotten_and_can_be_sent_again(artifacts: ArtifactCaller) -> None:
    made = await artifacts.create("iris", {"data.npz": b"right"})
    with pytest.raises(InvalidArgument, match="SHA-256"):
        await artifacts.upload(made.name, "data.npz", b"wrong")
    assert (await artifacts.get(made.name)).files[0].received_bytes == 0
    with pytest.raises(InvalidArgument, match="More bytes"):
        await artifacts.upload(made.name, "data.npz", b"right and more")
    await artifacts.upload(made.name, "data.npz", b"right")
    assert (await artifacts.finalize(made.name)).state == READY


async def test_damage_is_said_and_mended_by_pushing_again(
    registry: Registry, artifacts: ArtifactCaller
) -> None:
    pushed = await artifacts.push("iris", {"data.npz": BIG})
    blob = registry.blob(BIG)
    blob.chmod(0o600)
    blob.write_bytes(BIG[:-1] + b"!")
    with pytest.raises(DataLoss, match="artifacts/iris/versions/1"):
        await artifacts.download(pushed.name, "data.npz")
    again = await artifacts.push("iris", {"data.npz": BIG})
    assert await artifacts.download(again.name, "data.npz") == BIG
    assert await artifacts.download(pushed.name, "data.npz") == BIG


async def test_a_file_that_vanished_before_the_end_is_asked_for_again(
    registry: Registry, artifacts: ArtifactCaller
) -> None:
    made = await artifacts.create("iris", {"data.npz": BIG})
    await artifacts.upload(made.name, "data.npz", BIG)
    registry.blob(BIG).unlink()
    with pytest.raises(DataLoss, match="Push again"):
        await artifacts.finalize(made.name)
    assert (await artifacts.get(made.name)).files[0].received_bytes == 0
    await artifacts.upload(made.name, "data.npz", BIG)
    assert (await artifacts.finalize(made.name)).state == READY


async def test_lists_show_the_newest_of_each_and_no_checkpoints_unless_asked(
    artifacts: ArtifactCaller,
) -> None:
    for name in ("a", "b", "c"):
        await artifacts.push(name, {"data.npz": name.encode()})
    await artifacts.push("a", {"data.npz": b"more"})
    await artifacts.push("job-1", {"state": b"s"}, kind=CHECKPOINT, format="", job="jobs/job-1")
    newest = ["artifacts/a/versions/2", "artifacts/c/versions/1", "artifacts/b/versions/1"]
    assert await artifacts.list() == newest
    assert await artifacts.list(kind=CHECKPOINT) == ["artifacts/job-1/versions/1"]
    assert await artifacts.list("artifacts/job-1") == ["artifacts/job-1/versions/1"]
    assert await artifacts.list("artifacts/a") == ["artifacts/a/versions/2", "artifacts/a/versions/1"]
    assert await artifacts.list("artifacts/none") == []
    first = await artifacts.stub.ListArtifacts(pb.ListArtifactsRequest(parent="artifacts/-", page_size=2))
    rest = await artifacts.stub.ListArtifacts(
        pb.ListArtifactsRequest(parent="artifacts/-", page_size=2, page_token=first.next_page_token)
    )
    assert [one.name for one in [*first.artifacts, *rest.artifacts]] == newest
    assert rest.next_page_token == ""
    with pytest.raises(InvalidArgument, match="page_token"):
        await artifacts.list("artifacts/a", page_token=first.next_page_token)


async def test_what_was_deleted_is_gone_everywhere(artifacts: ArtifactCaller) -> None:
    pushed = await artifacts.push("iris")
    await artifacts.delete(pushed.name)
    for call in (artifacts.get(pushed.name), artifacts.finalize(pushed.name), artifacts.delete(pushed.name)):
        with pytest.raises(NotFound, match="penstock datasets list"):
            await call
    with pytest.raises(NotFound):
        await artifacts.download(pushed.name, "data.npz")
    assert await artifacts.list() == []


async def test_deleting_gives_back_the_space_of_what_nothing_else_needs(
    registry: Registry, artifacts: ArtifactCaller
) -> None:
    own, shared, bundled = BIG, BIG[1:], skops_bytes()
    first = await artifacts.push("a", {"own": own, "shared": shared, "bundled": bundled}, format="text")
    second = await artifacts.create("b", {"shared": shared}, format="text")
    await registry.caller.push("model", {"model.skops": bundled})
    await artifacts.delete(first.name)
    assert not registry.blob(own).exists()
    # What is only announced counts, too.
    assert registry.blob(shared).exists()
    assert registry.blob(bundled).exists()
    assert (await artifacts.finalize(second.name)).state == READY
    await artifacts.delete(second.name)
    assert not registry.blob(shared).exists()
    again = await artifacts.create("c", {"own": own}, format="text")
    assert again.files[0].received_bytes == 0
    await artifacts.upload(again.name, "own", own)
    await artifacts.finalize(again.name)
    assert await artifacts.download(again.name, "own") == own


async def test_pushing_and_deleting_the_same_contents_at_once_never_loses_any(
    artifacts: ArtifactCaller,
) -> None:
    async def cycle(name: str) -> None:
        for _ in range(6):
            pushed = await artifacts.push(name, {"data.npz": BIG})
            assert await artifacts.download(pushed.name, "data.npz", offset=len(BIG) - 9) == BIG[-9:]
            await artifacts.delete(pushed.name)

    await asyncio.gather(*(cycle(f"d{number}") for number in range(4)))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": 0}, "kind is not given"),
    ({"kind": 99}, "kind 99"),
    ({"format": "xls"}, "npz, csv, parquet, images, text"),
    ({"format": ""}, "needs a format"),
    ({"kind": CHECKPOINT}, "without a format"),
    ({"files": {"../x": b"1"}}, r"'\.\.'"),
    ({"files": {"a": b"1", "a/b": b"2"}}, "both a file and a folder"),
    ({"name": "no/slash"}, "artifacts"),
    ({"name": "-"}, "not a valid name"),
    ({"name": "x" * 64}, "not a valid name"),
    ({"labels": {"": "x"}}, "labels"),
    ({"job": "job-1"}, "jobs/"),
    ({"description": {"text": "x" * (1 << 20)}}, "description is longer"),
    ({"description": {"text": "a\x00b"}}, "NUL"),
    ({"description": {"rows": float("nan")}}, "not finite"),
]


async def test_what_breaks_a_rule_is_refused_with_the_rule(artifacts: ArtifactCaller) -> None:
    for fields, words in WRONG:
        with pytest.raises(InvalidArgument, match=words):
            await artifacts.create(**fields)
    assert await artifacts.list() == []


async def test_wrong_files_and_calls_are_refused(artifacts: ArtifactCaller) -> None:
    made = await artifacts.create("iris", {"data.npz": b"data"})
    with pytest.raises(NotFound, match="no file 'other'"):
        await artifacts.upload(made.name, "other", b"x")
    with pytest.raises(InvalidArgument, match="offset is -1"):
        await artifacts.upload_parts(made.name, "data.npz", [b"data"], offset=-1)
    with pytest.raises(PenstockError) as large:
        await artifacts.upload_parts(made.name, "data.npz", [bytes((1 << 20) + 1)])
    assert large.value.reason is Reason.PAYLOAD_TOO_LARGE
    with pytest.raises(InvalidArgument, match="first message"):

        async def headless() -> AsyncIterator[pb.UploadFileRequest]:
            yield pb.UploadFileRequest(chunk=b"data")

        await artifacts.stub.UploadFile(headless())
    await artifacts.upload(made.name, "data.npz", b"data")
    await artifacts.finalize(made.name)
    with pytest.raises(OutOfRange):
        await artifacts.download(made.name, "data.npz", offset=5)
    for name in ("artifacts/iris/versions/0", "artifacts/iris/versions/x", "models/iris", "artifacts/"):
        with pytest.raises(InvalidArgument):
            await artifacts.get(name)
    with pytest.raises(NotFound, match="artifacts/iris/versions/2"):
        await artifacts.get("artifacts/iris/versions/2")


async def test_a_thousand_files_are_one_artifact(artifacts: ArtifactCaller) -> None:
    files = {f"class-{number % 10}/{number}.png": b"" for number in range(999)}
    files["class-0/real.png"] = os.urandom(64)
    pushed = await artifacts.push("folder", files, format="images")
    assert pushed.state == READY
    assert len(pushed.files) == 1000
