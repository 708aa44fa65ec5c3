"""Ask a process of the mesh whether it would answer now."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import grpc
import httpx
import psycopg
import redis.asyncio
from grpc_health.v1 import health_pb2

from penstock_kit.errors import PenstockError
from penstock_kit.rpc import open_channel
from penstock_kit.threads import in_thread

PROBE_SECONDS = 2.0
# See penstock_gateway.api.metrics.
_READY = "penstock_gateway_ready "


class HealthKind(StrEnum):
    """How a process is asked."""

    NONE = "none"  # it is healthy as long as it runs
    GRPC = "grpc"  # grpc.health.v1 at an address
    HTTP = "http"  # GET a URL: 200
    METRICS = "metrics"  # its own metrics, whose host:port a file holds, say that it is ready
    POSTGRES = "postgres"  # connect to a SQLAlchemy URL
    REDIS = "redis"  # PING a URL


@dataclass(frozen=True)
class Health:
    """Whom to ask, and how."""

    kind: HealthKind = HealthKind.NONE
    target: str = ""


async def probe(health: Health, seconds: float = PROBE_SECONDS) -> str:
    """Ask once.

    Returns:
        Nothing ("") if it would answer now, else why not, in words.
    """
    try:
        async with asyncio.timeout(seconds):
            match health.kind:
                case HealthKind.GRPC:
                    return await _grpc(health.target, seconds)
                case HealthKind.HTTP:
                    return await _http(health.target, seconds)
                case HealthKind.METRICS:
                    return await _metrics(Path(health.target), seconds)
                case HealthKind.POSTGRES:
                    return await _postgres(health.target)
                case HealthKind.REDIS:
                    return await _redis(health.target)
                case HealthKind.NONE:
                    return ""
    except TimeoutError:
        return f"no answer within {seconds:g} s"


async def _grpc(target: str, seconds: float) -> str:
    async with open_channel(target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except (PenstockError, grpc.aio.AioRpcError) as error:
            return str(error) if isinstance(error, PenstockError) else error.code().name
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status).lower().replace("_", " ")


async def _http(url: str, seconds: float) -> str:
    try:
        # trust_env=False: a neighbour is not reached through a proxy.
        async with httpx.AsyncClient(timeout=seconds, trust_env=False) as client:
            answer = await client.get(url)
    except httpx.HTTPError as error:
        return f"no answer ({type(error).__name__})"
    return "" if answer.status_code == httpx.codes.OK else f"answered {answer.status_code}"


async def _metrics(address: Path, seconds: float) -> str:
    """Ask one of several gateways on one port: on that port, any of them might answer."""
    try:
        url = f"http://{await in_thread(address.read_text)}/metrics"
    except OSError:
        return "it does not listen yet"
    try:
        async with httpx.AsyncClient(timeout=seconds, trust_env=False) as client:
            answer = await client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"no answer ({type(error).__name__})"
    ready = any(line.startswith(_READY) and float(line[len(_READY) :]) for line in answer.text.splitlines())
    return "" if ready else "it cannot queue inferences yet"


async def _postgres(url: str) -> str:
    dsn = "postgresql://" + url.partition("://")[2]
    try:
        connection = await psycopg.AsyncConnection.connect(dsn, connect_timeout=int(PROBE_SECONDS))
        await connection.close()
    except psycopg.Error as error:
        return str(error).strip().splitlines()[-1]
    return ""


async def _redis(url: str) -> str:
    client = redis.asyncio.Redis.from_url(url, socket_timeout=PROBE_SECONDS, retry=None)
    try:
        await client.ping()
    except (redis.exceptions.RedisError, OSError) as error:
        return str(error)
    finally:
        await client.aclose()
    return ""
