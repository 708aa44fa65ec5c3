"""The floor of grpcio: one grpc.aio server that answers with ready bytes."""

import asyncio
import sys

import grpc
import uvloop
from floor_common import REPLIES, identity


def handler(reply):
    """Answer one method."""

    async def answer(request, context):
        return reply + identity(request)

    return grpc.unary_unary_rpc_method_handler(answer)


async def main():
    """Serve until killed."""
    server = grpc.aio.server()
    by_service = {}
    for path, reply in REPLIES.items():
        _, service, method = path.split("/")
        by_service.setdefault(service, {})[method] = handler(reply)
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in by_service.items())
    )
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
