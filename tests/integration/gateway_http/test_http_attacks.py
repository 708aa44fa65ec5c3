"""What callers may cost: each flood, bomb and stall that servers were felled by, and some of our own."""

import asyncio
import contextlib
import resource
import socket

import pytest

from penstock_gateway.hotpath.http import carrier, control, frames, http1, http2, server
from support.http_world import GRPC, Line, Peer, ToyWorld, data, grpc, toy_world, until

HOST = b"Host: toy\r\n"
OK = frames.END_HEADERS | frames.END_STREAM


async def served(world: ToyWorld) -> None:
    """See that others are still served."""
    peer, line = await Peer.connect(world), await Line.connect(world)
    peer.call(1, "/plan/echo", grpc(b"x"), GRPC)
    line.send(b"GET /app/echo HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (await peer.answer(1)).trailers[b"grpc-status"] == b"0"
    assert (await line.answer()).status == 200
    await peer.close()
    await line.close()


class TestFloods:
    @pytest.fixture(autouse=True)
    def still_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Forgive no frames while a flood runs: a tick in its midst left it below the limit."""
        monkeypatch.setattr(server, "TICK_SECONDS", 3600.0)

    @pytest.mark.parametrize(
        "frame",
        [
            frames.frame(frames.PING, 0, 0, bytes(8)),
            frames.frame(frames.PING, frames.ACK, 0, bytes(8)),
            frames.settings(),
            frames.frame(frames.SETTINGS, frames.ACK, 0),
            frames.frame(frames.PRIORITY, 0, 3, bytes(5)),
            frames.goaway(0, 0),
            frames.frame(0x42, 0, 0),
            frames.reset(1, frames.CANCEL),
            data(3, b""),
            frames.frame(frames.DATA, frames.PADDED, 3, b"\x00"),
        ],
    )
    async def test_frames_that_cost_a_caller_nothing_are_counted(self, world: ToyWorld, frame: bytes) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", end=True), peer.head(3, "/app/unread"))
        await peer.answer(1)
        peer.send(frame * 4100)
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM
        await served(world)

    async def test_a_second_gives_a_caller_its_frames_back(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        for _ in range(5):
            peer.send(frames.frame(frames.PING, frames.ACK, 0, bytes(8)) * 3900)
            await peer.is_alive()
            for _ in range(4):
                world.pass_time(0)

    async def test_calls_that_are_reset_at_once(self, world: ToyWorld) -> None:
        """CVE-2023-44487."""
        peer = await Peer.connect(world)
        for number in range(1, 8300, 2):
            peer.send(peer.head(number, "/plan/hold", end=True), frames.reset(number, frames.CANCEL))
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM
        assert world.ran == world.cancelled
        await served(world)

    async def test_calls_that_the_server_must_reset(self, world: ToyWorld) -> None:
        """MadeYouReset (CVE-2025-8671)."""
        peer = await Peer.connect(world)
        for number in range(1, 8300, 2):
            peer.send(peer.head(number, "/plan/hold"), frames.window_update(number, 0))
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM

    async def test_heads_that_never_end(self, world: ToyWorld) -> None:
        """CVE-2024-27316 and its kin."""
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.HEADERS, 0, 1, b"\x83"))
        peer.send(frames.frame(frames.CONTINUATION, 0, 1, bytes(1000)) * 70)
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.HEADERS, 0, 1, b"\x83"), frames.frame(frames.CONTINUATION, 0, 1) * 4100)
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.HEADERS, 0, 1, b"\x83"))
        peer.send(frames.frame(frames.CONTINUATION, 0, 1, b"\x86"))
        await peer.until(lambda: peer.acks)
        world.pass_time(http2.HEAD_SECONDS + 1)
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM

    async def test_windows_changed_for_thousands_of_streams_again_and_again(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(*(peer.head(2 * number + 1, "/plan/hold") for number in range(2048)))
        flip = [frames.settings((frames.INITIAL_WINDOW_SIZE, size)) for size in (1, 65_535)]
        peer.send(b"".join(flip) * 70)
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM

    async def test_an_answer_taken_byte_by_byte(self, world: ToyWorld) -> None:
        """CVE-2019-9511."""
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 0))
        peer.call(1, "/plan/big?bytes=100000", b"")
        peer.send(frames.window_update(1, 1) * 4100)
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM

    async def test_many_streams_that_wait_cost_nothing_when_others_move(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 0))
        for number in range(1, 4001, 2):
            peer.call(number, "/plan/echo", b"waits")
        peer.send(frames.window_update(3999, 1000))
        assert (await peer.answer(3999)).body == b"waits"
        peer.send(frames.window_update(0, 1) * 6000)
        await peer.is_alive()
        peer.send(frames.settings((frames.INITIAL_WINDOW_SIZE, 1000)))
        assert (await peer.answer(1)).body == b"waits"


class TestHeads:
    async def test_a_small_head_that_unfolds_to_a_large_one(self, world: ToyWorld) -> None:
        """An HPACK bomb."""
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", (b"x-bomb", b"v" * 3900), end=True))
        assert (await peer.answer(1)).status == 200
        peer.send(frames.frame(frames.HEADERS, OK, 3, b"\x83\x86\x84" + b"\xbe" * 10_000))
        assert await peer.end_code() == frames.ENHANCE_YOUR_CALM

    async def test_a_head_that_is_too_large(self, world: ToyWorld) -> None:
        block = b"\x83\x86\x84\x00\x01x\x7f" + bytes((70_000 - 127 & 0x7F | 0x80,))
        block += bytes((70_000 - 127 >> 7 & 0x7F | 0x80, 70_000 - 127 >> 14)) + b"v" * 70_000
        for sent in (block, block[:66_000], block * 3):
            peer = await Peer.connect(world)
            peer.send(frames.frame(frames.HEADERS, OK, 1, sent))
            assert await peer.end_code() == frames.ENHANCE_YOUR_CALM

    async def test_a_head_of_too_many_headers(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", *((b"x-%d" % number, b"") for number in range(300)), end=True))
        assert await peer.reset_code(1) == frames.PROTOCOL_ERROR

    async def test_large_heads_are_not_remembered(self, world: ToyWorld) -> None:
        peer, line = await Peer.connect(world), await Line.connect(world)
        for number in range(1, 200, 2):
            value = b"%d" % number + b"v" * 5000
            block = peer.block("/plan/echo")
            block += b"\x00\x01x\x7f" + bytes((len(value) - 127 & 0x7F | 0x80, len(value) - 127 >> 7)) + value
            peer.send(frames.frame(frames.HEADERS, OK, number, block))
            line.send(b"GET /app/echo HTTP/1.1\r\n%bX: %b\r\n\r\n" % (HOST, value))
            await line.answer()
            await peer.answer(number)
        assert not world.server.heads
        [connection] = [c for c in world.server._connections if isinstance(c, http2.Http2Connection)]
        assert not connection._heads

    async def test_remembered_heads_are_bounded(self, world: ToyWorld) -> None:
        peer, line = await Peer.connect(world), await Line.connect(world)
        for number in range(1500):
            line.send(b"GET /app/echo HTTP/1.1\r\n%bX: %d\r\n\r\n" % (HOST, number))
            await line.answer()
        assert len(world.server.heads) <= 1024
        for number in range(1, 1000, 2):
            block = b"\x83\x86\x84\x00\x01x\x04%04d" % number
            peer.send(frames.frame(frames.HEADERS, OK, number, block))
            await peer.answer(number)
        [connection] = [c for c in world.server._connections if isinstance(c, http2.Http2Connection)]
        assert len(connection._heads) <= 64


class TestSlowness:
    @pytest.mark.parametrize("start", [b"", b"P", b"PRI * HTTP/2.0\r\n\r\nSM"])
    async def test_connections_that_say_nothing_are_closed(self, world: ToyWorld, start: bytes) -> None:
        line = await Line.connect(world)
        line.send(start)
        await until(lambda: world.server.connections == 1)
        world.pass_time(server.FIRST_BYTES_SECONDS + 1)
        assert await line.ends()

    @pytest.mark.parametrize("start", [b"", frames.settings((1, 1))[:10]])
    async def test_http_2_without_settings_is_closed(self, world: ToyWorld, start: bytes) -> None:
        peer = await Peer.connect(world, greet=False)
        peer.send(frames.PREFACE, start)
        await peer.until(lambda: peer.settings)
        world.pass_time(http2.HEAD_SECONDS + 1)
        with pytest.raises(ConnectionResetError):
            await peer.until(lambda: False)

    async def test_a_head_in_drops_is_refused(self, world: ToyWorld) -> None:
        line = await Line.connect(world)
        line.send(b"GET / HT")
        await until(lambda: world.server._connections)
        line.send(b"TP/1.1\r\n")
        world.pass_time(http1.HEAD_SECONDS + 1)
        answer = await line.answer()
        assert (answer.status, b"DEADLINE_EXCEEDED" in answer.body) == (408, True)
        assert await line.ends()

    async def test_a_head_may_begin_long_after_the_last_call(self, world: ToyWorld) -> None:
        line = await Line.connect(world)
        line.send(b"GET /app/echo HTTP/1.1\r\n%b\r\n" % HOST)
        await line.answer()
        [connection] = world.server._connections
        assert isinstance(connection, http1.Http1Connection)
        connection._since -= 200
        line.send(b"GET /app/echo HTTP/1.1\r\n")
        await until(lambda: connection._buffer)
        world.pass_time(http1.HEAD_SECONDS - 1)
        line.send(HOST + b"\r\n")
        assert (await line.answer()).status == 200

    async def test_a_body_that_does_not_come_is_answered_at_the_plans_timeout(self, world: ToyWorld) -> None:
        line, peer = await Line.connect(world), await Peer.connect(world)
        line.send(b"POST /plan/echo HTTP/1.1\r\n%bX-Timeout: 5\r\nContent-Length: 10\r\n\r\nabc" % HOST)
        peer.send(peer.head(1, "/plan/echo", GRPC, (b"x-timeout", b"5")), data(1, b"\x00\x00"))
        peer.send(peer.head(3, "/plan/echo", GRPC, (b"x-timeout", b"5")))
        peer.send(peer.head(5, "/plan/echo", GRPC, (b"x-timeout", b"9")))
        await until(lambda: world.server.held_bytes == 5)
        world.pass_time(6)
        assert (await line.answer()).status == 504
        for number in (1, 3):
            assert (await peer.answer(number)).fields[b"grpc-status"] == b"4"
            await peer.until(lambda number=number: peer.answers[number].code == frames.NO_ERROR)
        # What comes after all is not run.
        peer.send(data(1, b"\x00\x00\x00", end=True), data(3, grpc(b""), end=True))
        peer.send(data(5, grpc(b"in time"), end=True))
        assert (await peer.answer(5)).body == grpc(b"in time")
        assert (world.ran, world.server.held_bytes) == (1, 0)
        assert await line.ends()

    async def test_a_refused_call_whose_answer_waits_is_not_run_when_its_body_comes(
        self, world: ToyWorld
    ) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 0))
        peer.send(peer.head(1, "/plan/echo", (b"x-timeout", b"5")))
        await peer.is_alive()
        world.pass_time(6)
        peer.send(data(1, b"late", end=True), frames.window_update(1, 1000))
        assert (await peer.answer(1)).status == 504
        assert (world.ran, world.refused) == (0, 1)

    async def test_a_body_for_the_application_that_does_not_come_is_given_up(self, world: ToyWorld) -> None:
        line = await Line.connect(world)
        line.send(b"POST /app/echo HTTP/1.1\r\n%bContent-Length: 10\r\n\r\nabc" % HOST)
        await until(lambda: world.scopes)
        world.pass_time(http1.BODY_SECONDS - 1)
        assert world.server.open_calls == 1
        world.pass_time(http1.BODY_SECONDS + 1)
        assert (await line.answer()).status == 408
        assert await line.ends()
        await until(lambda: world.left == 1)

    async def test_an_idle_connection_of_http_1_is_closed(self, world: ToyWorld) -> None:
        line = await Line.connect(world)
        line.send(b"GET /app/echo HTTP/1.1\r\n%b\r\n" % HOST)
        await line.answer()
        world.pass_time(http1.IDLE_SECONDS - 1)
        assert world.server.connections == 1
        world.pass_time(http1.IDLE_SECONDS + 1)
        assert await line.ends()

    async def test_a_quiet_connection_of_http_2_is_asked_for_a_sign_of_life(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        await peer.until(lambda: peer.acks)
        [connection] = world.server._connections
        assert isinstance(connection, http2.Http2Connection)
        for count in (1, 2):
            world.pass_time(http2.QUIET_SECONDS + 1)
            await peer.until(lambda count=count: len(peer.pings) == count)
            peer.send(frames.frame(frames.PING, frames.ACK, 0, peer.pings[-1]))
            await peer.is_alive()
            connection._asked = connection._heard - 1  # as it is if the time has really passed
        world.pass_time(http2.QUIET_SECONDS + 1)
        world.pass_time(http2.QUIET_SECONDS + http2.PATIENCE_SECONDS + 2)
        with pytest.raises(ConnectionResetError):
            await peer.until(lambda: False)


class TestUnreadAnswers:
    async def test_answers_that_nobody_reads_are_given_up_when_they_are_too_many(self) -> None:
        async with toy_world(max_body_bytes=1 << 22) as world:
            stalled = await Peer.connect(world)  # its windows are never opened
            for number in range(1, 21, 2):
                stalled.call(number, "/plan/big?bytes=1000000", b"")
            deaf = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, frames.MAX_WINDOW))
            deaf.send(frames.window_update(0, frames.MAX_WINDOW - 65_535))
            deaf.call(1, "/plan/big?bytes=30000000", b"")
            silent = await Line.connect(world)
            silent.send(b"POST /plan/big?bytes=30000000 HTTP/1.1\r\n%bContent-Length: 0\r\n\r\n" % HOST)
            await until(lambda: world.ran == 12)
            world.pass_time(0)
            world.pass_time(1)
            await until(lambda: world.server.connections == 0)
            await served(world)

    async def test_a_reader_that_stalls_is_given_up_after_a_while(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.call(1, "/plan/big?bytes=1000000", b"")
        peer.call(3, "/app/big?bytes=1000000", b"")
        await peer.until(lambda: sum(len(answer.body) for answer in peer.answers.values()) == 65_535)
        world.pass_time(http2.STALLED_SECONDS - 1)
        world.pass_time(http2.STALLED_SECONDS + 1)
        assert await peer.reset_code(1) == frames.CANCEL
        assert await peer.reset_code(3) == frames.CANCEL
        await until(lambda: world.server.open_calls == 0)

    async def test_a_socket_that_takes_nothing_is_given_up(self, world: ToyWorld) -> None:
        line, peer = await Line.connect(world), await Peer.connect(world)
        line.send(b"POST /plan/big?bytes=30000000 HTTP/1.1\r\n%bContent-Length: 0\r\n\r\n" % HOST)
        peer.send(frames.settings((frames.INITIAL_WINDOW_SIZE, 1 << 30)), frames.window_update(0, 1 << 30))
        peer.call(1, "/app/big?bytes=30000000", b"")
        peer.call(3, "/plan/big?bytes=30000000", b"")
        await until(lambda: world.ran == 2 and all(c.paused for c in world.server._connections))
        world.pass_time(0)
        world.pass_time(carrier.STUCK_SECONDS + 1)
        await until(world.is_empty)

    async def test_pipelined_calls_wait_for_answers_to_be_read(self, world: ToyWorld) -> None:
        line = await Line.connect(world)
        calls = 300
        request = b"POST /plan/big?bytes=100000 HTTP/1.1\r\n%bContent-Length: 0\r\n\r\n" % HOST
        sending = asyncio.create_task(_send(line, request * calls))
        await until(lambda: any(c.paused for c in world.server._connections))
        await served(world)
        assert world.ran < calls / 2
        for _ in range(calls):
            assert len((await line.answer()).body) == 100_000
        await sending

    async def test_pings_whose_answers_nobody_reads_are_read_no_more(
        self, world: ToyWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http2, "MAX_CHEAP_FRAMES", 10_000_000)  # as if they came over a long time
        peer = await Peer.connect(world, limit=1024)
        await peer.until(lambda: peer.acks)
        [connection] = world.server._connections
        assert isinstance(connection, http2.Http2Connection)
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        pings = frames.frame(frames.PING, 0, 0, bytes(8)) * 4000
        for _ in range(200):
            peer.send(pings)
            await asyncio.sleep(0)
        await until(lambda: connection._deaf)
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < 2 * carrier.DEAF_BYTES


async def _send(line: Line, what: bytes) -> None:
    line.send(what)
    await line.writer.drain()


class TestMemory:
    async def test_bodies_beyond_the_budget_are_refused_and_their_memory_is_free_again(self) -> None:
        async with toy_world(max_body_bytes=1_000_000) as world:
            first, second = await Peer.connect(world), await Peer.connect(world)
            line, other = await Line.connect(world), await Line.connect(world)
            first.send(first.head(1, "/plan/echo", GRPC))
            for _ in range(54):
                first.send(data(1, bytes(16_384)))
            first.send(first.head(3, "/app/unread"), data(3, bytes(16_384)))
            await until(lambda: world.server.held_bytes == 55 * 16_384)
            second.send(second.head(1, "/plan/echo", GRPC))
            for _ in range(8):
                second.send(data(1, bytes(16_384)))
            assert (await second.answer(1)).fields[b"grpc-status"] == b"8"
            second.send(second.head(3, "/app/unread"))
            for _ in range(8):
                second.send(data(3, bytes(16_384)))
            assert await second.reset_code(3) == frames.ENHANCE_YOUR_CALM
            line.send(b"POST /plan/echo HTTP/1.1\r\n%bContent-Length: 200000\r\n\r\n" % HOST, bytes(190_000))
            assert (await line.answer()).status == 429
            other.send(
                b"POST /app/unread HTTP/1.1\r\n%bContent-Length: 200000\r\n\r\n" % HOST, bytes(190_000)
            )
            answer = await other.answer()
            assert (answer.status, b"OVERLOADED" in answer.body) == (503, True)
            await until(lambda: world.server.held_bytes == 55 * 16_384)
            first.send(data(1, b"", end=True), frames.reset(3, frames.CANCEL))
            await until(lambda: world.server.held_bytes == 0)
            await served(world)

    async def test_a_body_over_the_plans_limit_is_refused_before_it_is_whole(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", GRPC, (b"x-limit", b"20000")))
        peer.send(data(1, bytes(16_384)), data(1, bytes(16_384)))
        assert (await peer.answer(1)).fields[b"grpc-status"] == b"8"
        assert world.server.held_bytes == 0

    @pytest.mark.parametrize(
        ("limits", "allowed", "connections"),
        [
            ((1024, 2048), (2048, 2048), 1792),
            ((1024, 1 << 20), (8448, 1 << 20), 8192),
            ((300, 300), (300, 300), 150),
            ((1024, resource.RLIM_INFINITY), (8448, resource.RLIM_INFINITY), 8192),
            ((1 << 20, 1 << 20), None, 8192),
            ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 8192),
        ],
    )
    def test_as_many_connections_are_allowed_as_files_may_be_opened(
        self,
        monkeypatch: pytest.MonkeyPatch,
        limits: tuple[int, int],
        allowed: tuple[int, int] | None,
        connections: int,
    ) -> None:
        asked: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: asked.append(wanted))
        assert server._allow_connections() == connections
        assert asked == ([allowed] if allowed else [])

    async def test_connections_are_bounded_and_idle_ones_make_room(self, world: ToyWorld) -> None:
        world.server._max_connections = 20
        idle = [await Line.connect(world) for _ in range(10)]
        for line in idle:
            line.send(b"GET /app/echo HTTP/1.1\r\n%b\r\n" % HOST)
            await line.answer()
        peers = [await Peer.connect(world) for _ in range(9)]
        for peer in peers:
            peer.send(peer.head(1, "/plan/hold", end=True))
            await peer.is_alive()
        await served_once(world)
        more = await Line.connect(world)
        await until(lambda: world.server.connections == 20)
        refused = await Line.connect(world)
        assert await refused.ends()
        world.pass_time(server.CROWDED_IDLE_SECONDS + 1)
        for line in idle:
            assert await line.ends()
        await until(lambda: world.server.connections <= 10)
        for peer in peers:
            await peer.is_alive()
        await more.close()


async def served_once(world: ToyWorld) -> None:
    """See that one more caller is served."""
    line = await Line.connect(world)
    line.send(b"GET /app/echo HTTP/1.1\r\n%bConnection: close\r\n\r\n" % HOST)
    assert (await line.answer()).status == 200
    await line.close()
    with contextlib.suppress(TimeoutError):
        await until(lambda: world.server.connections < 20)


async def test_small_credit_is_no_fault_and_makes_no_small_frames(world: ToyWorld) -> None:
    """Some callers allow on each few bytes that they read."""
    peer = await Peer.connect(world)
    peer.call(1, "/app/big?bytes=200000", b"")
    await peer.until(lambda: 1 in peer.answers and len(peer.answers[1].body) == 65_535)
    small = frames.window_update(0, 10) + frames.window_update(1, 10)
    peer.send(small * 102)
    await peer.is_alive()
    assert len(peer.answers[1].body) == 65_535
    peer.send(small)
    await peer.until(lambda: len(peer.answers[1].body) >= 65_535 + control.WORTHWHILE_BYTES)
    peer.send(small * 13_400)
    assert len((await peer.answer(1)).body) == 200_000
