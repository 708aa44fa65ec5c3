"""Puts the scheduler together: the only place that constructs adapters."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from penstock.scheduler.v1 import (
    job_service_pb2,
    job_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    project_service_pb2,
    project_service_pb2_grpc,
    routing_service_pb2,
    routing_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
from penstock_kit.db import check_schema, migrate, open_engine, wait_for_database
from penstock_kit.errors import FailedPrecondition, PenstockError, Unavailable
from penstock_kit.lifecycle import TaskSet
from penstock_kit.rpc import RpcServer, open_channel
from penstock_kit.telemetry import MetricsServer, configure_logging, configure_tracing, shutdown_tracing
from penstock_scheduler.adapters.event_stream import RedisEventStream
from penstock_scheduler.adapters.job_queue import RedisJobQueue
from penstock_scheduler.adapters.redis import Redis
from penstock_scheduler.adapters.registry import GrpcRegistry
from penstock_scheduler.adapters.work import SqlLeadership, SqlWorks
from penstock_scheduler.api.job_references import canary_of
from penstock_scheduler.api.jobs import JobServicer
from penstock_scheduler.api.nodes import NodeServicer
from penstock_scheduler.api.projects import ProjectServicer
from penstock_scheduler.api.routing import RoutingServicer
from penstock_scheduler.api.scheduler import SchedulerServicer
from penstock_scheduler.domain.joining import Doorkeeper
from penstock_scheduler.domain.planner import JobPolicy, Policy
from penstock_scheduler.domain.resources import Defaults
from penstock_scheduler.settings import SchedulerSettings
from penstock_scheduler.usecases.aliases import AliasFollower
from penstock_scheduler.usecases.attach import AttachHub
from penstock_scheduler.usecases.deployments import Deployments
from penstock_scheduler.usecases.inspect import Inspect
from penstock_scheduler.usecases.job_canaries import JobCanaries
from penstock_scheduler.usecases.job_events import EventIntake, JobEvents
from penstock_scheduler.usecases.job_queue import JobQueueIntake
from penstock_scheduler.usecases.job_results import JobResults
from penstock_scheduler.usecases.job_retention import JobRetention, Retention
from penstock_scheduler.usecases.jobs import Jobs
from penstock_scheduler.usecases.measurements import MeasurementFollower
from penstock_scheduler.usecases.nodes import Nodes
from penstock_scheduler.usecases.projects import Projects
from penstock_scheduler.usecases.reconcile import Reconciler
from penstock_scheduler.usecases.rollouts import Rollouts
from penstock_scheduler.usecases.traffic import Traffic
from penstock_scheduler.usecases.wake import Wake, WakeAll

log = logging.getLogger(__name__)

SERVICE = "scheduler"
RETRY_SECONDS = 1.0
# Aliases are followed at once; what was measured of a version may be so many times later.
RARER = 10


class Scheduler:
    """One scheduler process.

    It listens at once and says NOT_SERVING in its health until the database answers and the first
    pass over the cluster is done; it says so again whenever a pass fails.

    Args:
        settings: what the operator set.
        on_fatal: called when it turns out that this process can never work.
    """

    def __init__(self, settings: SchedulerSettings, on_fatal: Callable[[PenstockError], None]) -> None:
        self._settings = settings
        self._on_fatal = on_fatal
        defaults = Defaults(
            cpu_millis=settings.scheduler_default_cpu_millis,
            memory_base_bytes=settings.scheduler_default_memory_bytes,
        )
        policy = Policy(
            node_lease_seconds=settings.node_lease_seconds,
            node_silence_seconds=settings.node_silence_seconds,
            defaults=defaults,
            jobs=JobPolicy(return_seconds=settings.node_return_seconds),
        )
        # A name of this process only: by it the others see, and end, all that a stopped leader holds.
        self._engine: AsyncEngine = open_engine(
            settings.database_url, application=f"penstock-scheduler {secrets.token_hex(4)}"
        )
        self._channel = open_channel(settings.registry_address)
        self._tasks = TaskSet()
        self._wake = Wake()
        alias_wake = Wake()
        works = SqlWorks(self._engine)
        registry = GrpcRegistry(self._channel)
        self._leadership = SqlLeadership(self._engine)
        self._hub = AttachHub(self._wake)
        self.traffic = Traffic(self._wake)
        deployments = Deployments(works, registry, WakeAll(self._wake, alias_wake), defaults)
        self._results = JobResults(
            registry,
            self._wake,
            lambda: self._reconciler.leading,
            JobCanaries(deployments, canary_of).begin,
        )
        self._reconciler = Reconciler(
            works, self._leadership, self._hub, self._wake, policy, self.traffic, self._results
        )
        self._redis = [
            Redis(settings.redis_url, f"penstock-scheduler-{use}") for use in ("events", "putting", "taking")
        ]
        events, putting, taking = self._redis
        queue = RedisJobQueue(putting, taking)
        self._queue = JobQueueIntake(queue, self._wake, lambda: self._reconciler.leading)
        self._intake = EventIntake(
            RedisEventStream(events),
            works,
            self._reconciler.events_came,
            self._wake,
            lambda: self._reconciler.leading,
        )
        self._aliases = AliasFollower(
            works,
            registry,
            alias_wake,
            self._wake,
            lambda: self._reconciler.leading,
            settings.alias_poll_seconds,
        )
        self._measurements = MeasurementFollower(
            works,
            registry,
            self._wake,
            lambda: self._reconciler.leading,
            RARER * settings.alias_poll_seconds,
        )
        self._server = RpcServer(settings.scheduler_listen, max_message_bytes=settings.max_message_bytes)
        inspect = Inspect(works, self._hub.silence)
        self._server.add(
            scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server,
            SchedulerServicer(
                deployments,
                Rollouts(works, self._wake, self._reconciler.deployments),
                Nodes(works, inspect, self._wake),
                inspect,
                self._reconciler,
            ),
            scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name,
        )
        jobs = Jobs(works, registry, registry, self._wake, queue, self._reconciler.jobs)
        self.retention = JobRetention(
            works,
            jobs,
            Retention(_days(settings.job_details_days), _days(settings.jobs_days)),
            lambda: self._reconciler.leading,
        )
        self._server.add(
            job_service_pb2_grpc.add_JobServiceServicer_to_server,
            JobServicer(jobs, JobEvents(works, jobs)),
            job_service_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
        )
        self._server.add(
            project_service_pb2_grpc.add_ProjectServiceServicer_to_server,
            ProjectServicer(Projects(works, self._wake)),
            project_service_pb2.DESCRIPTOR.services_by_name["ProjectService"].full_name,
        )
        self._server.add(
            node_service_pb2_grpc.add_NodeServiceServicer_to_server,
            NodeServicer(self._hub, self._tasks, Doorkeeper(settings.join_token)),
            node_service_pb2.DESCRIPTOR.services_by_name["NodeService"].full_name,
        )
        self._server.add(
            routing_service_pb2_grpc.add_RoutingServiceServicer_to_server,
            RoutingServicer(self._reconciler, self.traffic),
            routing_service_pb2.DESCRIPTOR.services_by_name["RoutingService"].full_name,
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

    async def start(self) -> None:
        """Listens, and works as soon as the database answers.

        Raises:
            Unavailable: the address cannot be bound.
        """
        await self._server.start()
        log.info("listening on %s", self._server.address)
        self._tasks.run_forever("health", self._report_health)
        self._tasks.spawn("scheduler", self._work())

    async def stop(self) -> None:
        """Ends the streams and calls, gives the lead to another scheduler, closes what is open."""
        self._hub.stop()
        # Another one leads while the last calls end here.
        await self._tasks.stop()
        await self._leadership.release()
        await self._server.stop(grace=1.0)
        for connection in self._redis:
            connection.close()
        await self._channel.close()
        await self._engine.dispose()

    async def _work(self) -> None:
        ready = await self._prepare()
        while not ready:
            await asyncio.sleep(RETRY_SECONDS)
            ready = await self._prepare()
        self._tasks.run_forever("reconcile", self._reconciler.run)
        self._tasks.run_forever("lead", self._leadership.beat)
        self._tasks.run_forever("listen", self._reconciler.listen)
        self._tasks.run_forever("aliases", self._aliases.run)
        self._tasks.run_forever("measurements", self._measurements.run)
        self._tasks.run_forever("queue of jobs", self._queue.run)
        self._tasks.run_forever("events of jobs", self._intake.run)
        self._tasks.run_forever("results of jobs", self._results.run)
        self._tasks.run_forever("jobs of long ago", self.retention.run)

    async def _prepare(self) -> bool:
        """Waits for a database with the right schema; whoever deploys may migrate it meanwhile."""
        await wait_for_database(self._engine, on_unreachable=_say_unreachable)
        try:
            if self._settings.migrate_on_start:
                await asyncio.to_thread(migrate, self._settings.database_url, SERVICE)
            await check_schema(self._engine, SERVICE)
        except FailedPrecondition as error:
            log.error("%s", error)
            if self._settings.migrate_on_start:
                self._on_fatal(error)
            return False
        except PenstockError as error:
            log.warning("%s", error)
            return False
        return True

    async def _report_health(self) -> None:
        generation = 0
        while True:
            generation, healthy = await self._reconciler.healthy.newer(generation)
            await self._server.set_serving(healthy)


def _days(count: float) -> timedelta | None:
    return timedelta(days=count) if count else None


def _say_unreachable(error: Unavailable) -> None:
    log.warning("waiting for the database: %s", error)


async def serve(settings: SchedulerSettings, stopping: asyncio.Event) -> None:
    """Runs a scheduler until `stopping` is set.

    Raises:
        FailedPrecondition: the database's schema is newer than this code.
        Unavailable: the address cannot be bound.
    """
    configure_logging(f"penstock-{SERVICE}", level=settings.log_level, style=settings.log_format)
    configure_tracing(f"penstock-{SERVICE}", settings.otlp_endpoint)
    metrics = MetricsServer(settings.metrics_listen, data_dir=settings.data_dir)
    failures: list[PenstockError] = []

    def give_up(error: PenstockError) -> None:
        failures.append(error)
        stopping.set()

    scheduler = Scheduler(settings, give_up)
    try:
        await metrics.start()
        await scheduler.start()
        await stopping.wait()
    finally:
        await scheduler.stop()
        await metrics.stop()
        shutdown_tracing()
    if failures:
        raise failures[0]
