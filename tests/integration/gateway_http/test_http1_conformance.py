"""RFC 9112 on the wire, and the tricks by which requests are smuggled past proxies."""

import asyncio
import json

import pytest

from support.http_world import Line, ToyWorld, exchange

HOST = b"Host: toy\r\n"


def post(path: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path, HOST, lines, len(body), body)


@pytest.mark.parametrize("path", [b"/plan/echo", b"/plan/later", b"/app/echo"])
async def test_a_connection_is_kept_between_calls(world: ToyWorld, path: bytes) -> None:
    line = await Line.connect(world)
    for body in (b"one", b"", b"x" * 100_000):
        line.send(post(path, body))
        answer = await line.answer()
        assert (answer.status, answer.body) == (200, body)
        assert b"date" in answer.headers
    assert world.server.connections == 1


async def test_pipelined_calls_are_answered_in_their_order(world: ToyWorld) -> None:
    line = await Line.connect(world)
    paths = [b"/plan/echo", b"/app/echo", b"/plan/later", b"/app/echo", b"/plan/echo", b"/plan/later"] * 20
    for number, path in enumerate(paths):
        if number % 3 == 2:
            chunks = b"3\r\nabc\r\n%x\r\n%d\r\n0\r\n\r\n" % (len(str(number)), number)
            line.send(b"POST %b HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n%b" % (path, HOST, chunks))
        else:
            line.send(post(path, b"%d" % number))
    for number in range(len(paths)):
        expected = b"abc%d" % number if number % 3 == 2 else b"%d" % number
        assert (await line.answer()).body == expected


@pytest.mark.parametrize("path", [b"/plan/echo", b"/app/echo"])
async def test_a_caller_that_closes_with_its_call_is_answered_first(world: ToyWorld, path: bytes) -> None:
    got = await exchange(world, post(path, b"body", b"Connection: close"))
    assert b"connection: close\r\n" in got
    assert got.endswith(b"\r\n\r\nbody")


@pytest.mark.parametrize("path", [b"/plan/later", b"/app/echo"])
@pytest.mark.parametrize("version", [b"HTTP/1.0\r\n", b"HTTP/1.1\r\nConnection: close\r\n"])
async def test_a_caller_that_shuts_its_side_after_its_last_call_is_answered(
    world: ToyWorld, path: bytes, version: bytes
) -> None:
    """As `printf '…' | nc` does."""
    request = b"POST %b %b%bContent-Length: 4\r\n\r\nbody" % (path, version, HOST)
    assert (await exchange(world, request, shut=True)).endswith(b"\r\n\r\nbody")


async def test_a_caller_that_shuts_its_side_otherwise_has_gone_away(world: ToyWorld) -> None:
    assert await exchange(world, post(b"/plan/hold", b"body"), shut=True) == b""
    assert await exchange(world, post(b"/app/hang", b"body"), shut=True) == b""
    half = b"POST /app/hang HTTP/1.0\r\nContent-Length: 9\r\n\r\nbody"
    assert await exchange(world, half, shut=True) == b""
    assert (world.cancelled, world.left) == (1, 2)


async def test_http_1_0_is_closed_unless_it_asks_for_more(world: ToyWorld) -> None:
    got = await exchange(world, b"GET /app/big?bytes=70000 HTTP/1.0\r\n\r\n")
    assert got.endswith(b"b" * 70_000)
    assert b"chunked" not in got
    line = await Line.connect(world)
    line.send(b"GET /app/echo HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n" * 2)
    for _ in range(2):
        assert (await line.answer()).headers[b"connection"] == b"keep-alive"


async def test_an_answer_of_unknown_length_comes_in_chunks(world: ToyWorld) -> None:
    line = await Line.connect(world)
    line.send(b"GET /app/big?bytes=200000 HTTP/1.1\r\n" + HOST + b"\r\n")
    answer = await line.answer()
    assert answer.headers[b"transfer-encoding"] == b"chunked"
    assert answer.body == b"b" * 200_000


@pytest.mark.parametrize("path", [b"/app/early", b"/app/big?bytes=1000"])
async def test_an_answer_to_head_has_no_body(world: ToyWorld, path: bytes) -> None:
    line = await Line.connect(world)
    line.send(b"HEAD %b HTTP/1.1\r\n%b\r\n" % (path, HOST) * 2)
    for _ in range(2):
        assert (await line.answer(bodiless=True)).status in (200, 413)


async def test_a_caller_that_waits_for_a_word_before_its_body_gets_it(world: ToyWorld) -> None:
    for path in (b"/plan/echo", b"/app/echo"):
        line = await Line.connect(world)
        head, _, body = post(path, b"body", b"Expect: 100-continue").partition(b"\r\n\r\n")
        line.send(head + b"\r\n\r\n")
        assert (await line.answer()).status == 100
        line.send(body)
        assert (await line.answer()).body == b"body"
        # With the body there already, or none to come, there is nothing to wait for.
        line.send(post(path, b"body", b"Expect: 100-continue"))
        assert (await line.answer()).status == 200
        line.send(head.replace(b"Content-Length: 4", b"Content-Length: 0") + b"\r\n\r\n")
        assert (await line.answer()).status == 200
        line.send(head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n\r\n")
        await asyncio.sleep(0)
        line.send(body)
        assert (await line.answer()).status == 200


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a%20b?c=%20d", "/a b", b"c=%20d"),
        (b"http://other/x?y", "/x", b"y"),
        (b"HTTP://other", "/", b""),
        (b"http://other?y", "/", b"y"),
        (b"//x", "//x", b""),
        (b"/?", "/", b""),
    ],
)
async def test_targets_are_read(world: ToyWorld, target: bytes, path: str, query: bytes) -> None:
    line = await Line.connect(world)
    line.send(b"GET %b HTTP/1.1\r\n%b\r\n" % (target, HOST))
    assert (await line.answer()).status == 200
    assert (world.scopes[0]["path"], world.scopes[0]["query_string"]) == (path, query)


async def test_options_of_all_is_allowed(world: ToyWorld) -> None:
    line = await Line.connect(world)
    line.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (await line.answer()).status == 200


async def test_empty_lines_before_a_request_are_skipped(world: ToyWorld) -> None:
    line = await Line.connect(world)
    line.send(b"\r\n\r\n\n" + post(b"/plan/echo", b"x") + b"\r\n" + post(b"/plan/echo", b"y"))
    assert [(await line.answer()).body, (await line.answer()).body] == [b"x", b"y"]


P, G = b"POST / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n"
MALFORMED = {
    "a length and chunks": P + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": P + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": P + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "two lengths in one": P + b"Content-Length: 3, 4\r\n\r\nabc",
    "a length with a sign": P + b"Content-Length: +3\r\n\r\nabc",
    "a negative length": P + b"Content-Length: -3\r\n\r\nabc",
    "a hexadecimal length": P + b"Content-Length: 0x3\r\n\r\nabc",
    "an empty length": P + b"Content-Length:\r\n\r\nabc",
    "an endless length": P + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nabc",
    "a length with an underscore": P + b"Content-Length: 1_0\r\n\r\nabc",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": P + b"Content-Length : 3\r\n\r\nabc",
    "a folded line": P + b"X: b\r\n c\r\n\r\n",
    "a folded line with a tab": P + b"Transfer-Encoding:\r\n\tchunked\r\n\r\n0\r\n\r\n",
    "a bare line feed": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "a head in a head": b"GET / HTTP/1.1\nHost: a\n\nGET /app/hidden HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bare carriage return": G + b"X: a\rContent-Length: 5\r\n\r\n",
    "a NUL in a value": G + b"X: a\x00b\r\n\r\n",
    "a control character": G + b"X: a\x01b\r\n\r\n",
    "a NUL in a name": G + b"X\x00: ab\r\n\r\n",
    "no colon": G + b"nonsense\r\n\r\n",
    "an empty name": G + b": x\r\n\r\n",
    "a space before the first header": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": G + b"Host: b\r\n\r\n",
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "no method": b" / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method that is no token": b"G@T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "no path": b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a path with a space": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "a path with a control character": b"GET /a\x7fb HTTP/1.1\r\nHost: a\r\n\r\n",
    "an asterisk": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tunnel": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a path of another scheme": b"GET ftp://a/b HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_requests_are_refused_and_the_connection_is_closed(
    world: ToyWorld, request_: bytes
) -> None:
    got = await exchange(world, request_ + post(b"/app/echo", b"smuggled"))
    assert got.startswith(b"HTTP/1.1 400 ")
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert json.loads(body)["reason"] == "MALFORMED_BODY"
    assert not world.scopes


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked", b"chunked;q=1"]
)
async def test_other_transfer_codings_are_refused(world: ToyWorld, coding: bytes) -> None:
    got = await exchange(
        world, b"POST / HTTP/1.1\r\n%bTransfer-Encoding: %b\r\n\r\n0\r\n\r\n" % (HOST, coding)
    )
    assert got.startswith(b"HTTP/1.1 501 ")


@pytest.mark.parametrize(("version", "status"), [(b"2.0", 505), (b"3.0", 505), (b"1.2", 200), (b"0.9", 505)])
async def test_other_versions_are_refused(world: ToyWorld, version: bytes, status: int) -> None:
    line = await Line.connect(world)
    line.send(b"GET /app/echo HTTP/%b\r\n%b\r\n" % (version, HOST))
    assert (await line.answer()).status == status


@pytest.mark.parametrize(
    "chunks",
    [
        b"+3\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b" 3\r\nabc\r\n0\r\n\r\n",
        b"\r\n3\r\nabc\r\n0\r\n\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\rX\nabc\r\n0\r\n\r\n",
        b"3;a\x00\r\nabc\r\n0\r\n\r\n",
        b"10000000000000003\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"x" * 2000 + b"\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"x" * 2000,
        (b"1;" + b"x" * 500 + b"\r\na\r\n") * 40,
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\nX: y\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 4000,
        b"0\r\n folded\r\n\r\n",
    ],
)
async def test_malformed_chunks_are_refused(world: ToyWorld, chunks: bytes) -> None:
    head = b"POST /app/echo HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n" % HOST
    got = await exchange(world, head + chunks)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1") == 1


async def test_chunks_with_extensions_and_trailers_are_read(world: ToyWorld) -> None:
    line = await Line.connect(world)
    head = b"POST /app/echo HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n" % HOST
    line.send(head, b'003;a=b;c="d"\r\nabc\r\nA ; x\r\n0123456789\r\n000\r\nX-Sum: 1\r\n\r\n')
    assert (await line.answer()).body == b"abc0123456789"
    line.send(post(b"/plan/echo", b"next"))
    assert (await line.answer()).body == b"next"


async def test_a_malformed_chunk_in_the_middle_of_an_answer_ends_the_connection(world: ToyWorld) -> None:
    line = await Line.connect(world)
    line.send(b"POST /app/stream HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n" % HOST)
    assert b"abc" in await line.reader.readuntil(b"abc\r\n")
    line.send(b"nonsense\r\n")
    async with asyncio.timeout(10):
        assert b"400" not in await line.reader.read()


async def test_an_answer_to_a_body_that_still_comes_reaches_its_caller(world: ToyWorld) -> None:
    line = await Line.connect(world)
    line.send(b"POST /app/early HTTP/1.1\r\n%bContent-Length: 50000000\r\n\r\n" % HOST)
    for _ in range(50):
        line.send(bytes(100_000))
    answer = await line.answer()
    assert (answer.status, answer.headers[b"connection"]) == (413, b"close")
    assert await line.ends()


async def test_heads_may_be_large_but_not_too_large(world: ToyWorld) -> None:
    line = await Line.connect(world)
    line.send(b"GET /app/echo HTTP/1.1\r\n%bX: %b\r\n\r\n" % (HOST, b"v" * 60_000))
    assert (await line.answer()).status == 200
    for head in (b"X: " + b"v" * 66_000, b"X: y\r\n" * 300):
        got = await exchange(world, b"GET /app/echo HTTP/1.1\r\n%b%b\r\n\r\n" % (HOST, head))
        assert got.startswith(b"HTTP/1.1 431 ")
    assert (await exchange(world, b"GET /" + b"v" * 70_000)).startswith(b"HTTP/1.1 431 ")


async def test_an_application_that_breaks_is_answered_for(
    world: ToyWorld, caplog: pytest.LogCaptureFixture
) -> None:
    got = await exchange(world, b"GET /app/crash HTTP/1.1\r\n%b\r\n" % HOST)
    assert got.startswith(b"HTTP/1.1 500 ")
    got = await exchange(world, b"GET /app/crashlate HTTP/1.1\r\n%b\r\n" % HOST)
    assert not got.endswith(b"0\r\n\r\n"), "its caller must see that the end is missing"
    assert "a toy that breaks" in caplog.text


async def test_a_plan_that_cannot_be_made_is_no_end(
    world: ToyWorld, caplog: pytest.LogCaptureFixture
) -> None:
    line = await Line.connect(world)
    line.send(post(b"/plan/broken", b"x"))
    assert (await line.answer()).body == b"x"
    assert "no plan" in caplog.text
