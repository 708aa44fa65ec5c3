"""However bytes are cut, changed or mixed: the same answers, or an orderly end, and nothing left behind."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import hpack
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock_gateway.hotpath.http import frames
from penstock_gateway.hotpath.http.chunks import ChunkReader, MalformedChunks
from penstock_gateway.hotpath.http.head import MalformedHead, from_fields
from penstock_gateway.hotpath.http.hpack import HeadReader
from penstock_gateway.hotpath.http.http1 import Http1Connection
from penstock_gateway.hotpath.http.http2 import Http2Connection
from penstock_gateway.hotpath.http.parts import Parts
from support.http_world import GRPC, Peer, ToyWorld, data, grpc, toy_world

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return uvloop.run(coroutine)


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.over = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.over, "written to after the end"
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.over = True

    def close(self) -> None:
        self.over = True

    def abort(self) -> None:
        self.over = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def settle(wire: Wire | None = None) -> None:
    """Let the loop go round until nothing more is sent."""
    quiet = 0
    while quiet < 12:
        before = len(wire.sent) if wire else 0
        await asyncio.sleep(0)
        quiet = quiet + 1 if not wire or len(wire.sent) == before else 0


async def play(kind: type[Http1Connection] | type[Http2Connection], pieces: list[bytes]) -> bytes:
    """Feed pieces to a connection, end it, see that nothing is left; return what it sent."""
    world = ToyWorld()
    connection, wire = kind(world.server), Wire()
    connection.connection_made(wire)
    for piece in pieces:
        if piece:
            connection.data_received(piece)
        await settle()
    await settle(wire)
    world.go_on.set()
    connection.connection_lost(None)
    await settle()
    assert not world.server.held_bytes
    assert not world.server.connections
    assert not world.server.open_calls
    if isinstance(connection, Http2Connection):
        assert not connection._streams
        assert not connection._ready
        assert not connection._roomless
    return bytes(wire.sent)


def split(whole: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut % (len(whole) + 1) for cut in cuts} | {len(whole)})
    return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def answers_2(sent: bytes) -> dict[int, tuple[Any, ...]]:
    """Return the answers in what an HTTP/2 server sent, by stream."""
    decoder = hpack.Decoder()
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(sent):
        high, low, kind, flags, stream = frames.HEADER.unpack_from(sent, at)
        payload = sent[at + 9 : at + 9 + (high << 8 | low)]
        at += 9 + len(payload)
        answer = found.setdefault(stream, [[], b"", False, None])
        if kind == frames.HEADERS:
            answer[0] += decoder.decode(payload, raw=True)
        elif kind == frames.DATA:
            answer[1] += payload
        elif kind == frames.RST_STREAM:
            answer[3] = int.from_bytes(payload, "big")
        if kind in (frames.DATA, frames.HEADERS) and flags & frames.END_STREAM:
            answer[2] = True
    found.pop(0, None)
    return {stream: tuple(answer) for stream, answer in found.items()}


def calls_2(sizes: list[int]) -> bytes:
    """Return calls of all kinds, with bodies of these sizes."""
    peer = Peer.__new__(Peer)
    peer.encoder = hpack.Encoder()
    out = [frames.settings((frames.INITIAL_WINDOW_SIZE, 1 << 24)), frames.window_update(0, 1 << 24)]
    for number, size in enumerate(sizes):
        stream = 2 * number + 1
        body = (b"%d," % number * (size // 2 + 1))[:size]
        path = ("/plan/echo", "/app/echo", "/plan/later", "/app/stream")[number % 4]
        if number % 3 == 2:
            head = peer.block(path, (b"x-n", b"%d" % number))
            out.append(frames.frame(frames.HEADERS, frames.HAS_PRIORITY, stream, bytes(5) + head[:7]))
            out.append(frames.frame(frames.CONTINUATION, frames.END_HEADERS, stream, head[7:]))
        else:
            out.append(peer.head(stream, path, GRPC))
        message = grpc(body)
        out.append(data(stream, message[: size // 2]))
        out.append(frames.frame(frames.PING, 0, 0, b"%08d" % number))
        out.append(
            frames.frame(frames.DATA, frames.PADDED, stream, b"\x03" + message[size // 2 :] + bytes(3))
        )
        out.append(data(stream, b"", end=True))
    return b"".join(out)


def calls_1(sizes: list[int]) -> bytes:
    out = []
    for number, size in enumerate(sizes):
        body = (b"%d," % number * (size // 2 + 1))[:size]
        path = (b"/plan/echo", b"/app/echo", b"/plan/later")[number % 3]
        if number % 4 == 3:
            half = size // 2
            chunks = [part for part in (body[:half], body[half:]) if part]
            framed = b"".join(b"%x;e=1\r\n%b\r\n" % (len(part), part) for part in chunks)
            head = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % path
            out.append(head + framed + b"0\r\nX: y\r\n\r\n")
        else:
            head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path, size)
            out.append(head + body)
    return b"".join(out)


SIZES = st.lists(st.sampled_from([0, 1, 5, 300, 5000, 70_000]), min_size=1, max_size=8)
CUTS = st.lists(st.integers(0, 1 << 20), max_size=40)


@SLOW
@given(SIZES, CUTS)
def test_answers_of_http_2_do_not_depend_on_where_packets_end(sizes: list[int], cuts: list[int]) -> None:
    whole = calls_2(sizes)
    expected = answers_2(run(play(Http2Connection, [whole])))
    assert len(expected) == len(sizes)
    assert all(answer[2] for answer in expected.values())
    assert answers_2(run(play(Http2Connection, split(whole, cuts)))) == expected


@settings(deadline=None, max_examples=3)
@given(st.lists(st.sampled_from([0, 1, 5, 40]), min_size=1, max_size=6))
def test_answers_do_not_depend_on_packets_of_one_byte(sizes: list[int]) -> None:
    for kind, calls in ((Http2Connection, calls_2), (Http1Connection, calls_1)):
        whole = calls(sizes)
        sent = [run(play(kind, pieces)) for pieces in ([whole], [bytes((b,)) for b in whole])]
        if kind is Http2Connection:
            assert answers_2(sent[0]) == answers_2(sent[1])
        else:
            assert sent[0] == sent[1]


@SLOW
@given(SIZES, CUTS)
def test_answers_of_http_1_do_not_depend_on_where_packets_end(sizes: list[int], cuts: list[int]) -> None:
    whole = calls_1(sizes)
    expected = run(play(Http1Connection, [whole]))
    assert expected.count(b"HTTP/1.1 200 OK") == len(sizes)
    assert run(play(Http1Connection, split(whole, cuts))) == expected


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "insert", "delete", "repeat", "cut"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=8,
)


def change(whole: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    out = bytearray(whole)
    for how, where, what in changes:
        at = where % (len(out) + 1)
        if how == "set":
            out[at : at + len(what)] = what
        elif how == "flip":
            out[at : at + 1] = bytes(b ^ 1 << (what[0] & 7) for b in out[at : at + 1])
        elif how == "insert":
            out[at:at] = what
        elif how == "delete":
            del out[at : at + what[0]]
        elif how == "repeat":
            out[at:at] = out[at : at + what[0]]
        else:
            del out[at:]
    return bytes(out)


@settings(SLOW, max_examples=250)
@given(
    st.lists(st.sampled_from([0, 1, 5, 300]), min_size=1, max_size=5),
    CHANGES,
    CUTS,
    st.sampled_from([(Http1Connection, calls_1), (Http2Connection, calls_2)]),
)
def test_changed_bytes_end_a_connection_at_worst(
    sizes: list[int], changes: list[tuple[str, int, bytes]], cuts: list[int], kind: Any
) -> None:
    run(play(kind[0], split(change(kind[1](sizes), changes), cuts)))


@settings(SLOW, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10),
            st.integers(0, 255),
            st.sampled_from([0, 1, 2, 3, 5, 7]),
            st.binary(max_size=40),
        ),
        max_size=25,
    )
)
def test_any_frames_end_a_connection_at_worst(made: list[tuple[int, int, int, bytes]]) -> None:
    frames_ = [frames.frame(kind, flags, stream, payload) for kind, flags, stream, payload in made]
    run(play(Http2Connection, [calls_2([5, 5]), *frames_]))


NAMES = st.sampled_from([b"grpc-timeout", b"x-a", b"x-b", b"traceparent", b"authorization"])
VALUES = st.one_of(st.sampled_from([b"1S", b"999m", b"v" * 100, b"w" * 2000, b""]), st.binary(max_size=0))
HOWS = st.sampled_from(["index", "plain", "never"])


@SLOW
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(NAMES, VALUES, HOWS), max_size=4),
            st.sampled_from([None, None, None, 0, 100, 4096]),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_remembered_heads_are_those_that_a_reader_without_memory_finds(
    calls: list[tuple[list[tuple[bytes, bytes, str]], int | None, bool]],
) -> None:
    encoder, naive = hpack.Encoder(), hpack.Decoder()
    naive.max_allowed_table_size = 4096
    reader = HeadReader(lambda _: None)
    found = 0
    for extra, size, huffman in calls:
        if size is not None:
            encoder.header_table_size = size
        fields: list[Any] = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x")]
        for name, value, how in extra:
            if how == "index":
                fields.append((name, value))
            else:
                fields.append(hpack.NeverIndexedHeaderTuple(name, value))
        block = bytes(encoder.encode(fields, huffman=huffman))
        expected = from_fields([(bytes(n), bytes(v)) for n, v in naive.decode(block, raw=True)])
        head = reader.heads.get(block)
        if head is None:
            head = reader.head(block)
        else:
            found += 1
        assert (head.method, head.raw_path, head.headers) == (
            expected.method,
            expected.raw_path,
            expected.headers,
        )


@settings(max_examples=200)
@given(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=20)), max_size=8))
def test_a_head_is_read_or_called_malformed(fields: list[tuple[bytes, bytes]]) -> None:
    base = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/")]
    try:
        head = from_fields(base + fields)
    except MalformedHead:
        return
    assert all(
        name == name.lower() and b"\r" not in value and b"\n" not in value for name, value in head.headers
    )


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), CUTS, st.binary(max_size=30))
def test_chunks_are_read_wherever_packets_end(chunks: list[bytes], cuts: list[int], rest: bytes) -> None:
    whole = b"".join(b"%X\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n" + rest
    reader, body = ChunkReader(), b""
    left = b""
    for piece in split(whole, cuts):
        if reader.done:
            left += piece
            continue
        part, behind = reader.read(piece)
        body += part
        left += behind
    assert (body, left, reader.done) == (b"".join(chunks), rest, True)


@given(st.binary(max_size=100), CUTS)
def test_any_bytes_are_chunks_or_called_malformed_wherever_packets_end(whole: bytes, cuts: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> tuple[bytes, bool] | None:
        reader, body = ChunkReader(), b""
        try:
            for piece in pieces:
                if not reader.done:
                    body += reader.read(piece)[0]
        except MalformedChunks:
            return None
        return body, reader.done

    assert outcome([whole]) == outcome(split(whole, cuts))


@given(st.lists(st.binary(max_size=300), max_size=300))
def test_parts_are_joined_in_their_order(pieces: list[bytes]) -> None:
    parts = Parts()
    for piece in pieces:
        parts.add(piece)
    assert bool(parts) == any(pieces)
    assert parts.join() == b"".join(pieces)
    assert parts.join() == b""


def test_tiny_parts_do_not_cost_many_times_their_size() -> None:
    parts = Parts()
    for _ in range(100_000):
        parts.add(b"x")
    assert len(parts._parts) < 2000


@settings(SLOW, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 120_000),
            st.sampled_from(["/plan/echo", "/plan/later", "/app/echo", "/app/stream"]),
        ),
        min_size=2,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
    st.sampled_from([1000, 16_384, 65_535, 1 << 20]),
)
def test_many_streams_at_once_each_get_their_own_bytes(
    calls: list[tuple[int, str]], random: Any, window: int
) -> None:
    async def scenario() -> None:
        async with toy_world() as world:
            peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, window))
            peer.generous = True
            queues: list[list[bytes]] = []
            bodies = {}
            for number, (size, path) in enumerate(calls):
                stream = 2 * number + 1
                body = bodies[stream] = grpc(bytes((number,)) * size)
                peer.send(peer.head(stream, path, GRPC))
                rows, at = [], 0
                while at < len(body):
                    step = random.choice([1, 100, 16_384])
                    rows.append(data(stream, body[at : at + step], end=at + step >= len(body)))
                    at += step
                    if len(rows) > 40:
                        rows += [
                            data(stream, body[a : a + 16_384], end=a + 16_384 >= len(body))
                            for a in range(at, len(body), 16_384)
                        ]
                        break
                queues.append(rows[::-1])
            while queues:
                queue = random.choice(queues)
                peer.send(queue.pop())
                if not queue:
                    queues.remove(queue)
            for stream, body in bodies.items():
                answer = await peer.answer(stream)
                assert answer.body == body
                assert answer.trailers == {b"grpc-status": b"0"} or calls[stream // 2][1] == "/app/echo"
            assert world.server.held_bytes == 0

    run(scenario())


@pytest.mark.parametrize("size", [16_384, 100_000, 1 << 18])
def test_large_frames_are_passed_on_piece_by_piece(size: int) -> None:
    peer = Peer.__new__(Peer)
    peer.encoder = hpack.Encoder()
    body = bytes(range(256)) * (size // 256)
    whole = frames.settings((frames.INITIAL_WINDOW_SIZE, 1 << 24)) + frames.window_update(0, 1 << 24)
    for number, path in ((1, "/plan/echo"), (3, "/app/echo")):
        whole += peer.head(number, path) + data(number, body) + data(number, body, end=True)
    for step in (1000, 16_393, 65_536):
        pieces = [whole[at : at + step] for at in range(0, len(whole), step)]
        for answer in answers_2(run(play(Http2Connection, pieces))).values():
            assert answer[1] == body * 2
