"""A real scheduler on a real database, with a scripted agent and a small registry at its sides."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from penstock.common.v1 import resources_pb2
from penstock.registry.v1 import (
    artifact_pb2,
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    manifest_pb2,
    model_pb2,
    registry_service_pb2_grpc,
    version_pb2,
)
from penstock.scheduler.v1 import (
    deployment_pb2,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    job_work_pb2,
    node_pb2,
    node_service_pb2,
    node_service_pb2_grpc,
    replica_pb2,
    routing_service_pb2,
    routing_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
from penstock_kit.db import migrate
from penstock_kit.errors import InvalidArgument, NotFound, PenstockError, Reason
from penstock_kit.rpc import RpcServer, open_channel
from penstock_scheduler.app import Scheduler
from penstock_scheduler.settings import SchedulerSettings

GIB = 1024**3
# Conditions come true within milliseconds, or on a busy machine whenever it finds the time.
PATIENCE_SECONDS = 60.0


class CannedRegistry(
    registry_service_pb2_grpc.RegistryServiceServicer, artifact_service_pb2_grpc.ArtifactServiceServicer
):
    """Knows the versions and aliases that a test gives it, and every artifact; answers like the registry."""

    def __init__(self) -> None:
        self.finalized: list[str] = []
        self.deleted: list[str] = []
        self.checkpoints: dict[str, list[artifact_pb2.Artifact]] = {}
        self.refusal: PenstockError | None = None
        self.versions: dict[str, version_pb2.Version] = {}
        self.alias_of: dict[str, dict[str, int]] = {}
        self.calls = 0

    def push(
        self,
        model: str = "digits",
        number: int = 1,
        *,
        runtime: str = "torch",
        state: version_pb2.VersionState = version_pb2.VERSION_STATE_READY,
        size_bytes: int = 1_000_000,
        resources: resources_pb2.Resources | None = None,
    ) -> version_pb2.Version:
        """Makes a version known."""
        name = f"models/{model}/versions/{number}"
        digest = hashlib.sha256(name.encode()).hexdigest()
        version = version_pb2.Version(
            name=name,
            number=number,
            state=state,
            digest=f"sha256:{digest}",
            size_bytes=size_bytes,
            manifest=manifest_pb2.Manifest(
                runtime=runtime, format="pt2", entrypoint="model.pt2", resources=resources
            ),
            files=[version_pb2.BundleFile(path="model.pt2", size_bytes=size_bytes, sha256=digest)],
        )
        self.versions[name] = version
        self.alias_of.setdefault(model, {})
        return version

    async def ResolveVersion(self, request: Any, context: Any) -> version_pb2.Version:
        self.calls += 1
        model = request.model.removeprefix("models/")
        if model not in self.alias_of:
            raise NotFound(f"There is no model {model}.", reason=Reason.MODEL_NOT_FOUND)
        number = request.selector or str(max(v.number for v in self.versions.values()))
        if not number.isdecimal():
            if number not in self.alias_of[model]:
                raise NotFound(f"There is no alias {number}.", reason=Reason.ALIAS_NOT_FOUND)
            number = str(self.alias_of[model][number])
        version = self.versions.get(f"models/{model}/versions/{number}")
        if version is None:
            raise NotFound(f"There is no version {number}.", reason=Reason.VERSION_NOT_FOUND)
        return version

    async def GetModel(self, request: Any, context: Any) -> model_pb2.Model:
        self.calls += 1
        model = request.name.removeprefix("models/")
        if model not in self.alias_of:
            raise NotFound(f"There is no model {model}.", reason=Reason.MODEL_NOT_FOUND)
        return model_pb2.Model(
            name=request.name,
            aliases=[
                model_pb2.Alias(name=f"{request.name}/aliases/{alias}", version=number, updated_by="ann")
                for alias, number in self.alias_of[model].items()
            ],
        )

    async def GetArtifact(self, request: Any, context: Any) -> artifact_pb2.Artifact:
        name = request.name if "/versions/" in request.name else f"{request.name}/versions/3"
        if name.startswith("artifacts/missing/"):
            raise NotFound(f"There is no {name}.", reason=Reason.RESOURCE_NOT_FOUND)
        maker = "jobs/other" if name.startswith("artifacts/foreign/") else "jobs/fit"
        kind = artifact_pb2.ARTIFACT_KIND_DATASET
        return artifact_pb2.Artifact(name=name, state=artifact_pb2.ARTIFACT_STATE_READY, job=maker, kind=kind)

    async def ListArtifacts(self, request: Any, context: Any) -> artifact_service_pb2.ListArtifactsResponse:
        found = self.checkpoints.get(request.parent, ())
        return artifact_service_pb2.ListArtifactsResponse(artifacts=found)

    async def GetVersion(self, request: Any, context: Any) -> version_pb2.Version:
        """All that nobody pushed was made by the job of the tests."""
        if request.name in self.versions:
            return self.versions[request.name]
        if not request.name.startswith("models/"):
            raise InvalidArgument(f"{request.name} is no name of a version.")
        lineage = manifest_pb2.Lineage(job="jobs/fit")
        return version_pb2.Version(name=request.name, manifest=manifest_pb2.Manifest(lineage=lineage))

    async def FinalizeVersion(self, request: Any, context: Any) -> version_pb2.Version:
        if self.refusal is not None:
            raise self.refusal
        self.finalized.append(request.name)
        return version_pb2.Version(name=request.name, state=version_pb2.VERSION_STATE_READY)

    async def FinalizeArtifact(self, request: Any, context: Any) -> artifact_pb2.Artifact:
        if self.refusal is not None:
            raise self.refusal
        self.finalized.append(request.name)
        return artifact_pb2.Artifact(name=request.name, state=artifact_pb2.ARTIFACT_STATE_READY)

    async def DeleteVersion(self, request: Any, context: Any) -> Empty:
        self.deleted.append(request.name)
        return Empty()

    async def DeleteArtifact(self, request: Any, context: Any) -> Empty:
        self.deleted.append(request.name)
        return Empty()


class ScriptedAgent:
    """Speaks Attach for real; runs nothing. By default it does at once what it is told."""

    def __init__(
        self,
        address: str,
        name: str = "n1",
        *,
        cpu_millis: int = 4000,
        memory_bytes: int = 8 * GIB,
        gpus: int = 0,
        runtimes: tuple[str, ...] = ("torch", "onnx", "sklearn"),
        instance: str = "",
    ) -> None:
        self.node = node_pb2.Node(
            name=f"nodes/{name}",
            cpu_millis=cpu_millis,
            memory_bytes=memory_bytes,
            runtimes=runtimes,
            address="unix:/nowhere",
            agent_version="1",
            instance=instance,
            devices=[
                node_pb2.Device(id="cpu", kind=node_pb2.DEVICE_KIND_CPU, memory_bytes=memory_bytes),
                *(
                    node_pb2.Device(id=f"gpu{i}", kind=node_pb2.DEVICE_KIND_GPU, memory_bytes=16 * GIB)
                    for i in range(gpus)
                ),
            ],
        )
        self.observed: dict[str, replica_pb2.ObservedReplica] = {}
        self.desired: dict[str, replica_pb2.ReplicaSpec] = {}
        self.tasks: dict[str, job_pb2.TaskSpec] = {}
        self.observed_tasks: dict[str, job_pb2.ObservedTask] = {}
        self.works: Callable[[job_pb2.TaskSpec], job_pb2.ObservedTask | None] = run_task
        self.generation = 0
        self.generations: list[int] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.hold: Callable[[replica_pb2.ReplicaSpec], bool] = lambda spec: False
        self.loads: Callable[[replica_pb2.ReplicaSpec], str] = lambda spec: ""
        self.silent = False
        self.reports = 0
        self.heartbeat_seconds = 0.3
        self.memory_bytes = 0
        self._address = address
        self._tasks: list[asyncio.Task[None]] = []
        self._poke = asyncio.Event()
        self._told = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None

    async def attach(self) -> None:
        """Opens the stream."""
        self._channel = grpc.aio.insecure_channel(
            self._address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.error = None
        call = node_service_pb2_grpc.NodeServiceStub(self._channel).Attach()
        self._tasks = [asyncio.create_task(self._send(call)), asyncio.create_task(self._receive(call))]

    async def told(self, after: int) -> None:
        """Waits for a desired state of a generation above `after`."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.generation <= after:
                self._told.clear()
                await self._told.wait()

    async def vanish(self) -> None:
        """Breaks the stream, as a killed process does."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._channel is not None:
            await self._channel.close()

    def say(
        self, replica: str, state: replica_pb2.ReplicaState, message: str = "", restarts: int = 0
    ) -> None:
        """Reports a replica."""
        self.observed[replica] = replica_pb2.ObservedReplica(
            name=replica,
            state=state,
            message=message,
            restarts=restarts,
            pid=4242,
            memory_bytes=self.memory_bytes,
        )
        self._poke.set()

    def obey(self) -> None:
        """Does what it was told, but for what is held."""
        for name, spec in self.desired.items():
            if self.hold(spec):
                if name not in self.observed:
                    self.say(name, replica_pb2.REPLICA_STATE_STARTING)
            elif spec.draining:
                self.say(name, replica_pb2.REPLICA_STATE_STOPPED)
            elif problem := self.loads(spec):
                self.say(name, replica_pb2.REPLICA_STATE_BACKOFF, problem, restarts=1)
            else:
                self.say(name, replica_pb2.REPLICA_STATE_READY)
        for name in [n for n in self.observed if n not in self.desired]:
            del self.observed[name]
        for name, task in self.tasks.items():
            if (seen := self.works(task)) is not None:
                seen.name = name
                self.observed_tasks[name] = seen
        for name in [n for n in self.observed_tasks if n not in self.tasks]:
            del self.observed_tasks[name]
        self._poke.set()

    def say_task(self, name: str, state: str, **fields: Any) -> None:
        """Reports a task."""
        number = job_pb2.TaskState.Value(f"TASK_STATE_{state}")
        self.observed_tasks[name] = job_pb2.ObservedTask(name=name, state=number, **fields)
        self._poke.set()

    async def _send(self, call: Any) -> None:
        while True:
            if not self.silent:
                await call.write(
                    node_service_pb2.AttachRequest(
                        node=self.node,
                        replicas=self.observed.values(),
                        tasks=self.observed_tasks.values(),
                        observed_generation=self.generation,
                    )
                )
                self.reports += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(self.heartbeat_seconds):
                    await self._poke.wait()
            self._poke.clear()

    async def _receive(self, call: Any) -> None:
        try:
            async for response in call:
                self.generation = response.generation
                self.generations.append(response.generation)
                self.desired = {spec.name: spec for spec in response.replicas}
                self.tasks = {spec.name: spec for spec in response.tasks}
                self.obey()
                self._told.set()
        except grpc.aio.AioRpcError as error:
            self.error = error


def run_task(spec: job_pb2.TaskSpec) -> job_pb2.ObservedTask | None:
    """What an agent sees of a task that goes on and on, until it is to stop."""
    state = job_pb2.TASK_STATE_STOPPED if spec.stopping else job_pb2.TASK_STATE_RUNNING
    return job_pb2.ObservedTask(state=state, pid=4242)


class Client:
    """The scheduler's services as callers use them; errors are those of the tree."""

    def __init__(self, address: str) -> None:
        self.channel = open_channel(address)
        self.stub: Any = scheduler_service_pb2_grpc.SchedulerServiceStub(self.channel)
        self.routing: Any = routing_service_pb2_grpc.RoutingServiceStub(self.channel)
        self.jobs: Any = job_service_pb2_grpc.JobServiceStub(self.channel)

    async def create(
        self, name: str = "digits", *targets: deployment_pb2.Target, request_id: str = "", **fields: Any
    ) -> deployment_pb2.Deployment:
        """Creates a deployment; of version 1 of the model of the same name, if no target is given."""
        chosen = targets or (deployment_pb2.Target(model="models/digits", version=1),)
        deployment = deployment_pb2.Deployment(name=f"deployments/{name}", targets=chosen, **fields)
        return await self.stub.CreateDeployment(
            scheduler_service_pb2.CreateDeploymentRequest(deployment=deployment, request_id=request_id)
        )

    async def update(
        self, name: str = "digits", *targets: deployment_pb2.Target, request_id: str = "", **fields: Any
    ) -> deployment_pb2.Deployment:
        """Updates the fields that are given."""
        deployment = deployment_pb2.Deployment(name=f"deployments/{name}", targets=targets, **fields)
        return await self.stub.UpdateDeployment(
            scheduler_service_pb2.UpdateDeploymentRequest(deployment=deployment, request_id=request_id)
        )

    async def get(self, name: str = "digits") -> deployment_pb2.Deployment:
        """Gets a deployment."""
        return await self.stub.GetDeployment(
            scheduler_service_pb2.GetDeploymentRequest(name=f"deployments/{name}")
        )

    async def rollback(self, name: str = "digits", revision: int = 0) -> deployment_pb2.Deployment:
        """Rolls a deployment back."""
        return await self.stub.RollbackDeployment(
            scheduler_service_pb2.RollbackDeploymentRequest(name=f"deployments/{name}", revision=revision)
        )

    async def delete(self, name: str = "digits") -> None:
        """Deletes a deployment."""
        await self.stub.DeleteDeployment(
            scheduler_service_pb2.DeleteDeploymentRequest(name=f"deployments/{name}")
        )

    async def replicas(self, **fields: Any) -> list[replica_pb2.Replica]:
        """Lists replicas."""
        found = await self.stub.ListReplicas(scheduler_service_pb2.ListReplicasRequest(**fields))
        return list(found.replicas)

    async def node(self, name: str = "n1") -> node_pb2.Node:
        """Gets a node."""
        return await self.stub.GetNode(scheduler_service_pb2.GetNodeRequest(name=f"nodes/{name}"))

    async def until(
        self, name: str, holds: Callable[[deployment_pb2.Deployment], bool]
    ) -> deployment_pb2.Deployment:
        """Waits until a deployment is as wanted."""
        seen = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                request = scheduler_service_pb2.WatchDeploymentRequest(name=f"deployments/{name}")
                async for seen in self.stub.WatchDeployment(request):
                    if holds(seen):
                        return seen
        except TimeoutError:
            raise AssertionError(f"it stays as it is:\n{seen}") from None
        raise AssertionError(f"the watch ended:\n{seen}")

    async def until_state(self, state: str, name: str = "digits") -> deployment_pb2.Deployment:
        """Waits until a deployment is in a state."""
        number = deployment_pb2.DeploymentState.Value(f"DEPLOYMENT_STATE_{state}")
        return await self.until(name, lambda seen: seen.state == number)

    async def create_job(self, name: str = "fit", *, request_id: str = "", **fields: Any) -> job_pb2.Job:
        """Creates a job; one that profiles version 1 of the model digits, if nothing else is said."""
        if not {"train", "convert", "compress", "profile", "evaluate", "batch_predict"} & fields.keys():
            fields["profile"] = job_work_pb2.ProfileWork(version="digits:1")
        job = job_pb2.Job(name=f"jobs/{name}", **fields)
        return await self.jobs.CreateJob(job_service_pb2.CreateJobRequest(job=job, request_id=request_id))

    async def job(self, name: str = "fit") -> job_pb2.Job:
        """Gets a job."""
        return await self.jobs.GetJob(job_service_pb2.GetJobRequest(name=f"jobs/{name}"))

    async def cancel_job(self, name: str = "fit") -> job_pb2.Job:
        """Cancels a job."""
        return await self.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=f"jobs/{name}"))

    async def until_job(self, holds: Callable[[job_pb2.Job], bool] | str, name: str = "fit") -> job_pb2.Job:
        """Waits until a job is as wanted, or in a state."""
        if isinstance(holds, str):
            number = job_pb2.JobState.Value(f"JOB_STATE_{holds}")
            wanted: Callable[[job_pb2.Job], bool] = lambda seen: seen.state == number  # noqa: E731
        else:
            wanted = holds
        seen = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                async for seen in self.jobs.WatchJob(job_service_pb2.WatchJobRequest(name=f"jobs/{name}")):
                    if wanted(seen):
                        return seen
        except TimeoutError:
            raise AssertionError(f"it stays as it is:\n{seen}") from None
        raise AssertionError(f"the watch ended:\n{seen}")

    async def routes(
        self, holds: Callable[[dict[str, routing_service_pb2.Route]], bool] = lambda routes: True
    ) -> dict[str, routing_service_pb2.Route]:
        """Waits until the routing table is as wanted."""
        table: dict[str, routing_service_pb2.Route] = {}
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                request = routing_service_pb2.WatchRoutesRequest(gateway="test")
                async for response in self.routing.WatchRoutes(request):
                    table = {route.deployment: route for route in response.routes}
                    if holds(table):
                        return table
        except TimeoutError:
            raise AssertionError(f"it stays as it is:\n{table}") from None
        raise AssertionError("the watch ended")


async def eventually(holds: Callable[[], bool | Awaitable[bool]], what: str = "") -> None:
    """Waits for a condition."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                result = holds()
                if (await result) if isinstance(result, Awaitable) else result:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"it never came true: {what}") from None


class Bench:
    """A scheduler with its neighbours; restarts it, and closes everything in the end."""

    eventually = staticmethod(eventually)

    def __init__(self, folder: Path, database_url: str, leases: dict[str, float]) -> None:
        self.folder = folder
        self.database_url = database_url
        self.registry = CannedRegistry()
        self.address = f"unix:{folder}/s"
        self.registry_address = f"unix:{folder}/r"
        self.scheduler: Scheduler | None = None
        self.agents: list[ScriptedAgent] = []
        self.failures: list[Exception] = []
        self.overrides: dict[str, Any] = dict(leases)
        self._registry_server: RpcServer | None = None
        self._clients: list[Client] = []

    async def start_registry(self) -> None:
        """Starts the registry."""
        self._registry_server = RpcServer(self.registry_address)
        self._registry_server.add(
            registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
            self.registry,
            "penstock.registry.v1.RegistryService",
        )
        self._registry_server.add(
            artifact_service_pb2_grpc.add_ArtifactServiceServicer_to_server,
            self.registry,
            "penstock.registry.v1.ArtifactService",
        )
        await self._registry_server.start()

    async def stop_registry(self) -> None:
        """Stops the registry."""
        if self._registry_server is not None:
            await self._registry_server.stop(0)
            self._registry_server = None

    def settings(self, **overrides: Any) -> SchedulerSettings:
        """Settings for a scheduler of this bench."""
        return SchedulerSettings.load(
            **{
                "database_url": self.database_url,
                "registry_address": self.registry_address,
                "scheduler_listen": self.address,
                "alias_poll_seconds": 0.1,
                # Nothing listens there; tests that send events say where Redis is.
                "redis_url": "redis://127.0.0.1:1/0",
                **self.overrides,
                **overrides,
            }
        )

    async def start(self, **overrides: Any) -> Scheduler:
        """Starts the scheduler."""
        self.scheduler = Scheduler(self.settings(**overrides), self.failures.append)
        await self.scheduler.start()
        return self.scheduler

    async def stop(self) -> None:
        """Stops the scheduler."""
        if self.scheduler is not None:
            await self.scheduler.stop()
            self.scheduler = None

    def client(self, address: str = "") -> Client:
        """A caller."""
        client = Client(address or self.address)
        self._clients.append(client)
        return client

    def stranger(self, name: str = "n1", **traits: Any) -> ScriptedAgent:
        """An agent that is not attached yet, and may be refused."""
        agent = ScriptedAgent(self.address, name, **traits)
        self.agents.append(agent)
        return agent

    async def agent(self, name: str = "n1", **traits: Any) -> ScriptedAgent:
        """An attached agent."""
        agent = ScriptedAgent(self.address, name, **traits)
        self.agents.append(agent)
        await agent.attach()
        await eventually(lambda: agent.generation > 0, "the agent was told its desired state")
        return agent

    async def close(self) -> None:
        """Closes everything."""
        for agent in self.agents:
            await agent.vanish()
        for client in self._clients:
            await client.channel.close()
        await self.stop()
        await self.stop_registry()


@pytest.fixture
def scheduler_database(databases: Any) -> Iterator[str]:
    """The URL of a database with the scheduler's schema."""
    url = databases.create_from("scheduler", lambda url: migrate(url, "scheduler"))
    yield url
    databases.drop(url)


@pytest.fixture
def leases() -> dict[str, float]:
    """The leases of nodes: the usual ones, unless a test that waits for their end gives others.

    Elsewhere a machine too busy for a heartbeat must not make a node lost.
    """
    return {}


@asynccontextmanager
async def open_bench(folder: Path, database_url: str, leases: dict[str, float]) -> AsyncIterator[Bench]:
    """A bench with its registry running, the scheduler not yet."""
    bench = Bench(folder, database_url, leases)
    await bench.start_registry()
    try:
        yield bench
    finally:
        await bench.close()


@pytest.fixture
async def idle_bench(
    short_path: Path, scheduler_database: str, leases: dict[str, float]
) -> AsyncIterator[Bench]:
    """A bench whose scheduler was not started."""
    async with open_bench(short_path, scheduler_database, leases) as bench:
        yield bench


@pytest.fixture
async def bench(idle_bench: Bench) -> Bench:
    """A bench with everything running and version 1 of the model digits pushed."""
    idle_bench.registry.push()
    await idle_bench.start()
    return idle_bench


@pytest.fixture
def client(bench: Bench) -> Client:
    """A caller of the running scheduler."""
    return bench.client()
