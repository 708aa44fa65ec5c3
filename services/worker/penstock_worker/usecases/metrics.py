"""What an agent knows of its node, in Prometheus form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from penstock_worker.domain.supervision import ReplicaState
from penstock_worker.domain.task import TaskState
from penstock_worker.usecases.ports import BundleStore
from penstock_worker.usecases.reconcile import Reconciler
from penstock_worker.usecases.tasks import TaskReconciler


class NodeMetrics:
    """Reads replicas and cache when somebody asks.

    Args:
        reconciler: Keeps the replicas.
        tasks: Keeps the tasks of jobs.
        bundles: The cache.
        cache_limit_bytes: What the cache may take.
    """

    def __init__(
        self, reconciler: Reconciler, tasks: TaskReconciler, bundles: BundleStore, cache_limit_bytes: int
    ) -> None:
        self._reconciler = reconciler
        self._tasks = tasks
        self._bundles = bundles
        self._cache_limit_bytes = cache_limit_bytes

    def read(self) -> Iterator[Metric]:
        """Give all metrics, zeros included."""
        replicas, bundles = self._reconciler.observed(), self._bundles.cached()
        states = Counter(replica.state for replica in replicas)
        by_state = GaugeMetricFamily("penstock_worker_replicas", "Replicas by state.", labels=["state"])
        for state in ReplicaState:
            by_state.add_metric([state.name], states[state])
        yield by_state
        yield GaugeMetricFamily(
            "penstock_worker_replica_restarts",
            "Times that replicas which are here now ended by themselves.",
            value=sum(replica.restarts for replica in replicas),
        )
        yield GaugeMetricFamily(
            "penstock_worker_replica_memory_bytes",
            "Memory that replicas have for themselves.",
            value=sum(replica.memory_bytes for replica in replicas),
        )
        tasks = self._tasks.observed()
        task_states = Counter(task.state for task in tasks)
        by_task_state = GaugeMetricFamily(
            "penstock_worker_tasks", "Tasks of jobs by state.", labels=["state"]
        )
        for task_state in TaskState:
            by_task_state.add_metric([task_state.name], task_states[task_state])
        yield by_task_state
        yield GaugeMetricFamily(
            "penstock_worker_task_memory_bytes",
            "Memory that tasks of jobs have for themselves.",
            value=sum(task.memory_bytes for task in tasks),
        )
        yield GaugeMetricFamily("penstock_worker_bundles", "Bundles in the cache.", value=len(bundles))
        yield GaugeMetricFamily(
            "penstock_worker_bundle_cache_bytes",
            "Bytes of the bundles in the cache.",
            value=sum(bundle.size_bytes for bundle in bundles),
        )
        yield GaugeMetricFamily(
            "penstock_worker_bundle_cache_limit_bytes",
            "What the cache may take.",
            value=self._cache_limit_bytes,
        )
