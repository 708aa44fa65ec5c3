"""Clients that others wrote: gRPC's own (both kinds), httpx, requests and curl."""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import requests

from support.http_world import ToyWorld, until

MIB = 1 << 20
LARGE = [
    ("grpc.max_receive_message_length", 64 * MIB),
    ("grpc.max_send_message_length", 64 * MIB),
    ("grpc.enable_http_proxy", 0),
]


@pytest.fixture
def target(world: ToyWorld) -> str:
    return f"{world.address[0]}:{world.address[1]}"


@pytest.fixture
async def channel(target: str) -> AsyncIterator[grpc.aio.Channel]:
    options = [*LARGE, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as made:
        yield made


class TestGrpc:
    @pytest.mark.parametrize("path", ["/plan/echo", "/plan/later", "/app/stream"])
    async def test_messages_of_all_sizes_go_there_and_back(
        self, channel: grpc.aio.Channel, path: str
    ) -> None:
        call = channel.unary_unary(path)
        sizes = [0, 1, 100, 16_379, 16_380, 65_530, 65_536, 200_000, 3 * MIB] * 4
        bodies = [os.urandom(size) for size in sizes]
        assert await asyncio.gather(*(call(body, timeout=30) for body in bodies)) == bodies

    @pytest.mark.parametrize("path", ["/plan/echo", "/app/stream"])
    async def test_32_mib_go_there_and_back_and_stall_nobody(
        self, channel: grpc.aio.Channel, path: str
    ) -> None:
        call, body = channel.unary_unary(path), os.urandom(32 * MIB)
        large = asyncio.ensure_future(call(body, timeout=60))
        for _ in range(20):
            assert await call(b"small", timeout=30) == b"small"
        assert hashlib.sha256(await large).digest() == hashlib.sha256(body).digest()

    async def test_every_metadata_makes_no_difference(self, channel: grpc.aio.Channel) -> None:
        """Their heads change the table of the connection with each call, or do not."""
        call = channel.unary_unary("/plan/later")

        async def one(number: int) -> None:
            metadata = (("x-request", str(number)), ("x-bin", bytes((number % 256,)) * 9))[: number % 3]
            body = b"%d" % number
            assert await call(body, timeout=10 + number % 7, metadata=metadata) == body

        for start in range(0, 400, 50):
            await asyncio.gather(*(one(number) for number in range(start, start + 50)))

    async def test_streams_go_both_ways_at_once(self, channel: grpc.aio.Channel) -> None:
        stream = channel.stream_stream("/app/stream")(timeout=30)
        for number in range(300):
            message = b"%d" % number * (number % 50)
            await stream.write(message)
            assert await stream.read() == message
        await stream.done_writing()
        assert await stream.read() == grpc.aio.EOF

    async def test_a_stream_whose_reader_is_slow_is_whole(self, channel: grpc.aio.Channel) -> None:
        async def messages() -> AsyncIterator[bytes]:
            for number in range(200):
                yield bytes((number,)) * 50_000

        stream = channel.stream_stream("/app/stream")(messages(), timeout=60)
        number = 0
        async for message in stream:
            assert message == bytes((number,)) * 50_000
            number += 1
            await asyncio.sleep(0)
        assert number == 200

    async def test_calls_that_are_cancelled_or_late_are_noticed(
        self, channel: grpc.aio.Channel, world: ToyWorld
    ) -> None:
        calls = [channel.unary_unary("/plan/hold")(b"x", timeout=30) for _ in range(5)]
        streams = [channel.stream_stream("/app/stream")(timeout=30) for _ in range(5)]
        for stream in streams:
            await stream.write(b"x")
            assert await stream.read() == b"x"
        await until(lambda: len(world.held) == 5)
        for call in (*calls, *streams):
            call.cancel()
        await until(lambda: (world.cancelled, world.left) == (5, 5))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/plan/hold")(b"x", timeout=0.2)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: world.cancelled == 6)
        assert await channel.unary_unary("/plan/echo")(b"x", timeout=10) == b"x"

    async def test_a_refused_body_ends_with_its_status(self, channel: grpc.aio.Channel) -> None:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/plan/echo")(
                    bytes(MIB), timeout=30, metadata=(("x-limit", "1000"),)
                )
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_callers_who_are_asked_to_go_lose_nothing(
        self, channel: grpc.aio.Channel, world: ToyWorld
    ) -> None:
        """As a server with a longest age of connections does."""
        call = channel.unary_unary("/plan/later")
        answered = 0

        async def many() -> None:
            nonlocal answered
            for _ in range(200):
                assert await call(b"x", timeout=10, wait_for_ready=True) == b"x"
                answered += 1

        working = [asyncio.ensure_future(many()) for _ in range(8)]
        seen = set()
        for _ in range(10):
            # gRPC's clients send a call that a server did not take up again by themselves, but only once.
            due = answered + 4 * len(working)
            await until(lambda due=due: answered >= due or all(one.done() for one in working))
            for connection in list(world.server._connections):
                seen.add(connection)
                connection.close()
            await asyncio.sleep(0.01)
        await asyncio.gather(*working)
        assert len(seen) > 1

    async def test_its_blocking_client_is_served(self, target: str, world: ToyWorld) -> None:
        def work() -> None:
            with grpc.insecure_channel(target, options=LARGE) as channel:
                unary, stream = channel.unary_unary("/plan/later"), channel.stream_stream("/app/stream")
                futures = [unary.future(b"%d" % number, timeout=30) for number in range(200)]
                assert [future.result() for future in futures] == [b"%d" % number for number in range(200)]
                sent = [bytes((number,)) * 5000 for number in range(100)]
                assert list(stream(iter(sent), timeout=30)) == sent
                assert unary(bytes(32 * MIB), timeout=60) == bytes(32 * MIB)

        await asyncio.to_thread(work)
        await world.empty()


class TestHttpx:
    @pytest.mark.parametrize("http2", [False, True])
    @pytest.mark.parametrize("path", ["/plan/echo", "/plan/later", "/app/echo"])
    async def test_bodies_of_all_sizes_go_there_and_back(self, target: str, http2: bool, path: str) -> None:
        limits = httpx.Limits(max_connections=4)
        async with httpx.AsyncClient(
            base_url=f"http://{target}",
            http1=not http2,
            http2=http2,
            trust_env=False,
            limits=limits,
            timeout=30,
        ) as client:
            bodies = [os.urandom(size) for size in (0, 1, 1000, 65_536, 300_000, 2 * MIB)] * 2
            answers = await asyncio.gather(*(client.post(path, content=body) for body in bodies))
            assert [answer.content for answer in answers] == bodies
            assert {answer.http_version for answer in answers} == {"HTTP/2" if http2 else "HTTP/1.1"}

    @pytest.mark.parametrize("http2", [False, True])
    async def test_bodies_of_unknown_length_and_long_answers(self, target: str, http2: bool) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for number in range(50):
                yield bytes((number,)) * 3000

        async with httpx.AsyncClient(
            base_url=f"http://{target}", http1=not http2, http2=http2, trust_env=False, timeout=30
        ) as client:
            answer = await client.post("/app/echo", content=parts())
            assert answer.content == b"".join([part async for part in parts()])
            async with client.stream("GET", f"/app/big?bytes={8 * MIB}") as streamed:
                assert sum([len(part) async for part in streamed.aiter_raw()]) == 8 * MIB
            assert (await client.head("/app/big?bytes=1000")).content == b""
            assert (await client.post("/app/early", content=bytes(4 * MIB))).status_code == 413


async def test_requests_are_served(target: str) -> None:
    def parts() -> Iterator[bytes]:
        for number in range(50):
            yield bytes((number,)) * 3000

    def work() -> None:
        with requests.Session() as session:
            session.trust_env = False
            for body in (b"", b"x", bytes(MIB)):
                assert session.post(f"http://{target}/plan/echo", data=body, timeout=30).content == body
            answer = session.post(f"http://{target}/app/echo", data=parts(), timeout=30)
            assert answer.content == b"".join(parts())

    await asyncio.to_thread(work)


CURL = shutil.which("curl")


@pytest.mark.skipif(CURL is None, reason="curl is not on this machine")
class TestCurl:
    async def curl(self, *arguments: Any, data: bytes | None = None) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(CURL or "curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"),
            *map(str, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate(data)
        assert process.returncode == 0
        return out

    @pytest.mark.parametrize("version", ["--http1.1", "--http1.0", "--http2-prior-knowledge", "--http2"])
    @pytest.mark.parametrize("path", ["/plan/echo", "/app/echo"])
    async def test_files_go_there_and_back(
        self, target: str, version: str, path: str, tmp_path: Path
    ) -> None:
        """With HTTP/1.1 it waits for a word before it sends them; --http2 asks for an upgrade, in vain."""
        file = tmp_path / "file"
        file.write_bytes(os.urandom(5 * MIB))
        got = await self.curl(version, "--data-binary", f"@{file}", f"http://{target}{path}")
        assert hashlib.sha256(got).digest() == hashlib.sha256(file.read_bytes()).digest()

    @pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
    async def test_streams_heads_and_refusals(self, target: str, version: str) -> None:
        body = os.urandom(MIB)
        assert await self.curl(version, "-T", "-", f"http://{target}/app/echo", data=body) == body
        assert len(await self.curl(version, f"http://{target}/app/big?bytes=20000000")) == 20_000_000
        assert b" 200" in await self.curl(version, "--head", f"http://{target}/app/big?bytes=20000000")
        got = await self.curl(
            *(version, "-w", "%{http_code}", "--data-binary", "@-", f"http://{target}/app/early"),
            data=bytes(9 * MIB),
        )
        assert got == b"no need413"

    async def test_a_connection_is_used_again(self, target: str, world: ToyWorld) -> None:
        """Not over HTTP/2: curl 7.88 fails in that against every server."""
        url = f"http://{target}/plan/echo"
        assert await self.curl("-d", "one", url, "--next", "-d", "two", url) == b"onetwo"
