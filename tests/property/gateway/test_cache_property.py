"""Whatever happens in whatever order: bounds hold, and everybody gets one answer, fresh, of their own."""

import asyncio
import time
from collections.abc import Iterable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import (
    PAYLOAD_FORMAT_OIP_GRPC,
    PAYLOAD_FORMAT_OIP_REST,
    ReplyHeader,
    RequestHeader,
)
from penstock_gateway.domain.admission import Backlog
from penstock_gateway.domain.traffic import Tally
from penstock_gateway.hotpath.cache import OVERHEAD_BYTES, ResponseCache
from penstock_gateway.hotpath.canonical import MAX_KEYED_BYTES, key_of, split, with_id, without_id
from penstock_gateway.hotpath.flights import Leavable, Outcome
from penstock_kit.errors import Code, DeadlineExceeded
from penstock_kit.queue.memory import MemoryBroker, MemoryReader, MemorySender
from penstock_kit.queue.messages import Reply, Request
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import CachePolicy, Route, Table, Target

LIMIT = 6 * OVERHEAD_BYTES
TTL = 10.0
QUEUES = ("m:1:abc", "m:2:def", "n:1:abc")
RARELY = st.sampled_from([False, False, True])
TEXTS = ("a", "b" * 300, "c" * 900, "d" * 8 * OVERHEAD_BYTES)


def target(queue: str) -> Target:
    return Target("models/m", 1, 100, queue, 1, Description(), digest=f"sha256:{queue}")


class Caller:
    """One who asks."""

    def __init__(self, queue: str, text: str, request_id: str, seconds: float) -> None:
        self.queue = queue
        self.text = text
        self.request_id = request_id
        self.header = RequestHeader(
            deadline_unix_micros=int((time.time() + seconds) * 1e6), format=PAYLOAD_FORMAT_OIP_GRPC
        )
        self.flight: Leavable | None = None
        self.backlog = Backlog()
        self.reckoned = 0.0
        self.tally = Tally()
        self.outcomes: list[Outcome] = []
        self.left = False

    def end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


class Cached(RuleBasedStateMachine):
    """Two deployments with caches, callers, a replica, a clock, and an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.broker = MemoryBroker()
        self.sender = MemorySender(self.broker, "gateway-test")
        self.loop.run_until_complete(self.sender.start())
        self.now = 0.0
        self.cache = ResponseCache(self.sender, LIMIT, lambda: self.now)
        self.readers = {queue: MemoryReader(self.broker, queue, f"{queue}.r") for queue in QUEUES}
        self.pending: list[tuple[str, Request]] = []
        self.callers: list[Caller] = []
        self.here: set[str] = set(QUEUES)
        self.policies: dict[str, CachePolicy | None] = {
            "m": CachePolicy(True, TTL, LIMIT // 2, True),
            "n": CachePolicy(True, TTL, LIMIT),
        }

    def teardown(self) -> None:
        for _ in range(20):
            self.read()
            while self.pending:
                self.reply(0, Code.OK)
        for caller in self.callers:
            assert len(caller.outcomes) == 1, caller.text[:1]
        assert self.sender.unanswered() == 0
        assert not self.cache.flights
        assert not any(shelf.flights for shelf in self.cache.shelves.values())
        self.loop.run_until_complete(self.sender.stop())
        self.loop.close()

    def turn(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.run_until_complete(asyncio.sleep(0))

    def publish(self) -> None:
        routes = {
            name: Route(
                name,
                tuple(target(q) for q in QUEUES if q in self.here and q.startswith(name)),
                100,
                cache=policy,
            )
            for name, policy in self.policies.items()
        }
        self.cache.follow(Table(1, routes))

    @initialize()
    def begin(self) -> None:
        self.publish()

    @rule(
        queue=st.sampled_from(QUEUES),
        texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3),
        ids=st.lists(st.sampled_from(["", "one", "two"]), min_size=1, max_size=4),
        seconds=st.lists(st.sampled_from([100, 200, 300]), min_size=1, max_size=2),
        priority=st.sampled_from([1, 1, 1, 0]),
    )
    def rush(self, queue: str, texts: list[str], ids: list[str], seconds: list[int], priority: int) -> None:
        """Many ask at once, some of them alike."""
        for number, request_id in enumerate(ids):
            self.ask(queue, texts[number % len(texts)], request_id, seconds[number % len(seconds)], priority)

    def ask(self, queue: str, text: str, request_id: str, seconds: int, priority: int) -> None:
        shelf = self.cache.shelves.get(queue[0])
        if queue not in self.here or shelf is None:
            return
        caller = Caller(queue, text, request_id, seconds)
        message = oip.ModelInferRequest(model_name="m", id=request_id)
        message.raw_input_contents.append(text.encode())
        payload = message.SerializeToString()

        async def submit() -> None:
            look = shelf.look(target(queue), "m", PAYLOAD_FORMAT_OIP_GRPC, 0, payload, priority)
            assert look is not None
            look.begin(caller, queue, payload, priority)

        self.loop.run_until_complete(submit())
        self.callers.append(caller)

    @precondition(lambda self: any(not caller.outcomes for caller in self.callers))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from([c for c in self.callers if not c.outcomes]))
        if caller.flight is None:
            self.sender.cancel(caller.header.id)
        else:
            caller.flight.leave(caller)
        caller.left = True
        assert isinstance(caller.outcomes[0], asyncio.CancelledError)

    @rule()
    def read(self) -> None:
        self.turn()
        for queue, reader in self.readers.items():
            self.pending += [(queue, request) for request in reader.read(100, 0)]

    @rule(
        codes=st.lists(
            st.sampled_from([Code.OK] * 5 + [Code.INTERNAL, Code.DEADLINE_EXCEEDED]), min_size=1, max_size=6
        ),
        last=st.booleans(),
    )
    def answer(self, codes: list[Code], last: bool) -> None:
        self.read()
        for code in codes:
            if self.pending:
                self.reply(-1 if last else 0, code)

    def reply(self, index: int, code: Code) -> None:
        queue, request = self.pending.pop(index)
        asked = oip.ModelInferRequest.FromString(request.payload)
        answer = oip.ModelInferResponse(model_name="m", id=asked.id, model_version=queue)
        # The answer says what was asked, and when it was computed.
        answer.parameters["now"].double_param = self.now
        answer.raw_output_contents.extend(asked.raw_input_contents)
        payload = b"" if code else answer.SerializeToString()
        self.readers[queue].finish([(request, ReplyHeader(code=int(code), message="so"), payload)])
        self.turn()

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.turn()  # answers on their way are of now
        self.now += seconds

    @rule(queue=st.sampled_from(QUEUES), really=RARELY)
    def switch_version(self, queue: str, really: bool) -> None:
        if really or queue not in self.here:
            self.here ^= {queue}
            self.publish()

    @rule(
        name=st.sampled_from(["m", "n"]),
        keep=st.sampled_from([True, True, False]),
        ttl=st.sampled_from([TTL, 2.0]),
        most=st.integers(0, 6),
        really=RARELY,
        coalesce=st.sampled_from([True, True, False]),
    )
    def set_policy(self, name: str, keep: bool, ttl: float, most: int, coalesce: bool, really: bool) -> None:
        if really or self.policies[name] is None:
            self.policies[name] = CachePolicy(keep, ttl, most * LIMIT // 4, coalesce) if most else None
            self.publish()

    @invariant()
    def bounds_hold(self) -> None:
        cache = self.cache
        assert cache.bytes == sum(shelf.bytes for shelf in cache.shelves.values()) <= LIMIT
        for shelf in cache.shelves.values():
            assert len(shelf) * OVERHEAD_BYTES <= shelf.bytes <= shelf.policy.max_bytes
            assert not shelf.bytes or shelf.policy.keep

    @invariant()
    def answers_are_ones_own(self) -> None:
        for caller in self.callers:
            assert len(caller.outcomes) <= 1
            for outcome in caller.outcomes:
                if isinstance(outcome, Reply) and not outcome.header.code:
                    answer = oip.ModelInferResponse.FromString(outcome.payload)
                    assert answer.id == caller.request_id
                    assert answer.model_version == caller.queue
                    assert answer.raw_output_contents[0] == caller.text.encode()
                elif isinstance(outcome, Reply):
                    assert outcome.header.code in (Code.INTERNAL, Code.DEADLINE_EXCEEDED)
                else:
                    assert caller.left
                    assert not isinstance(outcome, DeadlineExceeded)

    @invariant()
    def nothing_old_is_found(self) -> None:
        for shelf in self.cache.shelves.values():
            for key in list(shelf._entries):
                found = shelf.find(key)
                if found is not None:
                    made = oip.ModelInferResponse.FromString(found.payload)
                    assert self.now - made.parameters["now"].double_param < shelf.policy.ttl_seconds
                    assert made.model_version in self.here
                    assert made.id == ""


TestCached = Cached.TestCase
TestCached.settings = settings(
    max_examples=80,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

words = st.text(max_size=8)
values = st.one_of(
    st.booleans().map(lambda v: oip.InferParameter(bool_param=v)),
    st.integers(-5, 5).map(lambda v: oip.InferParameter(int64_param=v)),
    st.floats(-1, 1).map(lambda v: oip.InferParameter(double_param=v)),
    st.sampled_from(["", "1"]).map(lambda v: oip.InferParameter(string_param=v)),
    st.just(oip.InferParameter()),
)
names = st.sampled_from(["timeout", "priority", "sequence_id", "a"])


@st.composite
def requests(draw: st.DrawFn) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(
        model_name="m",
        model_version=draw(words),
        id=draw(words),
        parameters=draw(st.dictionaries(names, values, max_size=3)),
    )
    for raw in draw(st.lists(st.binary(max_size=3), max_size=2)):
        made.inputs.add(name=draw(words), datatype="UINT8", shape=[len(raw)])
        made.raw_input_contents.append(raw)
    for name in draw(st.lists(words, max_size=1)):
        made.outputs.add(name=name)
    return made


def key(data: bytes) -> bytes:
    found = key_of(target(QUEUES[0]), "m", PAYLOAD_FORMAT_OIP_GRPC, 0, data)
    assert found is not None
    return found[0]


def deciding(message: oip.ModelInferRequest) -> bytes:
    """Return all of a request that may decide its answer, as protobuf writes it."""
    rest = oip.ModelInferRequest()
    rest.CopyFrom(message)
    for name in ("model_version", "id"):
        rest.ClearField(name)
    for name in ("timeout", "priority"):
        rest.parameters.pop(name, None)
    return rest.SerializeToString(deterministic=True)


@given(requests(), requests())
def test_two_requests_have_one_key_just_if_they_ask_for_the_same(
    one: oip.ModelInferRequest, other: oip.ModelInferRequest
) -> None:
    for message in (one, other):
        for again in (message.SerializeToString(), message.SerializeToString(deterministic=True)):
            assert key(again) == key(message.SerializeToString())
    same = key(one.SerializeToString()) == key(other.SerializeToString())
    assert same == (deciding(one) == deciding(other))


@given(st.lists(requests(), min_size=1, max_size=3), words)
def test_joined_messages_never_share_a_key_with_what_means_something_else(
    messages: list[oip.ModelInferRequest], request_id: str
) -> None:
    data = b"".join(message.SerializeToString() for message in messages)
    merged = oip.ModelInferRequest.FromString(data)
    assert split(data)[0].decode() == merged.id
    renamed = with_id(data, request_id.encode())
    assert split(renamed)[0].decode() == oip.ModelInferRequest.FromString(renamed).id == request_id
    assert key(renamed) == key(data)


@given(requests(), words)
def test_an_answer_takes_one_id_off_and_another_one_on(
    message: oip.ModelInferRequest, request_id: str
) -> None:
    answer = oip.ModelInferResponse(model_name="m", id=message.id)
    answer.raw_output_contents.extend(message.raw_input_contents)
    bare = without_id(answer.SerializeToString())
    changed = oip.ModelInferResponse.FromString(with_id(bare, request_id.encode()))
    answer.id = request_id
    assert changed == answer
    answer.id = ""
    assert bare == answer.SerializeToString()


@given(st.binary(max_size=60))
def test_what_is_no_message_has_no_key_or_fails_alike_for_everybody(data: bytes) -> None:
    found = key_of(target(QUEUES[0]), "m", PAYLOAD_FORMAT_OIP_GRPC, 0, data)
    assert found is None or len(found[0]) == 32


def test_bodies_in_json_are_told_apart_by_every_byte_and_by_where_their_json_ends() -> None:
    def of(parts: Iterable[tuple[str, int, bytes]]) -> set[bytes]:
        found = set()
        for name, length, body in parts:
            one = key_of(target(QUEUES[0]), name, PAYLOAD_FORMAT_OIP_REST, length, body)
            assert one is not None
            assert one[1] == b""
            found.add(one[0])
        return found

    assert (
        len(of([("m", 0, b"{}"), ("m", 0, b"{ }"), ("m", 1, b"{}"), ("m@a", 0, b"{}"), ("m", 0, b"{}")])) == 4
    )
    assert key_of(target(QUEUES[0]), "m", PAYLOAD_FORMAT_OIP_REST, 0, bytes(MAX_KEYED_BYTES + 1)) is None
    assert key_of(target(QUEUES[0]), "m", PAYLOAD_FORMAT_OIP_REST, 0, b"") != key_of(
        target(QUEUES[1]), "m", PAYLOAD_FORMAT_OIP_REST, 0, b""
    )
