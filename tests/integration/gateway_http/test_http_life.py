"""Connections over their life: fairness, draining, late answers, and that nothing grows."""

import asyncio
import gc

import pytest

from penstock_gateway.hotpath.http import carrier, frames
from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.stream import Stream
from penstock_gateway.hotpath.http.turn import Turn
from support.http_world import GRPC, Line, Peer, Reset, ToyWorld, data, grpc, toy_world, until

HOST = b"Host: toy\r\n"
MIB = 1 << 20
WIDE = (frames.INITIAL_WINDOW_SIZE, 1 << 30)


async def drip(peer: Peer, stream: int, size: int) -> None:
    """Read slowly, and allow on as little as is read."""
    while len(peer.answers[stream].body) < size if stream in peer.answers else True:
        before = len(peer.answers[stream].body) if stream in peer.answers else 0
        assert await peer.read()
        came = len(peer.answers[stream].body) - before if stream in peer.answers else 0
        if came:
            peer.send(frames.window_update(0, came), frames.window_update(stream, came))


class TestFairness:
    @pytest.mark.parametrize("large", ["/plan/big", "/app/big"])
    async def test_a_large_answer_does_not_stall_small_calls_beside_it(
        self, world: ToyWorld, large: str
    ) -> None:
        size = 64 * MIB
        peer, other = await Peer.connect(world), await Peer.connect(world)
        peer.send(frames.window_update(0, MIB))
        peer.call(1, f"{large}?bytes={size}", b"")
        dripping = asyncio.create_task(drip(peer, 1, size))
        try:
            for number in range(3, 43, 2):
                peer.call(number, "/plan/later", grpc(b"small"), GRPC)
                await until(lambda number=number: number in peer.answers and peer.answers[number].ended)
                other.call(number, "/plan/later", grpc(b"small"), GRPC)
                await other.answer(number)
            assert len(peer.answers[1].body) < size
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)

    async def test_large_answers_come_side_by_side(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 0))
        for number in (1, 3, 5):
            peer.call(number, f"/plan/big?bytes={4 * MIB}", b"")
        peer.send(frames.settings(WIDE), frames.window_update(0, 1 << 30))
        await peer.until(lambda: any(answer.ended for answer in peer.answers.values()))
        assert all(len(peer.answers[number].body) > 3 * MIB for number in (1, 3, 5))

    async def test_a_large_body_does_not_stall_small_calls_beside_it(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo"))
        for number in range(3, 23, 2):
            peer.send(*(data(1, bytes(16_384)) for _ in range(3)))
            peer.call(number, "/plan/echo", grpc(b"small"), GRPC)
            assert (await peer.answer(number)).body == grpc(b"small")

    async def test_large_messages_go_both_ways(self, world: ToyWorld) -> None:
        body = bytes(range(256)) * (32 * MIB // 256)
        peer = await Peer.connect(world, WIDE, limit=1 << 20)
        peer.send(frames.window_update(0, 1 << 30), peer.head(1, "/plan/echo", GRPC))
        await peer.until(lambda: peer.settings)
        message, at, allowed = grpc(body), 0, MIB
        while at < len(message):
            if at < allowed:
                step = min(1 << 18, allowed - at)
                peer.send(data(1, message[at : at + step], end=at + step >= len(message)))
                at += step
            else:
                await peer.until(lambda at=at: peer.credit.get(1, 0) + MIB > at)
            allowed = MIB + peer.credit.get(1, 0)
        answer = await peer.answer(1)
        assert bytes(answer.body) == message
        assert answer.trailers == {b"grpc-status": b"0"}


class TestDraining:
    async def test_callers_are_asked_to_go_elsewhere_and_served_meanwhile(self) -> None:
        async with toy_world() as world:
            peer, line, idle = await Peer.connect(world), await Line.connect(world), await Line.connect(world)
            peer.call(1, "/plan/hold", b"")
            idle.send(b"GET /app/echo HTTP/1.1\r\n%b\r\n" % HOST)
            await idle.answer()
            line.send(b"POST /plan/hold HTTP/1.1\r\n%bContent-Length: 1\r\n\r\nx" % HOST)
            late = await Line.connect(world)
            await until(lambda: len(world.held) == 2 and world.server.connections == 4)
            world.server.refuse_new()
            await peer.until(lambda: peer.goaway == frames.NO_ERROR)
            assert peer.last_stream == frames.MAX_WINDOW
            peer.call(3, "/plan/echo", b"x")
            assert (await peer.answer(3)).status == 200
            # One that was on its way in is told as well.
            late.send(frames.PREFACE + frames.settings())
            told = Peer(late.reader, late.writer)
            await told.until(lambda: told.goaway == frames.NO_ERROR)
            for plan, responder, body in world.held:
                plan.answer(responder, body)
            assert (await line.answer()).headers[b"connection"] == b"close"
            assert await line.ends()
            assert (await peer.answer(1)).status == 200
            with pytest.raises(OSError, match=r"refused|Connect call failed"):
                await asyncio.open_connection(*world.address)

    async def test_stopping_waits_for_open_calls_and_takes_no_others(self) -> None:
        async with toy_world() as world:
            peer, line, app = await Peer.connect(world), await Line.connect(world), await Line.connect(world)
            peer.call(1, "/plan/hold", b"one")
            line.send(b"POST /plan/hold HTTP/1.1\r\n%bContent-Length: 3\r\n\r\ntwo" % HOST)
            app.send(b"POST /app/unread HTTP/1.1\r\n%bContent-Length: 5\r\n\r\nthree" % HOST)
            await until(lambda: len(world.held) == 2 and world.scopes)
            stopping = asyncio.create_task(world.server.stop(20))
            await peer.until(lambda: peer.goaway == frames.NO_ERROR)
            assert peer.last_stream == 1
            peer.send(peer.head(3, "/plan/echo", end=True))
            with pytest.raises(Reset) as caught:
                await peer.answer(3)
            assert caught.value.code == frames.REFUSED_STREAM
            for plan, responder, body in world.held:
                plan.answer(responder, body)
            world.go_on.set()
            assert (await peer.answer(1)).body == b"one"
            assert (await line.answer()).body == b"two"
            assert (await app.answer()).body == b"three"
            await stopping
            assert world.is_empty()

    async def test_what_outlasts_the_grace_is_cut_and_late_answers_are_dropped(self) -> None:
        async with toy_world() as world:
            peer, line, app = await Peer.connect(world), await Line.connect(world), await Line.connect(world)
            peer.call(1, "/plan/hold", b"one")
            peer.call(3, "/app/unread", b"one")
            line.send(b"POST /plan/hold HTTP/1.1\r\n%bContent-Length: 3\r\n\r\ntwo" % HOST)
            app.send(b"POST /app/hang HTTP/1.1\r\n%bContent-Length: 5\r\n\r\nthree" % HOST)
            await until(lambda: len(world.held) == 2 and len(world.scopes) == 2)
            await world.server.stop(0.05)
            assert world.is_empty()
            assert world.cancelled == 2
            for plan, responder, body in world.held:
                plan.answer(responder, body)
                plan.answer(responder, body)

    async def test_answers_after_the_caller_left_and_second_answers_are_dropped(
        self, world: ToyWorld
    ) -> None:
        peer, line = await Peer.connect(world), await Line.connect(world)
        peer.call(1, "/plan/hold", b"")
        peer.call(3, "/plan/hold", b"")
        line.send(b"POST /plan/hold HTTP/1.1\r\n%bContent-Length: 0\r\n\r\n" % HOST)
        await until(lambda: len(world.held) == 3)
        peer.send(frames.reset(1, frames.CANCEL))
        await line.close()
        await until(lambda: world.cancelled == 2)
        for plan, responder, body in world.held:
            plan.answer(responder, body)
            plan.answer(responder, body)
            responder.answer_http(500, [], b"never")
        assert (await peer.answer(3)).status == 200
        await peer.is_alive()
        assert 1 not in peer.answers


class TestNothingGrows:
    async def test_connections_come_and_go(self, world: ToyWorld) -> None:
        for _ in range(15):
            lines = [await Line.connect(world) for _ in range(20)]
            peers = [await Peer.connect(world) for _ in range(20)]
            for number, (line, peer) in enumerate(zip(lines, peers, strict=True)):
                line.send((b"GET /app/hang", b"GET /plan/hold", b"GE", b"POST /app/echo")[number % 4])
                if number % 4 != 2:
                    line.send(b" HTTP/1.1\r\n%bContent-Length: 5\r\n\r\n12345" % HOST)
                peer.send(peer.head(1, ("/app/hang", "/plan/hold")[number % 2]), data(1, bytes(1000)))
            for one in (*lines, *peers):
                await one.close()
        await world.empty()
        assert world.server.connections == 0

    async def test_calls_come_and_go(self, world: ToyWorld) -> None:
        peer, line = await Peer.connect(world), await Line.connect(world)
        for number in range(1, 6001, 2):
            peer.call(number, ("/plan/echo", "/plan/later", "/app/stream")[number % 3], grpc(b"x"), GRPC)
        await peer.answer(5999)
        await peer.until(lambda: sum(answer.ended for answer in peer.answers.values()) == 3000)
        line.send(b"POST /plan/echo HTTP/1.1\r\n%bContent-Length: 1\r\n\r\nx" % HOST * 3000)
        for _ in range(3000):
            assert (await line.answer()).status == 200
        for connection in world.server._connections:
            for name in ("_streams", "_ready", "_roomless", "_dismissed", "_out", "_rest", "_buffer"):
                assert not getattr(connection, name, None), name
        assert not world.server.held_bytes
        assert not world.server.open_calls

    async def test_calls_that_are_dismissed_are_remembered_only_for_a_while(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        for number in range(1, 20_001, 2):
            peer.send(peer.head(number, "/plan/echo", GRPC, (b"x-limit", b"0")), data(number, b"x"))
        await peer.until(lambda: len(peer.answers) >= 10_000)
        [connection] = world.server._connections
        assert len(getattr(connection, "_dismissed")) <= 8192  # noqa: B009 - of one of two classes
        # Frames that were long on their way are no fault.
        peer.send(data(1, b"late", end=True), data(19_999, b"late", end=True))
        await peer.is_alive()

    async def test_calls_leave_no_rings_for_the_collector(self, world: ToyWorld) -> None:
        peer, line = await Peer.connect(world), await Line.connect(world)

        async def calls() -> int:
            for _ in range(100):
                number = world.ran * 2 + len(world.scopes) * 2 + 1
                path = ("/plan/echo", "/plan/later", "/app/stream", "/app/echo")[number // 2 % 4]
                peer.call(number, path, grpc(b"x"), GRPC)
                await peer.answer(number)
            for path in (b"/plan/later", b"/app/echo") * 50:
                line.send(b"POST %b HTTP/1.1\r\n%bContent-Length: 1\r\n\r\nx" % (path, HOST))
                await line.answer()
            # By type: asking an object for its class wakes some that other libraries left asleep.
            return sum(type(one) in (Stream, Turn, Exchange) for one in gc.get_objects())

        gc.collect()
        gc.disable()
        try:
            assert await calls() < 10
        finally:
            gc.enable()


async def test_a_connection_that_is_over_does_not_linger_for_a_caller_that_stays(world: ToyWorld) -> None:
    line, peer = await Line.connect(world), await Peer.connect(world)
    line.send(b"GET /app/echo HTTP/1.1\r\n%bConnection: close\r\n\r\n" % HOST)
    assert (await line.answer()).status == 200
    peer.send(frames.frame(frames.PING, 0, 1, bytes(8)))
    assert await peer.end_code() == frames.PROTOCOL_ERROR
    assert world.server.connections == 2
    world.pass_time(carrier.LINGER_SECONDS + 1)
    await until(lambda: world.server.connections == 0)
