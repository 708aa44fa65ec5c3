"""Builds an agent out of its parts and runs it. The only place where adapters are made."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc

from penstock.worker.v1 import worker_service_pb2_grpc
from penstock_kit.lifecycle import running
from penstock_kit.rpc import RpcServer, addresses_of, open_channel
from penstock_kit.telemetry import (
    MetricsServer,
    Readings,
    configure_logging,
    configure_tracing,
    shutdown_tracing,
)
from penstock_worker.adapters.bundle_cache import BundleCache
from penstock_worker.adapters.forkserver.client import ForkServer
from penstock_worker.adapters.installation import installation
from penstock_worker.adapters.instance_lock import InstanceLock
from penstock_worker.adapters.jobs.desk import Desk
from penstock_worker.adapters.jobs.events import EventSender
from penstock_worker.adapters.jobs.host import LAUNCHER_ENTRY, HostPolicy, TaskHost
from penstock_worker.adapters.jobs.registry import JobRegistry
from penstock_worker.adapters.jobs.rooms import JobRooms
from penstock_worker.adapters.node_probe import NodeDevices, memory_of, probe
from penstock_worker.adapters.reclaimer import RedisReclaimer
from penstock_worker.adapters.registry_client import RegistryClient
from penstock_worker.adapters.replica_logs import ReplicaLogFiles
from penstock_worker.adapters.scheduler_client import SchedulerClient
from penstock_worker.api.worker_service import WorkerServicer
from penstock_worker.domain.node import Capacity, NodeIdentity
from penstock_worker.domain.supervision import DesiredReplica
from penstock_worker.domain.task import DesiredTask
from penstock_worker.settings import WorkerSettings
from penstock_worker.usecases.agent import Agent, Background
from penstock_worker.usecases.keeper import ReplicaPolicy, Surroundings
from penstock_worker.usecases.metrics import NodeMetrics
from penstock_worker.usecases.reconcile import Reconciler
from penstock_worker.usecases.report import Changes, Report
from penstock_worker.usecases.task_keeper import TaskPolicy
from penstock_worker.usecases.tasks import TaskReconciler

SERVICE = "penstock-worker"
WORKER_SERVICE = "penstock.worker.v1.WorkerService"
# Named, not imported: the agent itself never loads what only replica processes need.
REPLICA_ENTRY = "penstock_worker.hotpath.replica:run_replica"
WARMTH = "penstock_worker.adapters.forkserver.warmth"
RUNTIMES_GROUP = "penstock.runtimes"
JOBS_GROUP = "penstock.jobs"
PYTHON_RUNTIME = "python"
# What a node that takes programs of users calls that among its runtimes.
SCRIPT_RUNTIME = "script"
LOCK_MARGIN_SECONDS = 15.0


class Health:
    """Ready means that a replica could be started here now: attached, and the fork server is warm."""

    def __init__(self, rpc: RpcServer) -> None:
        self._rpc = rpc
        self._facts = {"attached": False, "warm": False, "staying": True}

    async def set(self, **facts: bool) -> None:
        """Take up facts and publish what follows from all of them."""
        self._facts |= facts
        await self._rpc.set_serving(all(self._facts.values()), [WORKER_SERVICE])


@contextlib.asynccontextmanager
async def agent(
    settings: WorkerSettings,
    *,
    entry: str = REPLICA_ENTRY,
    preload: Sequence[str] | None = None,
    search_path: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
) -> AsyncIterator[RpcServer]:
    """Run an agent for as long as the context lasts; provides its gRPC server.

    Args:
        settings: What it reads.
        entry: What a replica process runs.
        preload: Modules that the fork server imports; default is what the entry and the runtimes need.
        search_path: Folders put before the module search path of replica processes.
        kinds: What a rank runs ("package.module:function") by the kind of work; default is what is installed.
    """
    data_dir = settings.data_dir.absolute()
    runtimes = _runtime_modules(settings)
    changes = Changes()
    background = Background()
    rpc = RpcServer(settings.worker_listen, max_message_bytes=settings.max_message_bytes)
    health = Health(rpc)
    lock = InstanceLock(data_dir / "worker.lock", settings.worker_orphan_drain_seconds + LOCK_MARGIN_SECONDS)
    logs = ReplicaLogFiles(
        data_dir / "logs" / "replicas",
        file_bytes=settings.worker_log_bytes,
        max_files=settings.worker_log_files,
    )
    async with (
        _channel(settings.registry_address, settings) as registry,
        _channel(settings.scheduler_address, settings) as scheduler,
    ):
        bundles = BundleCache(
            data_dir / "bundles",
            limit_bytes=settings.worker_cache_bytes,
            downloader=RegistryClient(registry),
            parallelism=settings.worker_download_parallelism,
            on_change=changes,
        )

        def fork_server_changed() -> None:
            changes()
            background.spawn("publish health", health.set(warm=forks.ready))

        forks = ForkServer(
            entry=entry,
            preload=preload if preload is not None else _preload(entry, runtimes),
            logs=logs,
            grace_seconds=settings.worker_orphan_drain_seconds,
            on_change=fork_server_changed,
            held_fds=lambda: (lock.open(),),
            search_path=search_path,
        )
        capacity = probe(
            cpu_millis=settings.worker_cpu_millis,
            memory_bytes=settings.worker_memory_bytes,
            memory_reserve_bytes=settings.worker_memory_reserve_bytes,
            disk=data_dir,
            disk_limit_bytes=settings.worker_cache_bytes,
        )
        surroundings = Surroundings(
            host=forks,
            bundles=bundles,
            reclaimer=RedisReclaimer(settings.redis_url),
            logs=logs,
            devices=NodeDevices(capacity.devices),
            spawn=background.spawn,
            changed=changes,
        )
        reconciler = Reconciler(_policy(settings, capacity), surroundings)
        jobs = JobRegistry(registry)
        desk, events = Desk(), EventSender(settings.redis_url)
        rooms = JobRooms(data_dir / "jobs", jobs, background.spawn)
        tasks = TaskReconciler(
            TaskPolicy(settings.worker_job_grace_seconds),
            TaskHost(
                forks=forks,
                desk=desk,
                rooms=rooms,
                sender=events,
                registry=jobs,
                bundles=bundles,
                devices=surroundings.devices,
                entries=kinds if kinds is not None else _job_kinds(),
                policy=_host_policy(settings, capacity),
            ),
            background.spawn,
            changes,
        )

        def apply(generation: int, replicas: list[DesiredReplica], wanted: list[DesiredTask]) -> None:
            tasks.apply(wanted)
            reconciler.apply(generation, replicas)

        # Looked up when the directory is this agent's alone, and then known.
        instance = functools.cache(lambda: installation(data_dir))
        report = Report(
            lambda: NodeIdentity(
                settings.worker_node,
                settings.worker_address or rpc.address,
                settings.worker_labels,
                importlib.metadata.version("penstock"),
                instance(),
            ),
            capacity,
            lambda: (
                *(name for name, module in runtimes.items() if forks.preloaded.get(module) == ""),
                *((SCRIPT_RUNTIME,) if _allows_programs(settings) else ()),
            ),
            bundles,
            reconciler,
            tasks,
        )
        client = SchedulerClient(
            scheduler,
            status=report.status,
            changes=changes,
            apply=apply,
            attached=lambda attached: health.set(attached=attached),
            schedulers=len(addresses_of(settings.scheduler_address)),
            join_token=next(iter(settings.join_token), ""),
        )
        rpc.add(
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server,
            WorkerServicer(report, bundles, settings.worker_cache_bytes, logs),
            WORKER_SERVICE,
        )
        life = Agent(
            reconciler=reconciler,
            tasks=tasks,
            background=background,
            attach=client.run,
            publish_health=lambda staying: health.set(staying=staying),
            logs=logs,
            memory_of=memory_of,
            changes=changes,
            clean=rooms.clean,
        )
        # Before anything is made: a directory that cannot be used is said in one line.
        lock.open()
        # The fork server warms up while the lock is waited for. Nothing asks it for a process before that.
        metrics = MetricsServer(settings.metrics_listen, data_dir=data_dir)
        readings = Readings(NodeMetrics(reconciler, tasks, bundles, settings.worker_cache_bytes).read)
        async with running([forks, lock, bundles, readings, metrics, rpc, desk, events, life]):
            background.spawn("send what jobs have left", _send_leftovers(events, rooms, tasks))
            yield rpc


async def _send_leftovers(events: EventSender, rooms: JobRooms, tasks: TaskReconciler) -> None:
    """Send what an agent before this one has left of jobs, but of those that go on."""
    await tasks.told()
    await events.send_leftovers(rooms.directory, tasks.wants)


async def serve(stopping: asyncio.Event) -> None:
    """Run the service until `stopping`."""
    settings = WorkerSettings.load()
    configure_logging(SERVICE, level=settings.log_level, style=settings.log_format)
    configure_tracing(SERVICE, settings.otlp_endpoint)
    try:
        async with agent(settings):
            await stopping.wait()
    finally:
        shutdown_tracing()


@contextlib.asynccontextmanager
async def _channel(address: str, settings: WorkerSettings) -> AsyncIterator[grpc.aio.Channel]:
    channel = open_channel(address, max_message_bytes=settings.max_message_bytes)
    try:
        yield channel
    finally:
        await channel.close()


def _runtime_modules(settings: WorkerSettings) -> dict[str, str]:
    """Return the modules of the runtimes that this node may offer, by their names."""
    found = {point.name: point.module for point in importlib.metadata.entry_points(group=RUNTIMES_GROUP)}
    wanted = settings.worker_runtimes or tuple(found)
    return {
        name: module
        for name, module in found.items()
        if name in wanted and (name != PYTHON_RUNTIME or settings.allow_python_runtime)
    }


def _job_kinds() -> dict[str, str]:
    """Return what a rank runs, by the kind of work."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=JOBS_GROUP)}


def _allows_programs(settings: WorkerSettings) -> bool:
    """Whether programs of users may run here: who allows their models in Python allows that, too."""
    return settings.allow_user_code or settings.allow_python_runtime


def _preload(entry: str, runtimes: Mapping[str, str]) -> list[str]:
    return [entry.partition(":")[0], LAUNCHER_ENTRY.partition(":")[0], *runtimes.values(), WARMTH]


def _stands_for_all(host: str) -> bool:
    """Return whether a host is the address of no machine, by which one listens on all its addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _host_policy(settings: WorkerSettings, capacity: Capacity) -> HostPolicy:
    host = settings.worker_job_host
    if not host:
        address = settings.worker_address or settings.worker_listen
        host = "" if address.startswith("unix:") else address.rpartition(":")[0].strip("[]")
    if _stands_for_all(host):
        try:
            host = socket.gethostbyname(socket.gethostname())
        except OSError:  # a machine that does not know its own name
            host = ""
    processor = next((device.model for device in capacity.devices if not device.gpu), "")
    return HostPolicy(
        host=host or "127.0.0.1",
        grace_seconds=settings.worker_job_grace_seconds,
        max_regroups=settings.worker_job_regroups,
        log_bytes=settings.worker_log_bytes,
        allow_user_code=_allows_programs(settings),
        allow_python_runtime=settings.allow_python_runtime,
        allow_compiled_models=settings.allow_compiled_models,
        processor=processor,
        nice=settings.worker_job_nice,
        redis_url=settings.redis_url,
        scheduler_address=settings.scheduler_address,
    )


def _policy(settings: WorkerSettings, capacity: Capacity) -> ReplicaPolicy:
    return ReplicaPolicy(
        redis_url=settings.redis_url,
        start_seconds=settings.worker_start_seconds,
        drain_seconds=settings.worker_drain_seconds,
        allow_python_runtime=settings.allow_python_runtime,
        allow_compiled_models=settings.allow_compiled_models,
        log_level=settings.log_level.lower(),
        otlp_endpoint=settings.otlp_endpoint,
        scheduler_address=settings.scheduler_address,
        device_models={device.id: device.model for device in capacity.devices},
    )
