"""The agent's end of the Attach stream: the whole status up, the desired state down."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Protocol

import grpc
from google.protobuf.json_format import MessageToJson

from penstock.scheduler.v1 import job_pb2, node_service_pb2, node_service_pb2_grpc, replica_pb2
from penstock_kit.errors import PenstockError, Reason
from penstock_kit.joining import JOIN_TOKEN_KEY
from penstock_kit.names import parse_deployment, parse_replica, parse_task, parse_version
from penstock_worker.domain.replica import BatchingPolicy
from penstock_worker.domain.supervision import BundleFile, DesiredReplica
from penstock_worker.domain.task import DesiredTask

log = logging.getLogger(__name__)

STATUS_SECONDS = 1.0
SPACING_SECONDS = 0.02
"""Between two statuses at least: changes of many replicas go up together."""
FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 2.0
SETTLED_SECONDS = 5.0
"""A stream of so long was sound. Shorter ones, as when two agents bear one name, slow retries down."""


class ChangeCount(Protocol):
    """Something that changes now and then."""

    @property
    def count(self) -> int:
        """Changes so far."""

    async def since(self, count: int, seconds: float) -> None:
        """Return when there was a change after `count`, or after so many seconds without one."""


class SchedulerClient:
    """Stays attached to the scheduler for as long as the agent runs.

    Args:
        channel: To the scheduler, or to several of which one leads.
        schedulers: How many.
        join_token: Proves that this node belongs to the mesh; empty if the scheduler is on this machine and
            has none.
        status: Returns the whole status now.
        changes: Tells when the status has changed.
        apply: Takes up a desired state.
        attached: Called with true when the scheduler has answered, with false when it is gone.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        status: Callable[[], node_service_pb2.AttachRequest],
        changes: ChangeCount,
        apply: Callable[[int, list[DesiredReplica], list[DesiredTask]], None],
        attached: Callable[[bool], Awaitable[None]],
        schedulers: int = 1,
        join_token: str = "",
    ) -> None:
        self._stub = node_service_pb2_grpc.NodeServiceStub(channel)
        self._status = status
        self._changes = changes
        self._apply = apply
        self._attached = attached
        self._schedulers = schedulers
        self._metadata = ((JOIN_TOKEN_KEY, join_token),) if join_token else ()

    async def run(self) -> None:
        """Attach again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        pause = FIRST_RETRY_SECONDS
        said: set[str] = set()
        tried = 0
        while True:
            began = loop.time()
            why = "The scheduler ended the stream."
            try:
                await self._attach()
            except PenstockError as error:
                why = str(error)
                if error.reason == Reason.CONFLICT:
                    # The name is another machine's by now, and what ran here was placed anew: it must not
                    # run twice.
                    self._apply(0, [], [])
            await self._attached(False)
            if loop.time() - began > SETTLED_SECONDS:
                pause, said, tried = FIRST_RETRY_SECONDS, set(), 0
            if why not in said:
                log.warning("not attached to the scheduler", extra={"why": why})
                said.add(why)
            tried += 1
            if tried % self._schedulers:
                # The channel has gone on to the next one, which may lead: ask all before a pause.
                continue
            # Agents that all lost one scheduler must not come back to the next in step.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
            pause = min(2 * pause, LAST_RETRY_SECONDS)

    async def _attach(self) -> None:
        answers = self._stub.Attach(self._statuses(), metadata=self._metadata)
        attached = False
        try:
            async for answer in answers:
                if not attached:
                    attached = True
                    log.info("attached to the scheduler")
                    await self._attached(True)
                self._apply(answer.generation, _all_desired(answer.replicas), _all_tasks(answer.tasks))
        finally:
            answers.cancel()

    async def _statuses(self) -> AsyncIterator[node_service_pb2.AttachRequest]:
        while True:
            seen = self._changes.count
            yield self._status()
            await asyncio.sleep(SPACING_SECONDS)
            await self._changes.since(seen, STATUS_SECONDS)


def _all_desired(specs: Iterable[replica_pb2.ReplicaSpec]) -> list[DesiredReplica]:
    """Convert what is well-formed; one that is not must not keep the others from running."""
    found = []
    for spec in specs:
        try:
            found.append(_desired(spec))
        except PenstockError as error:
            log.error(
                "the scheduler wants something malformed", extra={"replica": spec.name, "error": str(error)}
            )
    return found


def _desired(spec: replica_pb2.ReplicaSpec) -> DesiredReplica:
    model, version = parse_version(spec.version)
    # They may be recorded at any time, and are nothing that a replica goes by.
    spec.manifest.metrics.clear()
    return DesiredReplica(
        replica=parse_replica(spec.name),
        deployment=parse_deployment(spec.deployment),
        version_name=spec.version,
        model=model,
        version=version,
        digest=spec.digest,
        manifest=spec.manifest.SerializeToString(deterministic=True),
        manifest_json=MessageToJson(spec.manifest, indent=None),
        files=tuple(BundleFile(file.path, file.size_bytes, file.sha256) for file in spec.files),
        batching=BatchingPolicy(
            spec.batching.max_batch_size,
            spec.batching.max_delay_microseconds,
            spec.batching.pad_variable_dimensions,
            spec.batching.latency_objective_microseconds,
        ),
        cpu_millis=spec.resources.cpu_millis,
        memory_bytes=spec.resources.memory_bytes,
        devices=tuple(spec.devices),
        queue=spec.queue,
        draining=spec.draining,
        handed_over=spec.handed_over,
        curves=tuple(
            (profile.device, tuple((point.batch_size, point.p50_seconds) for point in profile.points))
            for profile in spec.profiles
        ),
    )


def _all_tasks(specs: Iterable[job_pb2.TaskSpec]) -> list[DesiredTask]:
    """Convert what is well-formed, likewise."""
    found = []
    for spec in specs:
        try:
            found.append(_desired_task(spec))
        except PenstockError as error:
            log.error(
                "the scheduler wants something malformed", extra={"task": spec.name, "error": str(error)}
            )
    return found


def _desired_task(spec: job_pb2.TaskSpec) -> DesiredTask:
    job, number = parse_task(spec.name)
    kind = spec.job.WhichOneof("work") or ""
    script = spec.job.train.script
    tasks = max(1, spec.tasks)
    made = spec.job.create_time.ToNanoseconds()
    spec.job.ClearField("create_time")
    return DesiredTask(
        name=spec.name,
        job=job,
        number=number,
        attempt=spec.attempt,
        index=spec.index,
        tasks=tasks,
        least_tasks=min(spec.job.min_nodes or tasks, tasks),
        ranks=max(1, spec.job.ranks_per_node),
        kind=kind,
        spec=spec.job.SerializeToString(deterministic=True),
        cpu_millis=spec.resources.cpu_millis,
        memory_bytes=spec.resources.memory_bytes,
        devices=tuple(spec.devices),
        user_code=kind == "train" and spec.job.train.WhichOneof("way") == "script",
        max_output_bytes=script.max_output_bytes,
        max_processes=script.max_processes,
        rendezvous=spec.rendezvous,
        stopping=spec.stopping,
        stored_event=spec.stored_event,
        made=made,
    )
