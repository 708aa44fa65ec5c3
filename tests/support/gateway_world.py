"""What a gateway sees of the world, and a gateway process in it.

Scheduler and registry are real gRPC servers that do as a test says; the replica is a thread that reads a
real queue; the gateway is the real process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import httpx
from google.protobuf import empty_pb2

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1 import envelope_pb2 as envelope
from penstock.registry.v1 import model_pb2, registry_service_pb2, registry_service_pb2_grpc, version_pb2
from penstock.scheduler.v1 import (
    deployment_pb2,
    job_pb2,
    job_service_pb2_grpc,
    routing_service_pb2,
    routing_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
from penstock_kit.errors import NotFound, PenstockError, Reason, Unavailable
from penstock_kit.queue.keys import queue_name
from penstock_kit.queue.messages import Request
from penstock_kit.queue.reader import QueueReader
from penstock_kit.rpc import RpcServer
from penstock_local.ports import free_port

PATIENCE_SECONDS = 30.0
DIGEST = "sha256:" + "a" * 64
TRAFFIC_COUNTS = (
    "arrived",
    "succeeded",
    "failed",
    "overloaded",
    "waiting",
    "waiting_for_replica",
    "agreed",
    "disagreed",
)

Answer = tuple[envelope.ReplyHeader, bytes]
Behaviour = Callable[[Request], Answer | None]


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait for a condition; return what it gave."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or 'a condition'}"
        threading.Event().wait(0.01)
    return result


def echo(request: Request) -> Answer:
    """Give each form of request back: tensors as outputs, JSON as it came."""
    header = request.header
    if header.format != envelope.PAYLOAD_FORMAT_OIP_GRPC:
        payload = request.payload
        if header.format == envelope.PAYLOAD_FORMAT_PREDICT:
            payload = json.dumps({"output_data": json.loads(payload)["input_data"]}).encode()
        return envelope.ReplyHeader(json_length=header.json_length), payload
    asked = oip.ModelInferRequest.FromString(request.payload)
    out = oip.ModelInferResponse(model_name=header.model_name, model_version="1", id=asked.id)
    for tensor in asked.inputs:
        out.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    out.raw_output_contents.extend(asked.raw_input_contents)
    return envelope.ReplyHeader(), out.SerializeToString()


def refuse(code: int, reason: Reason, message: str) -> Behaviour:
    """Answer every request with an error."""
    return lambda _: (envelope.ReplyHeader(code=code, reason=int(reason), message=message), b"")


def hold(_: Request) -> None:
    """Never answer."""


class Replica:
    """A thread that reads one queue and does as it is told.

    Args:
        redis_url: Where the queue is.
        queue: Its name.
        number: Makes its consumer unique.
    """

    def __init__(self, redis_url: str, queue: str, number: int = 1) -> None:
        self.queue = queue
        self.behave: Behaviour = echo
        self.seen: list[Request] = []
        self._reader = QueueReader(redis_url, queue, f"scripted.{number}")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._ending.is_set():
            self._reader.heartbeat()
            for request in self._reader.read(64, 50):
                self.seen.append(request)
                answer = self.behave(request)
                if answer is not None:
                    self._reader.finish([(request, *answer)])

    def stop(self) -> None:
        """End; what was read and not answered goes back to the queue."""
        self._ending.set()
        self._thread.join(PATIENCE_SECONDS)
        self._reader.leave()


class _Jobs(job_service_pb2_grpc.JobServiceServicer):
    """One job, whose three events come one after the other."""

    async def WatchJobEvents(self, request: Any, context: Any) -> AsyncIterator[job_pb2.JobEvent]:
        if request.name != "jobs/fit":
            raise NotFound(f"There is no {request.name}.")
        for number in (1, 2, 3):
            yield job_pb2.JobEvent(task=f"{request.name}/tasks/0", number=number, sequence=number)


class World(
    routing_service_pb2_grpc.RoutingServiceServicer,
    scheduler_service_pb2_grpc.SchedulerServiceServicer,
    registry_service_pb2_grpc.RegistryServiceServicer,
):
    """Scheduler and registry, on a thread of their own."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/world.sock"
        self.routes: dict[str, routing_service_pb2.Route] = {}
        self.deployments: dict[str, deployment_pb2.Deployment] = {}
        self.models = {"digits": 2, "trees": 1}
        self.starting_fails = ""
        self.uploading_fails = ""
        self.metadata: dict[str, str] = {}
        self.uploaded = b""
        # What each gateway reported last, by deployment and version; and whether this scheduler takes it.
        self.traffic: dict[str, dict[tuple[str, int], routing_service_pb2.TargetTraffic]] = {}
        self.leads = True
        self.heard: Callable[[routing_service_pb2.ReportTrafficRequest], None] = lambda _: None
        self._generation = 0
        self._changed: asyncio.Event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: RpcServer | None = None

    def start(self) -> Self:
        """Listen."""
        self._thread.start()
        self.on_loop(self._start())
        return self

    def stop(self) -> None:
        """Close."""
        self.on_loop(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_SECONDS)
        self._loop.close()

    def on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the world's loop; return what it gives."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(PATIENCE_SECONDS)

    def offer(
        self,
        name: str,
        *,
        versions: dict[int, int] | None = None,
        ready: int = 1,
        state: int = deployment_pb2.DEPLOYMENT_STATE_READY,
        depth: int = 100,
        message: str = "",
        aliases: dict[int, list[str]] | None = None,
        digest: str = DIGEST,
        max_batch_size: int = 8,
        cache: deployment_pb2.ResponseCache | None = None,
        scales_from_zero: bool = False,
        mirrored: dict[int, int] | None = None,
        tolerance: float = 0.0,
        unready: Collection[int] = (),
    ) -> None:
        """Route a name; `versions` gives the weight of each, `mirrored` the percent of copies of some."""
        route = routing_service_pb2.Route(
            deployment=name,
            max_queue_depth=depth,
            message=message,
            state=deployment_pb2.DeploymentState.Name(state),
            cache=cache,
            scales_from_zero=scales_from_zero,
        )
        for version, weight in (versions or {1: 100}).items():
            target = route.targets.add(
                model=f"models/{name}",
                version=version,
                weight=weight,
                queue=queue_name(name, version, digest),
                ready_replicas=0 if version in unready else ready,
                mirror_percent=(mirrored or {}).get(version, 0),
                mirror_tolerance=tolerance,
                digest=digest,
                aliases=(aliases or {}).get(version, []),
            )
            target.batching.max_batch_size = max_batch_size
            target.manifest.runtime, target.manifest.format = "torch", "pt2"
            signature = target.manifest.signature
            signature.inputs.add(name="x", data_type="DATA_TYPE_FP32", shape=[-1, 4])
            signature.inputs.add(name="note", data_type="DATA_TYPE_BYTES", shape=[-1, 1], optional=True)
            signature.outputs.add(name="y", data_type="DATA_TYPE_FP32", shape=[-1, 2])
        self.routes[name] = route
        self.publish()

    def withdraw(self, name: str) -> None:
        """Route a name no more."""
        self.routes.pop(name, None)
        self.publish()

    def publish(self) -> None:
        """Send the table as it is to every gateway."""
        if threading.current_thread() is self._thread:
            self._publish()
        else:
            self._loop.call_soon_threadsafe(self._publish)

    def _publish(self) -> None:
        self._generation += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _start(self) -> None:
        self._changed = asyncio.Event()
        self._server = server = RpcServer(self.address)
        server.add(
            routing_service_pb2_grpc.add_RoutingServiceServicer_to_server,
            self,
            "penstock.scheduler.v1.RoutingService",
        )
        server.add(
            scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server,
            self,
            "penstock.scheduler.v1.SchedulerService",
        )
        server.add(
            job_service_pb2_grpc.add_JobServiceServicer_to_server, _Jobs(), "penstock.scheduler.v1.JobService"
        )
        server.add(
            registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
            self,
            "penstock.registry.v1.RegistryService",
        )
        await server.start()
        await server.set_serving(True)

    async def _stop(self) -> None:
        assert self._server is not None
        await self._server.stop(0.1)

    # RoutingService

    async def WatchRoutes(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            changed = self._changed
            yield routing_service_pb2.WatchRoutesResponse(
                generation=self._generation + 1, routes=list(self.routes.values())
            )
            await changed.wait()

    async def ReportTraffic(self, request: Any, context: Any) -> routing_service_pb2.ReportTrafficResponse:
        if not self.leads:
            raise Unavailable("Another scheduler leads; report there.")
        self.traffic[request.gateway] = {(one.deployment, one.version): one for one in request.targets}
        self.heard(request)
        return routing_service_pb2.ReportTrafficResponse()

    def counted(self, name: str, version: int = 1) -> routing_service_pb2.TargetTraffic:
        """Return what all gateways together have told of one version."""
        told = routing_service_pb2.TargetTraffic()
        for targets in list(self.traffic.values()):
            one = targets.get((name, version), routing_service_pb2.TargetTraffic())
            for field in TRAFFIC_COUNTS:
                setattr(told, field, getattr(told, field) + getattr(one, field))
        return told

    # SchedulerService

    async def CreateDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        deployment = request.deployment
        deployment.state = deployment_pb2.DEPLOYMENT_STATE_READY
        if self.starting_fails:
            deployment.state = deployment_pb2.DEPLOYMENT_STATE_FAILED
            deployment.message = self.starting_fails
        self.deployments[deployment.name] = deployment
        if not self.starting_fails:
            target = deployment.targets[0]
            self.offer(deployment.name.removeprefix("deployments/"), versions={target.version: 100})
        return deployment

    async def UpdateDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        return await self.CreateDeployment(request, context)

    async def GetDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        self.metadata = {str(k): str(v) for k, v in context.invocation_metadata()}
        if request.name not in self.deployments:
            raise NotFound(
                f"There is no {request.name}.",
                reason=Reason.DEPLOYMENT_NOT_FOUND,
                metadata={"name": request.name},
            )
        return self.deployments[request.name]

    async def WatchDeployment(self, request: Any, context: Any) -> AsyncIterator[deployment_pb2.Deployment]:
        while request.name in self.deployments:
            changed = self._changed
            yield self.deployments[request.name]
            await changed.wait()

    async def DeleteDeployment(self, request: Any, context: Any) -> empty_pb2.Empty:
        await self.GetDeployment(scheduler_service_pb2.GetDeploymentRequest(name=request.name), context)
        del self.deployments[request.name]
        self.withdraw(request.name.removeprefix("deployments/"))
        return empty_pb2.Empty()

    # RegistryService

    async def ResolveVersion(self, request: Any, context: Any) -> version_pb2.Version:
        number = self.models.get(request.model.removeprefix("models/"))
        if number is None:
            raise NotFound(f"There is no {request.model}.", reason=Reason.MODEL_NOT_FOUND)
        return version_pb2.Version(name=f"{request.model}/versions/{number}", number=number)

    async def ListModels(self, request: Any, context: Any) -> registry_service_pb2.ListModelsResponse:
        return registry_service_pb2.ListModelsResponse(
            models=[
                model_pb2.Model(name=f"models/{name}", latest_version=version)
                for name, version in self.models.items()
            ]
        )

    async def UploadArtifact(
        self, requests: Any, context: Any
    ) -> registry_service_pb2.UploadArtifactResponse:
        if self.uploading_fails:
            await anext(requests)
            raise NotFound(self.uploading_fails, reason=Reason.VERSION_NOT_FOUND)
        parts = [part.chunk async for part in requests]
        self.uploaded = b"".join(parts)
        file = version_pb2.BundleFile(path="model.pt2", received_bytes=len(self.uploaded))
        return registry_service_pb2.UploadArtifactResponse(file=file)

    async def DownloadArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for at in range(0, len(self.uploaded), 100_000):
            yield registry_service_pb2.DownloadArtifactResponse(chunk=self.uploaded[at : at + 100_000])


class GatewayProcess:
    """One gateway process.

    Args:
        world: Scheduler and registry.
        redis_url: Where the queues are.
        folder: For its log.
        settings: Further environment variables.
    """

    def __init__(self, world: World, redis_url: str, folder: Path, **settings: str) -> None:
        self.port = free_port("127.0.0.1")
        self.log = folder / f"gateway-{self.port}.log"
        self.environment = {
            **os.environ,
            "PENSTOCK_REDIS_URL": redis_url,
            "PENSTOCK_SCHEDULER_ADDRESS": world.address,
            "PENSTOCK_REGISTRY_ADDRESS": world.address,
            "PENSTOCK_GATEWAY_LISTEN": f"127.0.0.1:{self.port}",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.target}"

    def start(self, *, ready: bool = True) -> Self:
        """Start, and wait until it answers (and, unless told otherwise, is ready)."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock_gateway"], env=self.environment, stdout=log, stderr=log
            )
        path = "/readyz" if ready else "/healthz"
        wait_until(lambda: self._answers(path), f"{path}; log:\n{self.text()}")
        return self

    def _answers(self, path: str) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.text()
        try:
            return httpx.get(self.url + path, timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def text(self) -> str:
        """Its log."""
        return self.log.read_text() if self.log.exists() else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; return its status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)


def is_error(error: BaseException) -> PenstockError:
    """Return an error of the tree, for tests that look into it."""
    assert isinstance(error, PenstockError), repr(error)
    return error
