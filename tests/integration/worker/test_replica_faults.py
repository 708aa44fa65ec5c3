"""Does a replica lose, double or mix up requests when a model, a request, a peer or Redis fails?"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.queue.v1 import envelope_pb2 as envelope
from penstock.queue.v1.envelope_pb2 import ReplicaStatistics
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.statistics import read_statistics
from penstock_local.embedded import EmbeddedRedis
from penstock_worker.domain.replica import BatchingPolicy
from support import models
from support.replicas import Caller, ReplicaProcess, outputs_of, raw_request, reason_of

# Each value of x says what the model does with the row; everything else is doubled.
MOODY = """
import os, signal, time

class Fatal(BaseException):
    pass

class Model:
    def predict(self, inputs):
        x = inputs["x"]
        if (x == -1).any():
            raise ValueError("minus one is not to my taste")
        if (x == -2).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (x == -3).any():
            return {"y": x[:, :3]}
        if (x == -4).any():
            return {"z": x}
        if (x == -5).any():
            raise SystemExit(3)
        if (x == -6).any():
            return {"y": x.astype(complex)}
        if (x == -8).any():
            raise KeyboardInterrupt("as if")
        if (x == -9).any():
            raise Fatal("not even an exception")
        time.sleep(float(x.max()) / 1000 if (x[:, 0] == 7).any() else 0)
        return {"y": x * 2}
"""


def row(*values: float) -> np.ndarray[Any, Any]:
    return np.resize(np.array(values, dtype=np.float32), (1, 4))


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("moody") / "bundle"
    spec = ("FP32", (-1, 4))
    return directory, models.build_python(
        directory, MOODY, inputs=[("x", *spec)], outputs=[("y", *spec)], max_batch_size=16
    )


@pytest.fixture
async def caller(redis_url: str) -> AsyncIterator[Caller]:
    async with Caller(redis_url) as caller:
        yield caller


def send(caller: Caller, array: np.ndarray[Any, Any], seconds: float = 30) -> asyncio.Future[Any]:
    return caller.send(raw_request({"x": array}), seconds=seconds)


async def test_a_row_on_which_the_model_raises_fails_alone(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody).ready():
        rows = [row(-1 if index % 8 == 3 else index) for index in range(64)]
        replies = await asyncio.gather(*[send(caller, x) for x in rows])
    for index, reply in enumerate(replies):
        if index % 8 == 3:
            assert reason_of(reply) == "MODEL_ERROR"
            assert reply.header.message == "The model raised ValueError: minus one is not to my taste"
        else:
            assert outputs_of(reply.payload)["y"].tolist() == (rows[index] * 2).tolist()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-3, "in the shape [1, 3]; its signature says [-1, 4]"),
        (-4, "gave no output y; it gave z"),
        (-5, "raised SystemExit: 3"),
        (-6, "as complex128; its signature says FP32"),
        (-8, "raised KeyboardInterrupt: as if"),
    ],
)
async def test_what_differs_from_the_signature_is_a_model_error(
    value: int, words: str, moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody).ready():
        wrong, right = await asyncio.gather(send(caller, row(value)), send(caller, row(5)))
    assert reason_of(wrong) == "MODEL_ERROR"
    assert words in wrong.header.message
    assert outputs_of(right.payload)["y"].tolist() == [[10.0] * 4]


async def test_nan_and_infinity_are_served(moody: tuple[Path, Any], redis_url: str, caller: Caller) -> None:
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[NaN,Infinity,-Infinity,1]}]}'
    with ReplicaProcess(redis_url, *moody).ready():
        raw = await caller.infer({"x": row(np.nan, np.inf, -np.inf, 1)})
        reply = await caller.send(body, envelope.PAYLOAD_FORMAT_OIP_REST)
    assert np.array_equal(raw["y"], row(np.nan, np.inf, -np.inf, 2), equal_nan=True)
    assert b"[NaN,Infinity,-Infinity,2.0]" in reply.payload
    assert np.isnan(json.loads(reply.payload)["outputs"][0]["data"][0])


async def test_a_request_over_the_batch_size_is_served_in_pieces(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    x = np.arange(101 * 4, dtype=np.float32).reshape(101, 4) + 100
    with ReplicaProcess(redis_url, *moody).ready() as replica:
        assert (await caller.infer({"x": x}))["y"].tolist() == (x * 2).tolist()
        empty = await send(caller, x[:0])
        assert reason_of(empty) == "INVALID_TENSOR"
        assert "no rows" in empty.header.message
        counted = await statistics(redis_url, replica, 2)
    sizes = {batch.batch_size: batch.count for batch in counted.batches if batch.batch_size > 1}
    assert sizes == {16: 6, 5: 1}


async def statistics(redis_url: str, replica: ReplicaProcess, answered: int) -> ReplicaStatistics:
    """What a replica has published once it has counted so many answers."""
    connection = await Connection.connect(Address.parse(redis_url), "test")
    try:
        async with asyncio.timeout(20):
            while True:
                found = (await read_statistics(connection, replica.queue)).get(replica.consumer)
                if found and found.success_count + found.failure_count >= answered:
                    return found
                await asyncio.sleep(0.05)
    finally:
        connection.close()


async def test_requests_are_joined_and_counted(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody) as replica:
        # They wait in the queue while the replica starts, and so are all there when it reads.
        futures = [send(caller, row(index + 10)) for index in range(64)]
        replica.ready()
        replies = await asyncio.gather(*futures)
        bad = await send(caller, row(-1))
        counted = await statistics(redis_url, replica, 65)
    assert [outputs_of(r.payload)["y"][0, 0] for r in replies] == [2 * i + 20 for i in range(64)]
    assert reason_of(bad) == "MODEL_ERROR"
    assert (counted.success_count, counted.failure_count) == (64, 1)
    assert counted.inference_count == 64
    assert counted.execution_count <= 10
    assert counted.queue_ns > 0
    assert 0 < counted.compute_ns < counted.success_ns
    assert sum(b.batch_size * b.count for b in counted.batches) == 64


async def test_an_expired_request_never_reaches_the_model(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody) as replica:
        late = send(caller, row(3), seconds=0.2)
        with pytest.raises(Exception, match=r"(?i)deadline"):
            await late
        replica.ready()
        await caller.infer({"x": row(4)})
        counted = await statistics(redis_url, replica, 1)
    assert counted.inference_count == 1


async def test_sigterm_answers_what_is_queued_and_says_stopped(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody).ready() as replica:
        futures = [send(caller, row(7, 20)) for _ in range(40)]
        await asyncio.sleep(0)
        replica.signal(signal.SIGTERM)
        replies = await asyncio.gather(*futures)
        assert await asyncio.to_thread(replica.wait) == 0
        last = replica.next_status()
    assert all(reply.header.code == 0 for reply in replies)
    assert last is not None
    assert last.state.value == "STOPPED"


async def test_a_replica_whose_queue_others_read_ends_at_once_and_leaves_them_the_rest(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody).ready() as first, ReplicaProcess(redis_url, *moody).ready():
        futures = [send(caller, row(7, 20, index)) for index in range(100)]
        done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        assert done
        first.signal(signal.SIGUSR1)
        assert await asyncio.to_thread(first.wait) == 0
        assert not all(future.done() for future in futures)  # it did not wait for an empty queue
        replies = await asyncio.gather(*futures)
    values = [outputs_of(reply.payload)["y"][0, 2] for reply in replies]
    assert values == [2.0 * index for index in range(100)]


async def test_a_killed_replica_loses_and_doubles_nothing(
    moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody).ready() as first, ReplicaProcess(redis_url, *moody).ready():
        futures = [send(caller, row(7, 20, index)) for index in range(100)]
        done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        assert done
        first.signal(signal.SIGKILL)
        replies = await asyncio.gather(*futures)
    values = [outputs_of(reply.payload)["y"][0, 2] for reply in replies]
    assert values == [2.0 * index for index in range(100)]


@pytest.mark.parametrize(("value", "end"), [(-2, -signal.SIGKILL), (-9, 1)], ids=["killed", "failed"])
async def test_a_request_that_kills_replicas_is_poison_and_its_neighbours_are_served(
    value: int, end: int, moody: tuple[Path, Any], redis_url: str, caller: Caller
) -> None:
    replicas = [ReplicaProcess(redis_url, *moody).ready() for _ in range(3)]
    try:
        futures = [send(caller, row(value if index == 5 else index)) for index in range(12)]
        replies = await asyncio.gather(*futures)
        ends = [replica._process.poll() for replica in replicas]
    finally:
        for replica in replicas:
            replica.close()
    for index, reply in enumerate(replies):
        if index == 5:
            assert reason_of(reply) == "POISON_REQUEST"
        else:
            assert outputs_of(reply.payload)["y"][0, 0] == 2 * index
    assert ends.count(end) == 2


async def test_redis_that_restarts_empty_costs_no_answer(
    moody: tuple[Path, Any], redis_server: EmbeddedRedis, redis_url: str, caller: Caller
) -> None:
    with ReplicaProcess(redis_url, *moody).ready():
        before = await caller.infer({"x": row(1)})
        slow = [send(caller, row(7, 300, index)) for index in range(4)]
        redis_server.kill()
        redis_server.start()
        after = [send(caller, row(index)) for index in range(4)]
        replies = await asyncio.gather(*slow, *after)
    assert before["y"][0, 0] == 2
    assert [outputs_of(r.payload)["y"][0, 2] for r in replies[:4]] == [0, 2, 4, 6]
    assert [outputs_of(r.payload)["y"][0, 0] for r in replies[4:]] == [0, 2, 4, 6]


async def test_a_replica_waits_for_redis_before_it_says_ready(
    moody: tuple[Path, Any], redis_server: EmbeddedRedis, redis_url: str
) -> None:
    redis_server.stop()
    try:
        with ReplicaProcess(redis_url, *moody) as replica:
            loading = replica.next_status()
            deadline = time.monotonic() + 30
            while "waiting for it" not in replica.log:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            redis_server.start()
            ready = await asyncio.to_thread(replica.next_status)
            assert loading is not None
            assert ready is not None
            assert (loading.state.value, ready.state.value) == ("LOADING", "READY")
            async with Caller(redis_url) as caller:
                assert (await caller.infer({"x": row(2)}))["y"][0, 0] == 4
    finally:
        if not redis_server.running:
            redis_server.start()


def test_sigterm_while_loading_ends_at_once(tmp_path: Path, redis_url: str) -> None:
    code = (
        "import time\nclass Model:\n    def load(self, _): time.sleep(60)\n    def predict(self, _): pass\n"
    )
    manifest = models.build_python(tmp_path / "slow", code)
    with ReplicaProcess(redis_url, tmp_path / "slow", manifest) as replica:
        loading = replica.next_status()
        assert replica.stop() == 0
        stopped = replica.next_status()
    assert loading is not None
    assert stopped is not None
    assert stopped.state.value == "STOPPED"


async def test_a_replica_shows_how_it_makes_batches_and_keeps_their_objective(
    tmp_path: Path, redis_url: str
) -> None:
    code = (
        "import time\n\n\nclass Model:\n    def predict(self, inputs):\n"
        '        time.sleep(0.004 + 0.001 * len(inputs["x"]))\n        return {"y": inputs["x"]}\n'
    )
    manifest = models.build_python(tmp_path / "slow", code, max_batch_size=64)
    policy = BatchingPolicy(64, latency_objective_microseconds=60_000)
    with ReplicaProcess(redis_url, tmp_path / "slow", manifest, batching=policy).ready() as replica:
        async with Caller(redis_url) as caller:
            x = np.zeros((1, 16), dtype=np.float32)
            for _ in range(4):
                await asyncio.gather(*[caller.infer({"x": x}) for _ in range(150)])
            counted = await statistics(redis_url, replica, 600)
    chosen = counted.batching
    # Two calls must fit into the objective: about 26 rows, fewer on a busy machine.
    assert 1 <= chosen.max_rows <= 27
    assert chosen.objective_ns == 60_000_000
    assert 0 < chosen.average_rows <= 64
    rows = [point.rows for point in chosen.curve]
    assert rows == sorted(rows)
    assert (rows[0], rows[-1]) == (1, 64)
    assert all(point.ns >= 4_000_000 + 1_000_000 * point.rows for point in chosen.curve)
