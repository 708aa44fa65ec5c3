"""What the gateway's own application keeps of unfinished bodies counts as the server's memory too."""

from typing import Any

import pytest

from penstock_gateway.api.rest.http import Request, failure
from penstock_gateway.hotpath import grpc_framing
from penstock_gateway.hotpath.http import frames
from penstock_gateway.hotpath.http.ports import Receive, Scope, Send
from penstock_kit.errors import PenstockError
from support.http_world import GRPC, Line, Peer, ToyWorld, data, toy_world, until


class RealWorld(ToyWorld):
    """With the gateway's own readers of messages and bodies."""

    async def _grpc(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def handler(call: grpc_framing.Call) -> None:
            while (message := await call.read()) is not None:
                await call.write(message)

        await grpc_framing.serve(handler, scope, receive, send, limit=1 << 26, default_timeout=30)

    async def _rest(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, 1 << 26, 30)
        status, answer = 200, b""
        try:
            answer = await request.body()
        except PenstockError as error:
            status = failure(error).status
        await self._answer(send, answer, status)


@pytest.fixture
async def small() -> Any:
    async with toy_world(1_000_000, RealWorld) as made:
        yield made


async def test_messages_that_have_not_all_come_are_counted(small: RealWorld) -> None:
    peer = await Peer.connect(small)
    for number, first in ((1, b"\x00" + (900_000).to_bytes(4, "big")), (3, b"\x00\x00\x09\x27\xc0")):
        peer.send(peer.head(number, "/app/grpc", GRPC), data(number, first))
    for _ in range(40):
        peer.send(data(1, bytes(16_384)))
    await until(lambda: small.server.held_bytes == 40 * 16_384 + 10)
    for _ in range(25):
        peer.send(data(3, bytes(16_384)))
    await peer.until(lambda: 3 in peer.answers and peer.answers[3].ended)
    answer = peer.answers[3]
    status = answer.trailers.get(b"grpc-status", answer.fields.get(b"grpc-status"))
    # Whether the connection notices or the application: to gRPC's clients it is the same.
    assert status == b"8" or answer.code == frames.ENHANCE_YOUR_CALM
    await until(lambda: small.server.held_bytes == 40 * 16_384 + 5)
    peer.send(frames.window_update(0, 1 << 20), frames.window_update(1, 1 << 20))
    for _ in range(14):
        peer.send(data(1, bytes(16_384)))
    peer.send(data(1, bytes(900_000 - 54 * 16_384)))
    await peer.until(lambda: len(peer.answers[1].body) == 900_005)
    assert small.server.held_bytes == 0
    peer.send(data(1, b"", end=True))
    assert (await peer.answer(1)).trailers[b"grpc-status"] == b"0"


async def test_bodies_of_unknown_length_are_counted(small: RealWorld) -> None:
    line, other = await Line.connect(small), await Line.connect(small)
    head = b"POST /app/rest HTTP/1.1\r\nHost: toy\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"4000\r\n" + bytes(16_384) + b"\r\n"
    line.send(head)
    for _ in range(40):
        line.send(chunk)
    await until(lambda: small.server.held_bytes == 40 * 16_384)
    other.send(head)
    for _ in range(25):
        other.send(chunk)
    assert (await other.answer()).status in (429, 503)
    await until(lambda: small.server.held_bytes == 40 * 16_384)
    line.send(b"0\r\n\r\n")
    assert len((await line.answer()).body) == 40 * 16_384
    await until(lambda: small.server.held_bytes == 0)
