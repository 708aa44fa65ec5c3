"""Copies for versions in the shadow: which, how many, and what comes of them."""

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC, ReplyHeader
from penstock_gateway.domain.traffic import Tally
from penstock_gateway.hotpath import mirror
from penstock_gateway.hotpath.dispatch import Dispatcher, Outcome
from penstock_gateway.hotpath.mirror import FEWEST_IN_FLIGHT, Shadow
from penstock_kit.errors import Code, Internal, Reason
from penstock_kit.queue.memory import MemoryBroker, MemoryReader, MemorySender
from penstock_kit.queue.messages import Request
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import CachePolicy, Route, Table, Target

LIVE, DARK = "m:1:abc", "m:2:abc"
PATIENCE_SECONDS = 10.0


def table(
    *,
    percent: int = 100,
    tolerance: float = 0.0,
    ready: int = 1,
    cache: CachePolicy | None = None,
    shadow: bool = True,
) -> Table:
    live = Target("models/m", 1, 100, LIVE, 1, Description())
    dark = Target(
        "models/m", 2, 0, DARK, ready, Description(), mirror_percent=percent, mirror_tolerance=tolerance
    )
    targets = (live, dark) if shadow else (live,)
    return Table(1, {"m": Route("m", targets, 4096, cache=cache)})


def result(*values: float, version: str = "1") -> bytes:
    made = oip.ModelInferResponse(model_name="m", model_version=version)
    made.outputs.add(name="y", datatype="FP32", shape=[len(values)])
    made.raw_output_contents.append(np.array(values, np.float32).tobytes())
    return made.SerializeToString()


class Bench:
    """A deployment with a version in use and one in the shadow; the test is their replicas."""

    def __init__(self) -> None:
        broker = MemoryBroker()
        self.sender = MemorySender(broker, "gateway-test")
        self.dispatcher = Dispatcher(self.sender)
        self.live = MemoryReader(broker, LIVE, "live.1")
        self.dark = MemoryReader(broker, DARK, "dark.1")
        self.outcomes: list[Outcome] = []

    def ask(self, selector: str = "", payload: bytes = b"request", seconds: float = 30.0) -> None:
        self.dispatcher.begin(
            "m",
            selector,
            payload,
            self.outcomes.append,
            deadline=time.time() + seconds,
            format=PAYLOAD_FORMAT_OIP_GRPC,
        )

    async def answer(
        self, reader: MemoryReader, payload: bytes = b"", code: int = 0, reason: Reason = Reason.UNSPECIFIED
    ) -> list[Request]:
        requests = reader.read(4096, 0)
        header = ReplyHeader(code=code, reason=int(reason)) if code else None
        reader.finish([(request, header, payload) for request in requests])
        await asyncio.sleep(0)
        return requests

    @property
    def shadow(self) -> Shadow:
        (only,) = self.dispatcher.mirror.shadows["m"]
        return only

    @property
    def tally(self) -> Tally:
        return self.dispatcher.tallies.of(("m", "models/m", 2))

    async def compared(self) -> tuple[int, int]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.dispatcher.mirror.held:  # noqa: ASYNC110 - a thread works on it
                await asyncio.sleep(0.001)
        return self.tally.agreed, self.tally.disagreed


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.sender.start()
    yield made
    made.dispatcher.mirror.stop()
    await made.sender.stop()


async def test_the_caller_is_answered_before_a_copy_is_sent_and_by_the_version_in_use_only(
    bench: Bench,
) -> None:
    bench.dispatcher.update(table())
    bench.ask()
    assert bench.sender.unanswered(DARK) == 0
    (asked,) = await bench.answer(bench.live, result(1.0))
    assert len(bench.outcomes) == 1
    (copied,) = await bench.answer(bench.dark, result(1.0, version="2"))
    assert (copied.payload, copied.header.model_name) == (asked.payload, asked.header.model_name)
    assert copied.header.id != asked.header.id
    assert copied.stream.endswith(b"p2"), "behind all callers"
    assert await bench.compared() == (1, 0)
    assert len(bench.outcomes) == 1
    assert (bench.tally.arrived, bench.tally.succeeded) == (0, 1)


async def test_answers_that_differ_by_more_than_the_tolerance_disagree(bench: Bench) -> None:
    bench.dispatcher.update(table(tolerance=0.1))
    for value in (1.05, 1.5):
        bench.ask()
        await bench.answer(bench.live, result(1.0))
        await bench.answer(bench.dark, result(value, version="2"))
    assert await bench.compared() == (1, 1)


@pytest.mark.parametrize(
    ("code", "reason", "failed"),
    [
        (Code.INTERNAL, Reason.MODEL_ERROR, 1),
        (Code.INVALID_ARGUMENT, Reason.INVALID_TENSOR, 0),
    ],
)
async def test_an_error_where_the_other_version_answers_is_disagreement(
    bench: Bench, code: Code, reason: Reason, failed: int
) -> None:
    bench.dispatcher.update(table())
    bench.ask()
    await bench.answer(bench.live, result(1.0))
    await bench.answer(bench.dark, code=int(code), reason=reason)
    assert await bench.compared() == (0, 1)
    assert bench.tally.failed == failed


async def test_what_failed_for_its_caller_is_not_copied(bench: Bench) -> None:
    bench.dispatcher.update(table())
    bench.ask()
    await bench.answer(bench.live, code=int(Code.INTERNAL))
    assert isinstance(bench.outcomes[0], Internal)
    assert bench.sender.unanswered(DARK) == 0


async def test_a_shadow_gets_no_copy_of_what_it_answers_itself(bench: Bench) -> None:
    bench.dispatcher.update(table())
    bench.ask("2")
    await bench.answer(bench.dark, result(1.0))
    assert bench.sender.unanswered(DARK) == 0
    assert (bench.tally.arrived, bench.tally.succeeded) == (1, 1)


async def test_only_what_was_computed_is_copied(bench: Bench) -> None:
    bench.dispatcher.update(table(cache=CachePolicy(keep=True, coalesce=True)))
    request = oip.ModelInferRequest(model_name="m", id="1")
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    payload = request.SerializeToString()
    bench.ask(payload=payload)
    bench.ask(payload=payload)
    await bench.answer(bench.live, result(1.0))
    bench.ask(payload=payload)
    await asyncio.sleep(0)
    assert len(bench.outcomes) == 3
    assert len(await bench.answer(bench.dark, result(1.0))) == 1


async def test_so_many_percent_are_copied_also_in_a_short_window(bench: Bench) -> None:
    bench.dispatcher.update(table(percent=10))
    for _ in range(100):
        bench.ask()
    await bench.answer(bench.live, result(1.0))
    assert 8 <= len(await bench.answer(bench.dark, result(1.0))) <= 12


async def test_a_shadow_that_is_behind_gets_no_more_copies_and_they_are_counted(bench: Bench) -> None:
    bench.dispatcher.update(table())
    for _ in range(FEWEST_IN_FLIGHT + 5):
        bench.ask()
    await bench.answer(bench.live, result(1.0))
    assert len(bench.outcomes) == FEWEST_IN_FLIGHT + 5, "callers notice nothing"
    assert bench.sender.unanswered(DARK) == FEWEST_IN_FLIGHT
    assert bench.shadow.dropped == {mirror.BUSY: 5}


async def test_copies_hold_no_more_bytes_than_they_may(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = result(1.0)
    monkeypatch.setattr(mirror, "MOST_BYTES", 2 * (1000 + len(answer)))
    bench.dispatcher.update(table())
    for _ in range(3):
        bench.ask(payload=bytes(1000))
    await bench.answer(bench.live, answer)
    assert bench.shadow.dropped == {mirror.BUSY: 1}
    await bench.answer(bench.dark, answer)
    assert await bench.compared() == (2, 0)


async def test_an_answer_too_large_to_compare_is_not_copied(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "MOST_ANSWER_BYTES", 8)
    bench.dispatcher.update(table())
    bench.ask()
    await bench.answer(bench.live, result(1.0))
    assert bench.shadow.dropped == {mirror.LARGE: 1}


async def test_a_shadow_without_a_replica_gets_nothing(bench: Bench) -> None:
    bench.dispatcher.update(table(ready=0))
    bench.ask()
    await bench.answer(bench.live, result(1.0))
    assert bench.sender.unanswered(DARK) == 0
    assert bench.shadow.dropped == {mirror.NOT_READY: 1}
    assert await bench.compared() == (0, 0)


async def test_copies_for_a_shadow_that_is_withdrawn_are_taken_off_and_go_nowhere_else(bench: Bench) -> None:
    bench.dispatcher.update(table())
    bench.ask()
    await bench.answer(bench.live, result(1.0))
    shadow = bench.shadow
    bench.dispatcher.update(table(shadow=False))
    assert (bench.sender.unanswered(LIVE), bench.sender.unanswered(DARK)) == (0, 0)
    assert shadow.dropped == {mirror.LOST: 1}
    assert (shadow.tally.agreed, shadow.tally.disagreed) == (0, 0)


async def test_a_shadow_that_is_promoted_is_no_shadow_any_more(bench: Bench) -> None:
    bench.dispatcher.update(table())
    bench.ask()
    await bench.answer(bench.live, result(1.0))
    bench.dispatcher.update(table(percent=0))
    assert bench.sender.unanswered(DARK) == 0
    bench.ask()
    await bench.answer(bench.live, result(1.0))
    assert bench.sender.unanswered(DARK) == 0


async def test_a_shadow_that_hangs_disagrees_and_one_that_is_slow_does_not(bench: Bench) -> None:
    bench.dispatcher.update(table())
    bench.ask(seconds=0.2)
    await bench.answer(bench.live, result(1.0))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while bench.sender.unanswered(DARK):  # noqa: ASYNC110 - a deadline ends it
            await asyncio.sleep(0.01)
    assert await bench.compared() == (0, 1)
    bench.dark.read(10, 0)
    bench.ask(seconds=0.2)
    bench.ask(seconds=30.0)
    await bench.answer(bench.live, result(1.0))
    first, second = bench.dark.read(10, 0)
    bench.dark.finish([(second, None, result(1.0))])
    async with asyncio.timeout(PATIENCE_SECONDS):
        while bench.sender.unanswered(DARK):  # noqa: ASYNC110 - a deadline ends it
            await asyncio.sleep(0.01)
    assert first.header.deadline_unix_micros < second.header.deadline_unix_micros
    assert await bench.compared() == (1, 1)
    assert bench.shadow.dropped == {mirror.LOST: 1}
