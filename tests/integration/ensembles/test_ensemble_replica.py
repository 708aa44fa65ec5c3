"""A real replica of an ensemble, between a caller, scripted steps, a scheduler and a real Redis."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from penstock.queue.v1 import envelope_pb2 as envelope
from penstock.registry.v1.manifest_pb2 import EnsembleStep, Manifest
from penstock.scheduler.v1 import deployment_pb2
from penstock_kit.errors import Code, DeadlineExceeded, Reason
from penstock_kit.queue.keys import queue_name, streams
from penstock_kit.queue.messages import Reply, Request
from support.gateway_world import DIGEST, Replica, World, echo, hold, refuse
from support.replicas import Caller, ReplicaProcess, outputs_of, raw_request, reason_of

X = np.arange(8, dtype=np.float32).reshape(2, 4)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Steps = Mapping[str, tuple[str, str]]
# What the scripted steps take and give is called x.
CHAIN: Steps = {"one": ("a", "b"), "two": ("b", "c")}
FORK: Steps = {"one": ("a", "b"), "two": ("a", "c")}


def manifest_of(steps: Steps, outputs: tuple[str, ...] = ("c",), datatype: str = "FP32") -> Manifest:
    manifest = Manifest(runtime="ensemble", format="ensemble", entrypoint="ensemble.yaml")
    for name, (takes, gives) in steps.items():
        manifest.ensemble.steps.append(
            EnsembleStep(name=f"s-{name}", model=name, inputs={"x": takes}, outputs={"x": gives})
        )
    manifest.signature.inputs.add(name="a", data_type=f"DATA_TYPE_{datatype}", shape=[-1, -1])  # type: ignore[arg-type]
    for name in outputs:
        manifest.signature.outputs.add(name=name, data_type=f"DATA_TYPE_{datatype}", shape=[-1, -1])  # type: ignore[arg-type]
    manifest.batching.max_batch_size = 8
    return manifest


class Stage:
    """Scripted steps, a scheduler that offers them, and replicas of ensembles that call them."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.redis_url = redis_url
        self.redis = redis.Redis.from_url(redis_url)
        self.world = World(folder).start()
        self.steps: dict[str, Replica] = {}
        self._folder = folder / "ensemble"
        self._folder.mkdir()
        (self._folder / "ensemble.yaml").write_text("steps: []\n")
        for name in ("one", "two"):
            self.add(name)

    def add(self, name: str, version: int = 1) -> Replica:
        self.world.offer(name, versions={version: 100})
        self.steps[name] = Replica(self.redis_url, queue_name(name, version, DIGEST), version)
        return self.steps[name]

    def replica(self, steps: Steps = CHAIN, outputs: tuple[str, ...] = ("c",), **more: Any) -> ReplicaProcess:
        manifest = manifest_of(steps, outputs, more.pop("datatype", "FP32"))
        return ReplicaProcess(
            self.redis_url, self._folder, manifest, scheduler_address=self.world.address, **more
        )

    def waiting(self, name: str) -> int:
        return sum(int(self.redis.xlen(stream)) for stream in streams(queue_name(name, 1, DIGEST)))

    def close(self) -> None:
        for step in self.steps.values():
            step.stop()
        self.world.stop()
        self.redis.close()


@pytest.fixture
def stage(tmp_path: Path, redis_url: str) -> Iterator[Stage]:
    made = Stage(tmp_path, redis_url)
    yield made
    made.close()


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- what it waits for is in other processes
            await asyncio.sleep(0.005)


def ask(caller: Caller, **fields: Any) -> asyncio.Future[Reply]:
    priority = fields.pop("priority", 1)
    seconds = fields.pop("seconds", 30.0)
    header = envelope.RequestHeader(
        deadline_unix_micros=int((time.time() + seconds) * 1e6),
        format=envelope.PAYLOAD_FORMAT_OIP_GRPC,
        model_name="test",
        **fields,
    )
    return caller.sender.submit(caller.queue, header, raw_request({"a": X}), priority)


async def test_tensors_go_from_step_to_step_with_the_deadline_priority_and_trace_of_the_request(
    stage: Stage,
) -> None:
    with stage.replica().ready() as replica:
        async with Caller(stage.redis_url) as caller:
            request = ask(caller, priority=0, traceparent=TRACE)
            answer = outputs_of((await request).payload)
        assert replica.stop() == 0
    np.testing.assert_array_equal(answer["c"], X)
    for step in stage.steps.values():
        (seen,) = step.seen
        assert seen.header.traceparent == TRACE
        assert seen.header.depth == 1
        assert seen.header.model_name in stage.steps
        assert seen.stream.endswith(b":p0")
        assert 0 < seen.header.deadline_unix_micros / 1e6 - time.time() < 30
    first, second = (step.seen[0].header.deadline_unix_micros for step in stage.steps.values())
    assert first == second


async def test_independent_steps_run_at_the_same_time(stage: Stage) -> None:
    for step in stage.steps.values():
        step.behave = hold
    with stage.replica(FORK, ("b", "c")).ready():
        async with Caller(stage.redis_url) as caller:
            ask(caller)
            await until(lambda: all(step.seen for step in stage.steps.values()))


async def test_only_the_steps_that_the_asked_outputs_need_are_run(stage: Stage) -> None:
    with stage.replica(FORK, ("b", "c")).ready():
        async with Caller(stage.redis_url) as caller:
            from penstock.oip.v2 import inference_pb2 as oip

            message = oip.ModelInferRequest.FromString(raw_request({"a": X}))
            message.outputs.add(name="b")
            reply = await caller.send(message.SerializeToString())
            assert list(outputs_of(reply.payload)) == ["b"]
    assert len(stage.steps["one"].seen) == 1
    assert stage.steps["two"].seen == []


async def test_an_error_names_its_step_and_keeps_its_code(stage: Stage) -> None:
    stage.steps["two"].behave = refuse(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "No more today.")
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            reply = await ask(caller)
    assert reply.header.code == Code.RESOURCE_EXHAUSTED
    assert reply.header.message == "Step s-two: No more today."
    assert reason_of(reply) == "OVERLOADED"
    assert reply.header.metadata["step"] == "s-two"
    assert reply.header.metadata["deployment"] == "two"


async def test_when_one_step_fails_the_others_are_taken_off_their_queues(stage: Stage) -> None:
    stage.steps["one"].stop()  # its requests stay queued
    stage.steps["two"].behave = refuse(Code.INTERNAL, Reason.MODEL_ERROR, "Broken.")
    with stage.replica(FORK, ("b", "c")).ready():
        async with Caller(stage.redis_url) as caller:
            reply = await ask(caller)
            assert reply.header.message == "Step s-two: Broken."
            await until(lambda: stage.waiting("one") == 0)
    stage.add("one")


async def test_a_tensor_that_another_step_gave_wrongly_is_not_the_callers_mistake(stage: Stage) -> None:
    def wrong(request: Request) -> tuple[envelope.ReplyHeader, bytes]:
        header = envelope.ReplyHeader(code=3, reason=int(Reason.INVALID_TENSOR), message="Input x is bad.")
        header.metadata["input"] = "x"
        return header, b""

    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            stage.steps["two"].behave = wrong
            inner = await ask(caller)
            stage.steps["one"].behave = wrong
            outer = await ask(caller)
    assert inner.header.code == Code.FAILED_PRECONDITION
    assert reason_of(inner) == "MANIFEST_MISMATCH"
    assert inner.header.message.startswith("Step s-two: Input x is bad. Another step gave it")
    assert outer.header.code == Code.INVALID_ARGUMENT
    assert outer.header.message == "Step s-one: Input x is bad."


async def test_a_caller_who_leaves_takes_the_steps_along(stage: Stage) -> None:
    stage.steps["one"].stop()
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            ask(caller, id=b"mine")
            await until(lambda: stage.waiting("one") == 1)
            assert caller.sender.cancel(b"mine")
            await until(lambda: stage.waiting("one") == 0)
            stage.add("one")
            assert (await ask(caller)).header.code == 0
    assert len(stage.steps["one"].seen) == 1


async def test_a_deadline_ends_the_steps_with_the_request(stage: Stage) -> None:
    stage.steps["two"].stop()
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            try:
                code = (await ask(caller, seconds=0.4)).header.code
            except DeadlineExceeded as error:  # the caller's own end of the queue may be the first to notice
                code = error.code
            assert code == Code.DEADLINE_EXCEEDED
            await until(lambda: stage.waiting("two") == 0)
    stage.add("two")


async def test_a_step_that_is_not_there_is_named_and_may_come_later(stage: Stage) -> None:
    stage.world.withdraw("two")
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            reply = await ask(caller)
            assert reply.header.code == Code.UNAVAILABLE
            assert reason_of(reply) == "NOT_READY"
            assert reply.header.message.startswith(
                "Step s-two: No deployment is offered under the name 'two'"
            )
            stage.world.offer(
                "two", ready=0, state=deployment_pb2.DEPLOYMENT_STATE_FAILED, message="It is ill."
            )
            await until(lambda: stage.world.routes)
            async with asyncio.timeout(10):
                while "ill" not in (reply := await ask(caller)).header.message:
                    pass
            assert reason_of(reply) == "NOT_READY"
            stage.world.offer("two")
            async with asyncio.timeout(10):
                while (reply := await ask(caller)).header.code:
                    pass
    np.testing.assert_array_equal(outputs_of(reply.payload)["c"], X)


async def test_a_call_moves_with_its_step_to_another_version(stage: Stage) -> None:
    stage.steps["two"].behave = hold
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            future = ask(caller)
            await until(lambda: stage.steps["two"].seen)
            first = stage.steps["two"]
            second = stage.add("two", version=2)  # version 1 is not offered any more
            assert (await future).header.code == 0
            assert len(second.seen) == 1
    first.stop()


async def test_a_circle_of_ensembles_ends(stage: Stage) -> None:
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            reply = await ask(caller, depth=4)
    assert reply.header.code == Code.FAILED_PRECONDITION
    assert "Does one of them call itself?" in reply.header.message


async def test_text_and_large_tensors_pass(stage: Stage) -> None:
    large = np.random.default_rng(0).normal(size=(8, 1 << 19)).astype(np.float32)
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            np.testing.assert_array_equal((await caller.infer({"a": large}))["c"], large)
    words = np.array([["na", "ï", ""]], dtype=object)
    words[0] = [b"na\x00", "ï".encode(), b""]
    with stage.replica(datatype="BYTES", queue="test:2:abc").ready():
        async with Caller(stage.redis_url, "test:2:abc") as caller:
            assert (await caller.infer({"a": words}))["c"].tolist() == words.tolist()


async def test_an_output_that_is_not_as_described_is_refused(stage: Stage) -> None:
    manifest = manifest_of(CHAIN)
    manifest.signature.outputs[0].shape[:] = [-1, 3]
    with ReplicaProcess(
        stage.redis_url, stage._folder, manifest, scheduler_address=stage.world.address
    ).ready():
        async with Caller(stage.redis_url) as caller:
            reply = await ask(caller)
    assert reason_of(reply) == "MODEL_ERROR"
    assert "the output c in the shape [2, 4]" in reply.header.message


async def test_a_replica_that_ends_answers_what_it_has_begun(stage: Stage) -> None:
    held: list[Request] = []
    stage.steps["two"].behave = lambda request: held.append(request)
    with stage.replica().ready() as replica:
        async with Caller(stage.redis_url) as caller:
            futures = [ask(caller) for _ in range(20)]
            await until(lambda: len(held) == 20)
            replica.signal(signal.SIGTERM)
            reader = stage.steps["two"]._reader
            reader.finish([(request, *echo(request)) for request in held])
            replies = await asyncio.gather(*futures)
            assert await asyncio.to_thread(replica.wait) == 0
    assert {reply.header.code for reply in replies} == {0}


async def test_what_a_killed_replica_had_begun_is_answered_once_by_the_next(stage: Stage) -> None:
    stage.steps["two"].behave = hold
    with stage.replica().ready() as first:
        async with Caller(stage.redis_url) as caller:
            futures = [ask(caller) for _ in range(20)]
            await until(lambda: len(stage.steps["two"].seen) == 20)
            first.signal(signal.SIGKILL)
            await asyncio.to_thread(first.wait)
            stage.steps["two"].behave = echo
            with stage.replica().ready() as second:  # takes over once the lease has run out
                replies = await asyncio.gather(*futures)
                assert second.stop() == 0
            assert caller.sender.unmatched_replies == 0
    assert {reply.header.code for reply in replies} == {0}


async def test_requests_outlive_the_loss_of_all_data(stage: Stage) -> None:
    stage.steps["two"].behave = hold
    with stage.replica().ready():
        async with Caller(stage.redis_url) as caller:
            futures = [ask(caller) for _ in range(10)]
            await until(lambda: len(stage.steps["two"].seen) == 10)
            stage.steps["two"].behave = echo
            stage.redis.flushall()
            replies = await asyncio.gather(*futures)
    assert {reply.header.code for reply in replies} == {0}


async def test_an_ensemble_waits_for_the_first_routes(stage: Stage, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/nobody.sock"
    replica = ReplicaProcess(stage.redis_url, stage._folder, manifest_of(CHAIN), scheduler_address=nowhere)
    with replica:
        status = await asyncio.to_thread(replica.next_status)
        assert status is not None
        assert status.state.name == "LOADING"
        replica.signal(signal.SIGTERM)  # it can be ended while it waits
        assert await asyncio.to_thread(replica.wait) == 0
