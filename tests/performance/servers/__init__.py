"""Servers that can be measured, by name."""

from performance.servers.base import Server
from performance.servers.floors import GrpcFloor, PyvoyFloor
from performance.servers.mosec import Mosec, MosecJoining
from performance.servers.ours import Ours
from performance.servers.python_peers import BentoMl, KServe, LitServe, MlServer, RayServe
from performance.servers.triton import Triton, TritonGuarded

SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Ours(),
        Triton(),
        TritonGuarded(),
        Mosec(),
        MosecJoining(),
        KServe(),
        MlServer(),
        LitServe(),
        BentoMl(),
        RayServe(),
        GrpcFloor(),
        PyvoyFloor(),
    )
}
