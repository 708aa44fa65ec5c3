"""The gateway's own server around the gateway's own application, as callers of all kinds meet it."""

import asyncio
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.gateway_world import GatewayProcess

INFER = b"/v2/models/echo/infer"


def say(gateway: GatewayProcess, request: bytes, *, shut: bool = False) -> bytes:
    """Send bytes, return all that comes."""
    host, port = gateway.target.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(request)
        if shut:
            line.shutdown(socket.SHUT_WR)
        got = b""
        while piece := line.recv(65_536):
            got += piece
        return got


def tensor(count: int) -> bytes:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, count], "data": [1.0] * count}]
    return json.dumps({"inputs": inputs}).encode()


@pytest.mark.parametrize("request_", [b"GET /healthz HTTP/1.0\r\n\r\n", b"GET /v2 HTTP/1.0\r\n\r\n"])
def test_a_request_that_was_piped_in_is_answered(gateway: GatewayProcess, request_: bytes) -> None:
    assert say(gateway, request_, shut=True).startswith(b"HTTP/1.1 200 OK\r\n")


def test_an_inference_that_was_piped_in_is_answered(gateway: GatewayProcess) -> None:
    body = tensor(3)
    head = b"POST %b HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    got = say(gateway, head % (INFER, len(body)) + body, shut=True)
    assert json.loads(got.partition(b"\r\n\r\n")[2]) == json.loads(body)


def test_nothing_is_smuggled_past_a_proxy(gateway: GatewayProcess) -> None:
    hidden = b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n"
    for head in (
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % len(hidden),
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(hidden),
        b"Transfer-Encoding: chunked\n\n0\r\n\r\n",
        b"X: y\n\r\n",
    ):
        got = say(gateway, b"POST %b HTTP/1.1\r\nHost: a\r\n%b%b" % (INFER, head, hidden))
        assert got.startswith(b"HTTP/1.1 400 ")
        assert got.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
async def test_curl_sends_large_bodies(gateway: GatewayProcess, version: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not on this machine")
    body = tensor(200_000)
    process = await asyncio.create_subprocess_exec(
        *(curl, "-sS", "--noproxy", "*", version, "-H", "content-type: application/json"),
        *("--data-binary", "@-", gateway.url + INFER.decode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate(body)
    assert json.loads(out) == json.loads(body)


@pytest.mark.parametrize("http2", [False, True])
async def test_a_body_over_the_limit_is_answered_whoever_asks(gateway: GatewayProcess, http2: bool) -> None:
    async def parts() -> Any:
        for _ in range(90):
            yield bytes(65_536)

    async with httpx.AsyncClient(
        base_url=gateway.url, http1=not http2, http2=http2, trust_env=False, timeout=30
    ) as client:
        for content in (bytes(5 << 20), parts()):
            answer = await client.post(INFER.decode(), content=content)
            assert (answer.status_code, answer.json()["reason"]) == (413, "PAYLOAD_TOO_LARGE")
        assert (await client.get("/healthz")).status_code == 200


def test_the_process_may_open_as_many_files_as_its_user_may(gateway: GatewayProcess) -> None:
    assert gateway.process is not None
    limits = Path(f"/proc/{gateway.process.pid}/limits").read_text().splitlines()
    soft, hard = next(line.split() for line in limits if line.startswith("Max open files"))[3:5]
    assert soft in (hard, "unlimited") or int(soft) >= 8192
