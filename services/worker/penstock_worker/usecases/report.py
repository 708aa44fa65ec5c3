"""The one account of a node, for the scheduler (Attach) and for people (WorkerService) alike."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from penstock.scheduler.v1 import job_pb2, node_pb2, node_service_pb2, replica_pb2
from penstock_worker.domain.node import Capacity, NodeIdentity
from penstock_worker.domain.supervision import ObservedReplica
from penstock_worker.domain.task import ObservedTask
from penstock_worker.usecases.ports import BundleStore
from penstock_worker.usecases.reconcile import Reconciler
from penstock_worker.usecases.tasks import TaskReconciler

MAX_MESSAGE_CHARACTERS = 2_000
"""Of a replica's message: statuses are sent each second."""


class Changes:
    """Counts changes, so that whoever remembers a count can wait until there was one since."""

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()

    def __call__(self) -> None:
        """Something has changed."""
        self.count += 1
        self._next.set()
        self._next = asyncio.Event()

    async def since(self, count: int, seconds: float) -> None:
        """Return when there was a change after `count`, or after so many seconds without one."""
        if self.count == count:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._next.wait()


class Report:
    """Puts together what is known of the node.

    Args:
        identity: Returns its name and address.
        capacity: What it has.
        runtimes: Returns the runtimes that work here now.
        bundles: Its cache.
        reconciler: Its replicas.
        tasks: Its tasks of jobs.
    """

    def __init__(
        self,
        identity: Callable[[], NodeIdentity],
        capacity: Capacity,
        runtimes: Callable[[], tuple[str, ...]],
        bundles: BundleStore,
        reconciler: Reconciler,
        tasks: TaskReconciler,
    ) -> None:
        self._identity = identity
        self._capacity = capacity
        self._runtimes = runtimes
        self._bundles = bundles
        self._reconciler = reconciler
        self._tasks = tasks

    def node(self) -> node_pb2.Node:
        """Return the node as its agent sees it."""
        identity = self._identity()
        return node_pb2.Node(
            name=f"nodes/{identity.name}",
            state=node_pb2.NODE_STATE_READY,
            devices=[
                node_pb2.Device(
                    id=device.id,
                    kind=node_pb2.DEVICE_KIND_GPU if device.gpu else node_pb2.DEVICE_KIND_CPU,
                    model=device.model,
                    memory_bytes=device.memory_bytes,
                    parent_uuid=device.parent,
                )
                for device in self._capacity.devices
            ],
            cpu_millis=self._capacity.cpu_millis,
            memory_bytes=self._capacity.memory_bytes,
            labels=dict(identity.labels),
            address=identity.address,
            cached_digests=[bundle.digest for bundle in self._bundles.cached()],
            runtimes=self._runtimes(),
            agent_version=identity.agent_version,
            instance=identity.instance,
            disk_bytes=self._capacity.disk_bytes,
            disk_bytes_free=self._capacity.disk_bytes_free,
        )

    def replicas(self) -> list[replica_pb2.ObservedReplica]:
        """Return every replica that runs or has just ended."""
        return [_observed(replica) for replica in self._reconciler.observed()]

    def status(self) -> node_service_pb2.AttachRequest:
        """Return the whole status, as one message of the Attach stream."""
        return node_service_pb2.AttachRequest(
            node=self.node(),
            replicas=self.replicas(),
            tasks=[_observed_task(task) for task in self._tasks.observed()],
            observed_generation=self._reconciler.generation,
        )


def _observed(replica: ObservedReplica) -> replica_pb2.ObservedReplica:
    return replica_pb2.ObservedReplica(
        name=f"replicas/{replica.replica}",
        state=replica_pb2.ReplicaState.Value(f"REPLICA_STATE_{replica.state.name}"),
        message=replica.message[:MAX_MESSAGE_CHARACTERS],
        pid=replica.pid,
        restarts=replica.restarts,
        memory_bytes=replica.memory_bytes,
    )


def _observed_task(task: ObservedTask) -> job_pb2.ObservedTask:
    found = job_pb2.ObservedTask(
        name=task.name,
        state=job_pb2.TaskState.Value(f"TASK_STATE_{task.state.name}"),
        message=task.message[:MAX_MESSAGE_CHARACTERS],
        pid=task.pid,
        rendezvous=task.rendezvous,
        failure_reason=task.cause,
        permanent=task.permanent,
        results=task.results,
        memory_bytes=task.memory_bytes,
        last_event=task.last_event,
    )
    if task.report:
        found.report.ParseFromString(task.report)
    return found
