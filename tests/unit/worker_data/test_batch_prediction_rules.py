"""What a batch prediction may ask for, and how its answers are kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.datasets import Contents
from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import Internal, InvalidArgument
from penstock_kit.jobs import check
from penstock_kit.routing.model import Tensor
from penstock_worker.adapters.batch_predict.answers import ChunkAnswers
from penstock_worker.adapters.batch_predict.inputs import find_sources
from penstock_worker.adapters.batch_predict.job import encoder_of
from penstock_worker.adapters.jobs.host import HostPolicy, TaskHost
from penstock_worker.adapters.training.architectures import Blueprint
from penstock_worker.adapters.training.texts import make_tokenizer
from penstock_worker.domain.task import DesiredTask
from penstock_worker.usecases.job_context import JobContext, JobFailure

WORK = {"deployment": "deployments/d", "dataset": "artifacts/a/versions/1", "artifact": "artifacts/b"}


def test_what_has_all_it_needs_is_taken() -> None:
    check(job_pb2.Job(batch_predict={**WORK, "inputs": {"x": "pixels"}, "request_rows": 1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deployment": ""}, "deployment is required"),
        ({"deployment": "d"}, "deployments/"),
        ({"dataset": ""}, "dataset is required"),
        ({"artifact": ""}, "artifact is required"),
        ({"artifact": "artifacts/b/versions/1"}, "artifacts/"),
        ({"request_rows": -1}, "request_rows is -1"),
        ({"concurrency": 257}, "concurrency is 257"),
        ({"chunk_rows": 2**31 - 1}, "chunk_rows"),
        ({"inputs": {"x": ""}}, "inputs"),
    ],
)
def test_what_no_worker_could_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check(job_pb2.Job(batch_predict={**WORK, **changes}))


def answers(*outputs: Tensor) -> ChunkAnswers:
    return ChunkAnswers(10, 14, outputs, "models/m/versions/2")


def test_answers_of_every_shape_and_type_are_kept_in_order(tmp_path: Path) -> None:
    chunk = answers(
        Tensor("label", "BYTES", (-1,)), Tensor("scores", "FP32", (-1, 2, 3)), Tensor("index", "INT64", (-1,))
    )
    scores = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
    chunk.put(
        12, 14, {"label": np.array([b"c", b"d"], object), "scores": scores[1:], "index": np.array([3, 4])}
    )
    chunk.refuse(11, 12, "INTERNAL: no")
    chunk.put(10, 11, {"label": np.array([b"a"], object), "scores": scores[:1], "index": np.array([1])})
    chunk.write(tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    assert table["index"].to_pylist() == [10, 11, 12, 13]
    assert table["label"].to_pylist() == [b"a", None, b"c", b"d"]
    assert table["scores"].to_pylist() == [scores[0].tolist(), None, scores[1].tolist(), scores[2].tolist()]
    assert table["output.index"].to_pylist() == [1, None, 3, 4]
    assert table["error"].to_pylist() == [None, "INTERNAL: no", None, None]
    assert table.schema.field("scores").type == pa.list_(pa.list_(pa.float32(), 3), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["c.parquet"]
    assert chunk.failed == 1


def test_answers_that_are_not_a_row_each_are_the_models_fault(tmp_path: Path) -> None:
    chunk = answers(Tensor("y", "FP32", (-1, -1)))
    for wrong in ({}, {"y": np.zeros((3, 1), np.float32)}, {"y": np.array(1.0)}):
        with pytest.raises(Internal, match="y"):
            chunk.put(10, 12, wrong)
    chunk.put(10, 12, {"y": np.zeros((2, 1), np.float32)})
    chunk.put(12, 14, {"y": np.zeros((2, 2), np.float32)})
    with pytest.raises(Internal, match="different shapes"):
        chunk.write(tmp_path / "c.parquet")


def test_a_chunk_without_any_answer_is_kept_too(tmp_path: Path) -> None:
    chunk = answers(Tensor("y", "BF16", (-1, 2)))
    chunk.refuse(10, 14, "no")
    chunk.write(tmp_path / "c.parquet")
    assert pq.read_table(tmp_path / "c.parquet")["y"].to_pylist() == [None] * 4


class Forks:
    """Notes what a launcher would be told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    async def start_program(self, name: str, entry: str, config: str, **_: Any) -> Any:
        self.told = json.loads(config)


class Devices:
    def confine(self, devices: Any) -> tuple[dict[str, str], tuple[str, ...]]:
        return {}, ()


@pytest.mark.parametrize(("kind", "told"), [("batch_predict", True), ("train", False), ("evaluate", False)])
async def test_only_predictions_are_told_where_the_queues_are(tmp_path: Path, kind: str, told: bool) -> None:
    forks = Forks()
    policy = HostPolicy(redis_url="redis://:secret@queues:6379", scheduler_address="scheduler:7102")
    host = TaskHost(
        forks=cast("Any", forks),
        desk=cast("Any", SimpleNamespace(path="desk.sock")),
        rooms=cast("Any", None),
        sender=cast("Any", None),
        registry=cast("Any", None),
        bundles=cast("Any", None),
        devices=cast("Any", Devices()),
        entries={kind: "module:run"},
        policy=policy,
    )
    desired = DesiredTask(
        name="jobs/a/tasks/0",
        job="a",
        number=0,
        attempt=1,
        index=0,
        tasks=1,
        least_tasks=1,
        ranks=1,
        kind=kind,
        spec=b"",
        cpu_millis=500,
        memory_bytes=1,
        devices=("cpu",),
    )
    await host.launch(desired, tmp_path, "token", lambda: None)
    assert ("secret" in json.dumps(forks.told)) == told
    assert ("scheduler:7102" in json.dumps(forks.told)) == told


def texts(*rows: str) -> Contents:
    return Contents("text", len(rows), texts=rows, columns=({"name": "text"},))


def test_texts_become_ids_of_tokens_for_a_model_whose_bundle_says_how(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", 0, [])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    Blueprint("text", "bag", {"length": 3}, 2, (("tokens", (-1,)),), ("a", "b")).save(tmp_path)
    context = cast("JobContext", SimpleNamespace(version=lambda name: SimpleNamespace(path=tmp_path / name)))
    model = Tensor("tokens", "INT64", (-1, -1))
    (source,) = find_sources([model], texts("ab", "abcd"), {}, lambda: encoder_of(context, "."))
    taken = source.take(0, 2).array("tokens")
    assert taken.shape == (2, 3), "the longest row, at most `length` tokens"
    assert tokenizer.decode(taken[1].tolist()) == "abc"
    assert taken[0, 2] == 0
    (tmp_path / "other").mkdir()
    with pytest.raises(JobFailure, match="takes INT64, and the column is text"):
        find_sources([model], texts("ab"), {}, lambda: encoder_of(context, "other"))
