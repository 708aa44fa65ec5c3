"""A dataset through a deployment: between a scripted replica, a scheduler's routes and a real Redis."""

import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from penstock.queue.v1 import envelope_pb2 as envelope
from penstock_kit.errors import Code, Reason
from penstock_kit.queue.keys import PRIORITY_LOW, queue_name, streams
from penstock_kit.queue.messages import Request
from penstock_worker.adapters.batch_predict import caller
from penstock_worker.adapters.batch_predict import job as batch
from penstock_worker.usecases.job_context import JobFailure, Stopped
from support.batch_prediction import answer, answers_of, prediction, rows_of, start, write_rows
from support.gateway_world import DIGEST, Answer, Replica, World, wait_until
from support.job_context import FileJobContext

_numbers = itertools.count(1)


class Stage:
    """A deployment `toy`, and jobs that send it rows."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.redis_url = redis_url
        self.folder = folder
        self.world = World(folder).start()
        self.world.offer("toy", max_batch_size=0)
        self.replica = self.serve(1)

    def serve(self, version: int) -> Replica:
        made = Replica(self.redis_url, queue_name("toy", version, DIGEST), version)
        made.behave = answer
        return made

    def job(self, rows: int, **fields: Any) -> FileJobContext:
        data = write_rows(self.folder / f"data-{rows}", rows)
        name = f"test-job-{next(_numbers)}"
        root = fields.pop("root", self.folder / name)
        return prediction(root, data, self.redis_url, self.world.address, name, **fields)

    def close(self) -> None:
        self.replica.stop()
        self.world.stop()


@pytest.fixture
def stage(short_path: Path, redis_url: str) -> Iterator[Stage]:
    made = Stage(short_path, redis_url)
    yield made
    made.close()


def check(context: FileJobContext, rows: int, failed: tuple[int, ...] = ()) -> None:
    """Each row is there once, in order, with its own answer."""
    table = answers_of(context)
    assert table["index"].to_pylist() == list(range(rows))
    for row, (y, error) in enumerate(zip(table["y"].to_pylist(), table["error"].to_pylist(), strict=True)):
        assert (y is None) == (error is not None) == (row in failed)
        if y is not None:
            assert y == [2.0 * row, -2.0 * row]


def test_every_row_is_answered_once_in_order_at_low_priority(stage: Stage) -> None:
    context = stage.job(300, request_rows=16, chunk_rows=128, concurrency=4)
    batch.run(context)
    check(context, 300)
    low = streams(queue_name("toy", 1, DIGEST))[PRIORITY_LOW]
    assert {request.stream for request in stage.replica.seen} == {low}
    assert max(len(rows_of(request)) for request in stage.replica.seen) == 16
    found = context.found()
    assert (found["rows"], found["retried"], found["failed"]) == (300, 0, 0)
    assert found["rows_per_second"] > 0
    assert found["versions"] == {"models/toy/versions/1": 300}
    assert set(answers_of(context)["version"].to_pylist()) == {"models/toy/versions/1"}
    assert context.lines("progress")[-1]["done"] == 300
    (made,) = context.lines("artifacts")
    assert (made["name"], made["format"]) == ("artifacts/answers/versions/1", "parquet")


def test_no_more_requests_wait_than_the_job_may_have(stage: Stage) -> None:
    gate = threading.Event()

    def slow(request: Request) -> Answer:
        gate.wait(10)
        return answer(request)

    stage.replica.behave = slow
    context = stage.job(200, request_rows=4, concurrency=3)
    thread = threading.Thread(target=batch.run, args=(context,))
    thread.start()
    client = redis.Redis.from_url(stage.redis_url)
    low = streams(queue_name("toy", 1, DIGEST))[PRIORITY_LOW]
    wait_until(lambda: int(client.xlen(low)) == 3)
    most = max(int(client.xlen(low)) for _ in range(20))
    gate.set()
    thread.join(30)
    client.close()
    assert most == 3
    check(context, 200)


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED])
def test_what_nobody_can_answer_now_is_asked_again(stage: Stage, code: Code) -> None:
    refused: Counter[float] = Counter()

    def moody(request: Request) -> Answer:
        first = float(rows_of(request)[0, 0])
        refused[first] += 1
        if refused[first] < 3:
            return envelope.ReplyHeader(code=int(code), reason=int(Reason.OVERLOADED), message="later"), b""
        return answer(request)

    stage.replica.behave = moody
    context = stage.job(32, request_rows=16)
    batch.run(context)
    check(context, 32)
    assert context.found()["retried"] == 4


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED])
def test_trials_that_nobody_answers_make_requests_small_until_the_next_chunk(
    stage: Stage, code: Code
) -> None:
    asked: list[tuple[int, int]] = []

    def overloaded_at_first(request: Request) -> Answer:
        rows = rows_of(request)
        asked.append((int(rows[0, 0]), len(rows)))
        if len(asked) == 1:
            return envelope.ReplyHeader(code=int(code), reason=int(Reason.OVERLOADED), message="later"), b""
        return answer(request)

    stage.replica.behave = overloaded_at_first
    context = stage.job(64, chunk_rows=32)
    batch.run(context)
    check(context, 64)
    assert sorted(asked[:33]) == [(0, 1), *((row, 1) for row in range(32))]
    # Row 0 is asked again: the next chunk begins with trials.
    assert asked[33:36] == [(0, 1)] * 3
    said = [line["text"] for line in context.lines("log")]
    assert said[0] == "models/toy/versions/1: 1 rows a request of this chunk"
    assert len(said) == 2


def test_it_stops_when_asked_although_nobody_answers_its_trials(stage: Stage) -> None:
    context = stage.job(64)

    def silent(_: Request) -> None:
        context.stop()

    def run() -> None:
        with pytest.raises(Stopped):
            batch.run(context)

    stage.replica.behave = silent
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(caller.CALL_SECONDS / 3)
    assert not thread.is_alive(), "it waits for the deadline of its call"
    assert len(stage.replica.seen) == 1


def picky(*bad: int) -> Callable[[Request], Answer]:
    """Refuse requests with one of these rows."""

    def behave(request: Request) -> Answer:
        rows = rows_of(request)[:, 0]
        if any(row in bad for row in rows):
            return envelope.ReplyHeader(
                code=int(Code.INVALID_ARGUMENT), reason=int(Reason.INVALID_TENSOR), message="not this"
            ), b""
        return answer(request)

    return behave


def test_a_row_that_the_model_refuses_is_kept_with_the_error(stage: Stage) -> None:
    stage.replica.behave = picky(5, 170)
    context = stage.job(200, request_rows=32, chunk_rows=100)
    batch.run(context)
    check(context, 200, failed=(5, 170))
    assert answers_of(context)["error"][170].as_py() == "INVALID_ARGUMENT: not this"
    found = context.found()
    assert (found["failed"], found["first_error"]) == (2, "row 5: INVALID_ARGUMENT: not this")


def test_more_than_one_refused_row_in_a_hundred_ends_the_job(stage: Stage) -> None:
    stage.replica.behave = picky(5, 70, 170)
    with pytest.raises(JobFailure, match=r"refused 3 rows, more than 1 % of 200.*row 5") as failure:
        batch.run(stage.job(200, request_rows=32, chunk_rows=100))
    assert failure.value.cause == "INVALID_DATA"


def test_what_kills_replicas_is_not_tried_row_by_row(stage: Stage) -> None:
    calls = []

    def poisoned(request: Request) -> Answer:
        if 5 in rows_of(request)[:, 0]:
            calls.append(request)
            reason = int(Reason.POISON_REQUEST)
            return envelope.ReplyHeader(code=int(Code.INTERNAL), reason=reason, message="killed two"), b""
        return answer(request)

    stage.replica.behave = poisoned
    context = stage.job(800, request_rows=4)
    batch.run(context)
    check(context, 800, failed=(4, 5, 6, 7))
    assert len(calls) == 1


def test_after_a_kill_only_the_chunk_under_way_is_computed_again(stage: Stage, short_path: Path) -> None:
    rows, chunk = 160, 40
    gate = threading.Semaphore(0)
    asked: Counter[int] = Counter()

    def counted(request: Request) -> Answer:
        gate.acquire(timeout=20)
        asked.update(int(row) for row in rows_of(request)[:, 0])
        return answer(request)

    stage.replica.behave = counted
    root, data = short_path / "killed", write_rows(short_path / "rows", rows)
    process = start(root, data, stage.redis_url, stage.world.address, "test-killed-1", chunk)
    gate.release(12)  # two chunks of five requests, and two requests of the third
    wait_until(lambda: sum(asked.values()) == 96, seconds=60)
    wait_until(lambda: len(list((root / "checkpoints").glob("*.committed"))) == 2)
    process.kill()
    process.wait(10)
    for _ in range(rows):
        gate.release()
    # Another node has the checkpoint as it came from the registry: nothing else is left of the first.
    shutil.rmtree(root / "scratch")
    context = stage.job(rows, chunk_rows=chunk, request_rows=8, root=root)
    context = prediction(
        root, data, stage.redis_url, stage.world.address, "test-killed-2", chunk_rows=chunk, request_rows=8
    )
    batch.run(context)
    check(context, rows)
    assert "going on after 2 of 4 chunks" in context.lines("log")[0]["text"]
    assert max(asked[row] for row in range(80)) == 1
    assert max(asked.values()) <= 2
    assert context.found()["rows"] == rows


def test_it_stops_when_asked_and_goes_on_where_it_was(stage: Stage) -> None:
    context = stage.job(120, chunk_rows=40, request_rows=8)

    def stopping(request: Request) -> Answer:
        if rows_of(request)[0, 0] >= 56:
            context.stop()
            threading.Event().wait(0.3)
        return answer(request)

    stage.replica.behave = stopping
    with pytest.raises(Stopped):
        batch.run(context)
    (context.root / "stop").unlink()
    stage.replica.behave = answer
    again = stage.job(120, chunk_rows=40, request_rows=8, root=context.root)
    shutil.rmtree(context.root / "scratch")
    batch.run(again)
    check(again, 120)


def test_a_chunk_is_answered_by_one_version_when_another_takes_over(stage: Stage) -> None:
    other = stage.serve(2)
    moved = threading.Event()

    def moving(request: Request) -> Answer | None:
        if rows_of(request)[0, 0] >= 60:
            if not moved.is_set():
                moved.set()
                stage.world.offer("toy", versions={2: 100}, max_batch_size=0)
            return None
        return answer(request)

    stage.replica.behave = moving
    context = stage.job(120, chunk_rows=40, request_rows=8)
    batch.run(context)
    other.stop()
    check(context, 120)
    versions = answers_of(context)["version"].to_pylist()
    assert versions == ["models/toy/versions/1"] * 40 + ["models/toy/versions/2"] * 80


def test_it_waits_for_a_deployment_that_does_not_answer_yet_but_not_for_ever(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.world.withdraw("toy")
    monkeypatch.setattr(batch, "OUTAGE_SECONDS", 0.3)
    with pytest.raises(Exception, match="Nothing was answered"):
        batch.run(stage.job(40))
    monkeypatch.setattr(batch, "OUTAGE_SECONDS", 30.0)
    context = stage.job(40)
    thread = threading.Thread(target=batch.run, args=(context,))
    thread.start()
    wait_until(lambda: context.lines("progress"))
    stage.world.offer("toy", max_batch_size=0)
    thread.join(30)
    check(context, 40)


@pytest.mark.parametrize(
    ("arrays", "fields", "words"),
    [
        ({"x": np.zeros((4, 3))}, {}, r"takes rows of the shape \[4\], and the dataset has rows of \[3\]"),
        ({"a": np.zeros((4, 4)), "b": np.zeros((4, 4))}, {}, "no column 'x'"),
        ({"x": np.zeros((4, 4))}, {"inputs": {"z": "x"}}, "inputs names 'z'"),
        ({"x": np.full((4, 4), np.nan)}, {}, "row 0"),
        ({"x": np.zeros((4, 4))}, {"inputs": {"x": "x", "note": "x"}}, "takes BYTES"),
    ],
)
def test_data_that_do_not_fit_the_model_fail_the_job_for_good(
    stage: Stage, arrays: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    folder = stage.folder / "odd"
    folder.mkdir()
    np.savez(folder / "data.npz", **arrays)
    context = prediction(stage.folder / "job", folder, stage.redis_url, stage.world.address, "odd", **fields)
    with pytest.raises(JobFailure, match=words) as failure:
        batch.run(context)
    assert failure.value.cause == "INVALID_DATA"


def test_columns_may_be_called_otherwise_and_rows_reshaped(stage: Stage) -> None:
    folder = stage.folder / "shaped"
    folder.mkdir()
    x = np.zeros((20, 1, 2, 2), np.float32)
    x[:, 0, 0, 0] = np.arange(20)
    x[:, 0, 0, 1] = -np.arange(20)
    np.savez(folder / "data.npz", pixels=x, other=np.zeros((20, 1)))
    context = prediction(
        stage.folder / "job", folder, stage.redis_url, stage.world.address, "shape", inputs={"x": "pixels"}
    )
    batch.run(context)
    check(context, 20)
