"""Both clients against a server of the real stubs on a real socket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from penstock import AsyncClient, Client
from penstock.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from penstock.scheduler.v1 import deployment_pb2
from penstock.tensors import Priority
from penstock.transfer import Progress
from support.fake_mesh import FakeMesh

SOURCE = 'INPUTS = ["x:FP32:-1,2"]\nOUTPUTS = ["y:FP32:-1,2"]\n'


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with FakeMesh() as mesh:
        yield mesh


@pytest.fixture
def client(mesh: FakeMesh) -> Iterator[Client]:
    with Client(mesh.address, timeout=10.0, retry_seconds=5.0) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of four files, one of several chunks."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "model.py").write_text(SOURCE)
    (folder / "weights.bin").write_bytes(os.urandom(3_500_000))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "vocabulary.txt").write_text("a b c")
    return folder


def deployed(client: Client, folder: Path) -> None:
    client.push(folder)
    client.deploy("digits")


class TestPush:
    def test_every_file_arrives_and_the_alias_is_set(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        seen: list[Progress] = []
        version = client.push(folder, alias="champion", labels={"a": "b"}, progress=seen.append)
        assert (version.name, version.state) == ("models/digits/versions/1", 2)
        assert mesh.received[version.name, "weights.bin"] == (folder / "weights.bin").read_bytes()
        assert client.get_version("digits@champion").number == 1
        for phase in ("hash", "upload"):
            last = [step for step in seen if step.phase == phase][-1]
            assert last.done_bytes == last.total_bytes == version.size_bytes

    def test_what_the_registry_holds_is_not_sent_again(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        client.push(folder)
        sent = mesh.calls["UploadArtifact"]
        (folder / "sub" / "vocabulary.txt").write_text("a b c d")
        assert client.push(folder).number == 2
        assert mesh.calls["UploadArtifact"] == sent + 1

    def test_an_upload_that_is_cut_goes_on_where_it_stopped(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        mesh.cut_uploads_after = 2_000_000
        version = client.push(folder)
        assert mesh.received[version.name, "weights.bin"] == (folder / "weights.bin").read_bytes()
        assert version.state == 2

    def test_the_same_request_id_gives_the_same_version(self, client: Client, folder: Path) -> None:
        first = client.push(folder, request_id="one")
        assert client.push(folder, request_id="one").name == first.name

    def test_an_answer_that_was_lost_makes_no_second_version(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        mesh.fail("CreateVersion", Unavailable("lost"), grpc.StatusCode.UNAVAILABLE)
        assert client.push(folder).number == 1
        assert mesh.calls["CreateVersion"] == 3

    def test_no_room_is_told_at_once(self, client: Client, mesh: FakeMesh, folder: Path) -> None:
        full = ResourceExhausted("No space left.", reason=Reason.STORAGE_FULL)
        mesh.fail("UploadArtifact", full, full, full)
        with pytest.raises(ResourceExhausted, match="No space left") as caught:
            client.push(folder)
        assert caught.value.reason is Reason.STORAGE_FULL

    def test_a_download_brings_the_same_bytes_and_a_manifest(
        self, client: Client, folder: Path, tmp_path: Path
    ) -> None:
        client.push(folder)
        client.download("digits:1", tmp_path / "back")
        for path in ("model.py", "weights.bin", "empty.txt", "sub/vocabulary.txt"):
            assert (tmp_path / "back" / path).read_bytes() == (folder / path).read_bytes()
        assert client.push(tmp_path / "back", model="digits").manifest.entrypoint == "model.py"

    def test_a_download_that_was_cut_goes_on_where_it_stopped(
        self, client: Client, mesh: FakeMesh, folder: Path, tmp_path: Path
    ) -> None:
        client.push(folder)
        (tmp_path / "back").mkdir()
        whole = (folder / "weights.bin").read_bytes()
        (tmp_path / "back" / "weights.bin.part").write_bytes(whole[:2_000_000])
        mesh.fail("DownloadArtifact", grpc.StatusCode.UNAVAILABLE)
        client.download("digits:1", tmp_path / "back")
        assert (tmp_path / "back" / "weights.bin").read_bytes() == whole

    def test_bytes_that_were_changed_on_the_way_are_noticed(
        self, client: Client, mesh: FakeMesh, folder: Path, tmp_path: Path
    ) -> None:
        client.push(folder)
        mesh.corrupt_downloads = True
        with pytest.raises(DataLoss, match="another SHA-256"):
            client.download("digits:1", tmp_path / "back")
        assert not (tmp_path / "back" / "weights.bin").exists()


class TestDeployments:
    def test_a_model_without_a_number_is_pinned_to_its_newest_version(
        self, client: Client, folder: Path
    ) -> None:
        client.push(folder)
        client.push(folder)
        deployment = client.deploy("shop", "digits")
        assert [(each.model, each.version) for each in deployment.targets] == [("models/digits", 2)]

    def test_an_alias_is_followed(self, client: Client, folder: Path) -> None:
        client.push(folder, alias="champion")
        assert client.deploy("digits", "digits@champion").targets[0].alias == "champion"

    def test_deploying_again_updates_what_is_given_only(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        client.push(folder)
        client.deploy("digits", replicas=3)
        assert client.deploy("digits", "digits:1").revision == 2
        assert list(mesh.requests["UpdateDeployment"].update_mask.paths) == ["targets"]
        assert client.get_deployment("digits").replicas == 3

    def test_each_part_of_the_autoscaling_is_set_alone(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        client.push(folder, model="digits")
        made = client.deploy("digits", autoscaling={"max_replicas": 4, "queue_wait_objective": 0.05})
        assert (made.autoscaling.min_replicas, made.autoscaling.max_replicas) == (1, 4)
        assert made.autoscaling.queue_wait_objective.nanos == 50_000_000
        made = client.deploy("digits", autoscaling={"min_replicas": 0})
        assert (made.autoscaling.min_replicas, made.autoscaling.max_replicas) == (0, 4)
        paths = list(mesh.requests["UpdateDeployment"].update_mask.paths)
        assert paths == ["targets", "autoscaling.min_replicas"]
        assert not client.deploy("digits", autoscaling={}).HasField("autoscaling")
        for wrong in ({"replicas": 3}, {"max_replicas": 1e30}, {"idle": float("inf")}):
            with pytest.raises(InvalidArgument):
                client.deploy("digits", autoscaling=wrong)

    def test_each_part_of_the_cache_is_set_alone(self, client: Client, mesh: FakeMesh, folder: Path) -> None:
        client.push(folder)
        made = client.deploy("digits", cache=True, cache_ttl=0.5, cache_bytes=4096)
        assert (made.cache.enabled, made.cache.ttl.nanos, made.cache.max_bytes) == (True, 500_000_000, 4096)
        client.deploy("digits", coalesce=True)
        assert list(mesh.requests["UpdateDeployment"].update_mask.paths) == ["targets", "cache.coalesce"]
        cache = client.set_cache("digits", False, ttl=3).cache
        assert (cache.enabled, cache.coalesce, cache.ttl.seconds, cache.max_bytes) == (False, True, 3, 4096)
        with pytest.raises(InvalidArgument, match="what of the cache"):
            client.set_cache("digits")
        with pytest.raises(InvalidArgument, match="inf s"):
            client.set_cache("digits", ttl=float("inf"))

    def test_traffic_is_shared_and_rolled_back(self, client: Client, folder: Path) -> None:
        deployed(client, folder)
        client.push(folder)
        shared = client.set_traffic("digits", {1: 90, "v2": 10})
        assert [(each.version, each.weight) for each in shared.targets] == [(1, 90), (2, 10)]
        assert [each.weight for each in client.rollback("digits").targets] == [100]

    @pytest.mark.parametrize("traffic", [{}, {1: 50}, {1: 60, 2: 60}, {1: -10, 2: 110}])
    def test_shares_that_are_no_hundred_are_refused_before_anything_is_sent(
        self, client: Client, mesh: FakeMesh, folder: Path, traffic: dict[str | int, int]
    ) -> None:
        deployed(client, folder)
        with pytest.raises(InvalidArgument):
            client.set_traffic("digits", traffic)
        assert mesh.calls["UpdateDeployment"] == 0

    def test_waiting_ends_when_it_is_ready(self, client: Client, folder: Path) -> None:
        deployed(client, folder)
        seen: list[int] = []
        ready = client.wait_for_deployment("digits", on_change=lambda each: seen.append(each.state))
        assert ready.ready_replicas == 1
        assert seen == [deployment_pb2.DEPLOYMENT_STATE_PENDING, deployment_pb2.DEPLOYMENT_STATE_READY]

    def test_waiting_ends_with_the_reason_when_it_fails(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        mesh.final_state = deployment_pb2.DEPLOYMENT_STATE_FAILED
        with pytest.raises(FailedPrecondition, match="digits failed: no node has room"):
            client.wait_for_deployment("digits")

    def test_waiting_too_long_says_where_it_stands(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        mesh.final_state = deployment_pb2.DEPLOYMENT_STATE_PENDING
        with pytest.raises(DeadlineExceeded, match=r"PENDING, 0 replicas ready\. no node has room"):
            client.wait_for_deployment("digits", timeout=0.3)

    def test_a_watch_that_breaks_is_taken_up_again(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        mesh.fail("WatchDeployment", grpc.StatusCode.UNAVAILABLE)
        assert client.wait_for_deployment("digits").ready_replicas == 1

    def test_a_delete_whose_answer_was_lost_is_done(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        mesh.fail("DeleteDeployment", grpc.StatusCode.UNAVAILABLE, NotFound("gone already"))
        client.undeploy("digits")

    def test_deleting_what_never_was_is_told(self, client: Client) -> None:
        with pytest.raises(NotFound):
            client.undeploy("digits")

    def test_a_rollback_is_never_tried_twice(self, client: Client, mesh: FakeMesh, folder: Path) -> None:
        deployed(client, folder)
        mesh.fail("RollbackDeployment", grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(Unavailable):
            client.rollback("digits")
        assert mesh.calls["RollbackDeployment"] == 1


class TestPredict:
    def test_a_bare_list_takes_name_and_type_of_the_signature(self, client: Client, folder: Path) -> None:
        deployed(client, folder)
        prediction = client.predict("digits", [[1, 2], [3, 4]])
        np.testing.assert_array_equal(prediction["x"], np.float32([[1, 2], [3, 4]]))
        assert prediction.only.dtype == np.float32
        assert prediction.model_version == "1"

    def test_a_dict_of_arrays_is_sent_as_it_is_without_a_question(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        prediction = client.predict("digits", {"q": np.array([[1]], dtype=np.int8)}, version="champion")
        assert prediction["q"].dtype == np.int8
        assert mesh.calls["ModelMetadata"] == 0
        assert mesh.requests["ModelInfer"].model_version == "champion"

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            ([["a", "b"]], "takes FP32"),
            ([[1], [2, 3]], "not a regular array"),
            ({"z": [[1, 2]]}, "has no input z; it takes x"),
        ],
    )
    def test_inputs_that_cannot_be_right_are_told_before_they_are_sent(
        self, client: Client, mesh: FakeMesh, folder: Path, inputs: object, words: str
    ) -> None:
        deployed(client, folder)
        with pytest.raises(InvalidArgument, match=words):
            client.predict("digits", inputs)  # type: ignore[arg-type]
        assert mesh.calls["ModelInfer"] == 0

    def test_no_replica_for_a_moment_is_waited_for(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        mesh.fail("ModelInfer", *[Unavailable("none ready", reason=Reason.NOT_READY)] * 3)
        client.predict("digits", [[1, 2]])
        assert mesh.calls["ModelInfer"] == 4

    def test_a_full_queue_is_told_at_once_with_the_delay(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        mesh.fail("ModelInfer", ResourceExhausted("full", retry_after_seconds=1.5))
        with pytest.raises(ResourceExhausted) as caught:
            client.predict("digits", [[1, 2]])
        assert caught.value.retry_after_seconds == 1.5

    @pytest.mark.parametrize(("priority", "rank"), [("high", 1), ("normal", None), ("low", 3)])
    def test_the_priority_travels_as_other_clients_send_it(
        self, client: Client, mesh: FakeMesh, folder: Path, priority: Priority, rank: int | None
    ) -> None:
        deployed(client, folder)
        client.predict("digits", [[1, 2]], priority=priority)
        parameters = mesh.requests["ModelInfer"].parameters
        assert (parameters["priority"].int64_param if rank else len(parameters)) == (rank or 0)

    def test_a_priority_that_is_none_is_told_before_it_is_sent(
        self, client: Client, mesh: FakeMesh, folder: Path
    ) -> None:
        deployed(client, folder)
        with pytest.raises(InvalidArgument, match="high, normal, low"):
            client.predict("digits", [[1, 2]], priority="urgent")  # type: ignore[arg-type]
        assert mesh.calls["ModelInfer"] == 0

    def test_retries_end_with_the_callers_time(self, client: Client, mesh: FakeMesh, folder: Path) -> None:
        deployed(client, folder)
        mesh.fail("ModelInfer", *[Unavailable("none ready")] * 100)
        with pytest.raises(Unavailable, match="none ready"):
            client.predict("digits", np.zeros((1, 2)), timeout=0.4)

    def test_no_answer_in_time_is_told_in_words(self, client: Client, mesh: FakeMesh, folder: Path) -> None:
        deployed(client, folder)
        mesh.delay_seconds = 1.0
        with pytest.raises(DeadlineExceeded, match=r"No answer within 0\.2 s"):
            client.predict("digits", [[1, 2]], timeout=0.2)

    def test_an_unknown_deployment_is_not_found(self, client: Client) -> None:
        with pytest.raises(NotFound) as caught:
            client.predict("digits", [[1, 2]])
        assert caught.value.metadata == {"deployment": "digits"}


class TestCalls:
    def test_lists_go_through_all_pages(self, client: Client) -> None:
        for number in range(5):
            client.create_model(f"m{number}")
        assert [model.name for model in client.list_models()] == [f"models/m{number}" for number in range(5)]
        assert len(client.list_models(limit=3)) == 3

    def test_a_conflict_comes_back_as_aborted(self, client: Client, mesh: FakeMesh, folder: Path) -> None:
        client.push(folder)
        mesh.fail("SetAlias", Aborted("somebody moved it"))
        with pytest.raises(Aborted, match="somebody moved it"):
            client.set_alias("digits", "champion", 1, expected=0)

    def test_nobody_there_is_told_with_what_to_do(self) -> None:
        with (
            Client("127.0.0.1:1", retry_seconds=0.2) as client,
            pytest.raises(Unavailable, match="penstock up"),
        ):
            client.list_models()

    def test_a_mesh_whose_database_is_away_is_not_taken_for_none(
        self, client: Client, mesh: FakeMesh
    ) -> None:
        mesh.fail("ListModels", *[Unavailable("The database cannot be reached (connection refused).")] * 100)
        with pytest.raises(Unavailable, match="The database cannot be reached"):
            client.list_models()

    @pytest.mark.parametrize(
        "endpoint", ["", "here", "localhost", ":80", "localhost:http", "https://a:1", "a:99999"]
    )
    def test_what_is_no_address_is_refused(self, endpoint: str) -> None:
        with pytest.raises(InvalidArgument):
            Client(endpoint)

    @pytest.mark.parametrize(
        "name", ["", "a b", "a/b", "-a", "a" * 64, "models/a/versions/0", "a:0", "a:x", "a@"]
    )
    def test_what_is_no_name_is_refused_before_it_is_sent(
        self, client: Client, mesh: FakeMesh, name: str
    ) -> None:
        with pytest.raises(InvalidArgument):
            client.get_version(name)
        assert not mesh.calls

    def test_ready_is_asked_and_waited_for(self, client: Client, folder: Path) -> None:
        client.wait_ready()
        assert client.is_ready()
        with pytest.raises(DeadlineExceeded, match=r"digits is not ready after .* no such deployment\."):
            client.wait_ready("digits", timeout=0.1)
        deployed(client, folder)
        client.wait_ready("digits")


async def test_the_asyncio_client_does_the_same(mesh: FakeMesh, folder: Path, tmp_path: Path) -> None:
    mesh.cut_uploads_after = 2_000_000
    async with AsyncClient(mesh.address, retry_seconds=5.0) as client:
        version = await client.push(folder, alias="champion")
        assert mesh.received[version.name, "weights.bin"] == (folder / "weights.bin").read_bytes()
        deployment = await client.deploy("digits", "digits@champion")
        await client.wait_for_deployment("digits", revision=deployment.revision)
        mesh.fail("ModelInfer", Unavailable("none ready"))
        prediction = await client.predict("digits", [[1, 2]])
        np.testing.assert_array_equal(prediction.only, np.float32([[1, 2]]))
        assert len(await client.list_models()) == 1
        await client.download("digits:1", tmp_path / "back")
        assert (tmp_path / "back" / "model.py").read_text() == SOURCE
        with pytest.raises(NotFound):
            await client.get_model("nothing")
        mesh.fail("UploadArtifact", ResourceExhausted("full", reason=Reason.STORAGE_FULL))
        (folder / "more.txt").write_text("more")
        with pytest.raises(ResourceExhausted):
            await client.push(folder)
