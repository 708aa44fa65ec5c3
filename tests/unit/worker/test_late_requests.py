"""What is read from the queue too late, by its header or by its own parameters, never reaches the model."""

import json
import time

import pytest

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_REST, RequestHeader
from penstock_kit.errors import DeadlineExceeded
from penstock_kit.oip import Codec, Signature, TensorSpec
from penstock_kit.queue.memory import MemoryBroker, MemoryReader
from penstock_kit.queue.messages import Request
from penstock_worker.hotpath.answering import Answering
from penstock_worker.hotpath.execution import Outcome, Work
from penstock_worker.hotpath.statistics import Counters

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),), batched=True)


def decoded(*, queued: float, left: float, timeout: object = None) -> Work | Outcome:
    """Decode a request that was queued so long ago, has so long left, and says so of itself (seconds)."""
    body: dict[str, object] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    if timeout is not None:
        body["parameters"] = {"timeout": timeout}
    now = time.time()
    header = RequestHeader(
        id=b"1",
        format=PAYLOAD_FORMAT_OIP_REST,
        enqueue_unix_micros=int((now - queued) * 1e6),
        deadline_unix_micros=int((now + left) * 1e6),
    )
    answering = Answering(MemoryReader(MemoryBroker(), "q", "r.1"), Codec(SIGNATURE, "1"), Counters(), None)
    return answering.decode(Request(header, json.dumps(body).encode(), 0, b"1-0", b"s"))


def test_a_request_past_its_deadline_is_not_even_decoded() -> None:
    outcome = decoded(queued=2, left=-0.01)
    assert isinstance(outcome, Outcome)
    assert isinstance(outcome.result, DeadlineExceeded)
    assert outcome.infer is None


def test_the_timeout_in_the_json_counts_from_the_queueing() -> None:
    outcome = decoded(queued=2, left=60, timeout=1_000_000)
    assert isinstance(outcome, Outcome)
    assert isinstance(outcome.result, DeadlineExceeded)
    work = decoded(queued=2, left=60, timeout=5_000_000)
    assert isinstance(work, Work)
    assert work.request.header.deadline_unix_micros / 1e6 == pytest.approx(time.time() + 3, abs=1)


@pytest.mark.parametrize("timeout", [0, 90_000_000, "soon", 1.5])
def test_a_timeout_that_is_none_or_longer_changes_nothing(timeout: object) -> None:
    work = decoded(queued=2, left=60, timeout=timeout)
    assert isinstance(work, Work)
    assert work.request.header.deadline_unix_micros / 1e6 == pytest.approx(time.time() + 60, abs=1)
