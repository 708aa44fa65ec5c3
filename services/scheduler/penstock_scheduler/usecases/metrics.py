"""What the scheduler counts, in Prometheus form."""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import Counter, Gauge, Histogram

from penstock_scheduler.domain.deployment import DeploymentState
from penstock_scheduler.domain.job import ENDED, JobState
from penstock_scheduler.domain.node import NodeState
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.replica import ReplicaState

PASS_SECONDS = Histogram(
    "penstock_scheduler_pass_seconds",
    "Time of one pass over the cluster: load, plan, apply, publish",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
REFUSED_PLANS = Counter(
    "penstock_scheduler_refused_plans", "Plans that the database refused; each one is a fault of ours"
)
LEADING = Gauge("penstock_scheduler_leading", "1 while this scheduler leads")
_NODES = Gauge("penstock_scheduler_nodes", "Nodes by state", ["state"])
_DEPLOYMENTS = Gauge("penstock_scheduler_deployments", "Deployments by state", ["state"])
_REPLICAS = Gauge("penstock_scheduler_replicas", "Replicas by state", ["state"])
_JOBS = Gauge("penstock_scheduler_jobs", "Jobs that have not ended, by state", ["state"])
_DESIRED = Gauge(
    "penstock_scheduler_desired_replicas",
    "Replicas of each target that the load asks for, of deployments with autoscaling",
    ["deployment"],
)


def count(snapshot: Snapshot) -> None:
    """Sets the gauges to what the snapshot has, zeros included."""
    nodes = Tally(node.state for node in snapshot.nodes.values())
    for node_state in NodeState:
        _NODES.labels(node_state.name).set(nodes[node_state])
    deployments = Tally(deployment.state for deployment in snapshot.deployments.values())
    for deployment_state in DeploymentState:
        _DEPLOYMENTS.labels(deployment_state.name).set(deployments[deployment_state])
    replicas = Tally(replica.state for replica in snapshot.replicas.values())
    for replica_state in ReplicaState:
        if replica_state is not ReplicaState.STOPPED:
            _REPLICAS.labels(replica_state.name).set(replicas[replica_state])
    jobs = Tally(job.state for job in snapshot.jobs.values())
    for job_state in JobState:
        if job_state not in ENDED:
            _JOBS.labels(job_state.name).set(jobs[job_state])
    # Of deployments that are gone nothing is to be left.
    _DESIRED.clear()
    for deployment in snapshot.deployments.values():
        if deployment.autoscaling is not None:
            _DESIRED.labels(deployment.name).set(deployment.desired_replicas)
