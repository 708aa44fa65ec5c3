"""What the use cases need from the outside; `adapters` has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from penstock_scheduler.domain.constraints import Taint
from penstock_scheduler.domain.deployment import Deployment, Revision, Target
from penstock_scheduler.domain.job import Job, Task
from penstock_scheduler.domain.node import Node
from penstock_scheduler.domain.planner import Plan
from penstock_scheduler.domain.project import NOTHING, Holding, Project
from penstock_scheduler.domain.replica import Replica
from penstock_scheduler.domain.rollout import Rollout
from penstock_scheduler.domain.version import Version, VersionKey
from penstock_scheduler.usecases.job_ports import JobEventStore, JobMark, JobStore


@dataclass(frozen=True, slots=True)
class Uses:
    """A filter: deployments that ask for or serve a model, one version of it, or one alias of it."""

    model: str
    version: int = 0
    alias: str = ""


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A deployment, with the replicas that answer now, by version."""

    deployment: Deployment
    ready: Mapping[VersionKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node, with what is given out of it.

    Attributes:
        node: the node.
        cpu_millis: thousandths of cores given out.
        memory_bytes: memory given out.
        disk_bytes: disk given out, once per bundle.
        devices: memory given out of each device; the whole of a GPU that is held alone.
    """

    node: Node
    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    devices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class OperatorSays:
    """What operators say of a node; see `Node`."""

    cordoned: bool = False
    draining: bool = False
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True)
class AllocationView:
    """A part of a node, and the replica or task that holds it.

    Attributes:
        key: where it stands among all: replicas by their ids, then tasks by job and number.
    """

    key: str
    holder: Replica | Task
    create_time: datetime


@dataclass(frozen=True, slots=True)
class ProjectView:
    """A project with what it holds.

    Attributes:
        project: the project.
        held: what its replicas and tasks hold.
        total: what the cluster has.
        waiting: its replicas and tasks that wait for a place.
    """

    project: Project
    held: Holding = NOTHING
    total: Holding = NOTHING
    waiting: int = 0

    @property
    def share(self) -> float:
        """Its dominant share over its weight."""
        return self.held.share_of(self.total) / self.project.weight


@dataclass(frozen=True, slots=True)
class Stored:
    """The cluster as the database has it."""

    nodes: Mapping[str, Node]
    deployments: Mapping[str, Deployment]
    replicas: Mapping[str, Replica]
    versions: Mapping[VersionKey, Version]
    aliases: Mapping[str, Mapping[str, int]]
    jobs: Mapping[str, Job] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    job_marks: Mapping[str, JobMark] = field(default_factory=dict)
    projects: Mapping[str, Project] = field(default_factory=dict)


class DeploymentStore(Protocol):
    """Deployments in the open transaction."""

    async def get(self, name: str, *, lock: bool = False) -> Deployment | None:
        """One that is not gone; with `lock` nobody else changes it until the transaction ends."""

    async def view(self, name: str) -> DeploymentView | None:
        """One with its ready replicas."""

    async def views(self, after: str, limit: int, uses: Uses | None) -> Sequence[DeploymentView]:
        """A page by name."""

    async def add(self, deployment: Deployment) -> Deployment:
        """Stores a new one and gives it its uid.

        Raises:
            AlreadyExists: the name is taken.
        """

    async def replace(self, deployment: Deployment) -> None:
        """Stores what changed of one that was read with `lock`."""

    async def add_revision(self, deployment: Deployment, cause: str) -> None:
        """Keeps what is asked for now as a revision."""

    async def revision(self, deployment: Deployment, number: int) -> Revision | None:
        """One revision."""

    async def revisions(self, deployment: Deployment, before: int, limit: int) -> Sequence[Revision]:
        """A page, newest first, of those with a number below `before` (0: all)."""

    async def claim_request(self, request_id: str, fingerprint: str) -> Deployment | None:
        """What an earlier request of this id made; None if the id is new.

        A second request of the same id waits until the transaction of the first has ended.

        Raises:
            FailedPrecondition: the id was used for something else.
        """

    async def keep_request(self, request_id: str, fingerprint: str, deployment: Deployment) -> None:
        """Remembers what a request id made."""

    async def keep_versions(self, versions: Collection[Version]) -> None:
        """Stores copies of versions in place of older ones."""


class ClusterStore(Protocol):
    """Nodes, replicas and allocations in the open transaction."""

    async def load(self) -> Stored:
        """All that the planner reads; STOPPED replicas are left out."""

    async def load_versions(self, keys: set[VersionKey]) -> Mapping[VersionKey, Version]:
        """Copies of versions that were stored by `keep_versions`."""

    async def apply(self, plan: Plan, epoch: int) -> None:
        """Carries a plan out.

        Raises:
            Aborted: a deployment changed since the plan was made, or another scheduler leads.
            Internal: the plan would give out more than a node has; nothing was changed.
        """

    async def keep_aliases(self, model: str, aliases: Mapping[str, int]) -> None:
        """Stores where a model's aliases point."""

    async def prune(self, before: datetime) -> None:
        """Forgets STOPPED replicas, LOST nodes and request ids that are older."""

    async def node(self, name: str, *, lock: bool = False) -> NodeView | None:
        """One node; with `lock` nobody else changes it until the transaction ends."""

    async def mark_node(self, name: str, says: OperatorSays) -> bool:
        """Stores what operators say of a node; false if there is none of that name."""

    async def nodes(self, after: str, limit: int) -> Sequence[NodeView]:
        """A page by name."""

    async def replicas(
        self, after: str, limit: int, *, deployment: str, node: str, stopped: bool
    ) -> Sequence[Replica]:
        """A page by id; empty filters let everything through."""

    async def allocations(self, after: str, limit: int, *, node: str) -> Sequence[AllocationView]:
        """A page after a key: replicas, then tasks of jobs."""


class RolloutStore(Protocol):
    """Rollouts, and what served when, in the open transaction."""

    async def keep(self, deployment: Deployment, rollout: Rollout) -> None:
        """Stores a rollout for ever, over what was stored of it before."""

    async def decided(self, before: Deployment, after: Deployment) -> None:
        """Stores what the loop decided on a deployment.

        Raises:
            Aborted: somebody changed it, or its rollout, since it was read.
        """

    async def get(self, deployment: Deployment, number: int) -> Rollout | None:
        """One rollout."""

    async def page(self, deployment: Deployment, before: int, limit: int) -> Sequence[Rollout]:
        """A page, newest first, of those with a number below `before` (0: all)."""

    async def serves(self, uid: int, targets: tuple[Target, ...], now: datetime) -> None:
        """Keeps what callers of a deployment get from now on; nothing if nothing answers."""

    async def served_last(self) -> Mapping[int, tuple[Target, ...]]:
        """What was kept last, by uid of the deployments that are not gone."""

    async def served_at(self, name: str, moment: datetime) -> tuple[tuple[Target, ...], datetime] | None:
        """What callers of that name got at a moment, and since when; None if nobody knows."""


class ProjectStore(Protocol):
    """Projects in the open transaction. Who locks deployments too locks them first."""

    async def lock(self, names: Collection[str], *, alone: bool = False) -> Mapping[str, Project]:
        """Those of these names that there are; nobody else changes them until the transaction ends.

        With `alone` nobody names them anew either.
        """

    async def held(self, name: str) -> Holding:
        """What a project holds."""

    async def held_by(self, deployment_uid: int) -> Holding:
        """What the replicas of a deployment hold."""

    async def used_by(self, name: str) -> str:
        """A deployment or an unfinished job that names a project; empty if none does."""

    async def view(self, name: str) -> ProjectView | None:
        """One with what it holds."""

    async def views(self, after: str, limit: int) -> Sequence[ProjectView]:
        """A page by name."""

    async def add(self, project: Project) -> None:
        """Stores a new one.

        Raises:
            AlreadyExists: the name is taken.
        """

    async def replace(self, project: Project) -> None:
        """Stores what changed of one that was read with `lock`; what it holds beyond its quota stays."""

    async def remove(self, name: str) -> None:
        """Forgets one that was read with `lock`."""


class Work(Protocol):
    """A transaction; leaving it without `commit` changes nothing."""

    @property
    def deployments(self) -> DeploymentStore:
        """Deployments."""

    @property
    def rollouts(self) -> RolloutStore:
        """Rollouts."""

    @property
    def jobs(self) -> JobStore:
        """Jobs."""

    @property
    def projects(self) -> ProjectStore:
        """Projects."""

    @property
    def job_events(self) -> JobEventStore:
        """Events of jobs."""

    @property
    def cluster(self) -> ClusterStore:
        """Nodes, replicas and allocations."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def commit(self) -> None:
        """Makes everything since the block was entered durable."""


class Works(Protocol):
    """Opens transactions."""

    def __call__(self) -> Work:
        """A new transaction, to be used once."""


class Registry(Protocol):
    """The registry, as the scheduler uses it."""

    async def resolve(self, model: str, selector: str) -> Version:
        """The READY version that a number or alias means.

        Raises:
            NotFound: no such model, version or alias.
            FailedPrecondition: the version is not READY.
            Unavailable: the registry cannot be reached.
        """

    async def artifact(self, name: str) -> str:
        """The full name of the READY artifact that a name means: artifacts/{artifact}/versions/{version}.

        Raises:
            NotFound: no such artifact.
            FailedPrecondition: it is not READY.
            Unavailable: the registry cannot be reached.
        """

    async def check_answers(self, artifact: str) -> None:
        """Returns if an artifact, which there need not be yet, may get predictions.

        Raises:
            FailedPrecondition: it is of another kind.
            Unavailable: the registry cannot be reached.
        """

    async def newest(self, model: str) -> str:
        """The full name of the newest READY version of a model.

        Raises:
            NotFound: no such model, or it has no READY version.
            Unavailable: the registry cannot be reached.
        """

    async def aliases(self, model: str) -> Mapping[str, AliasNow]:
        """Where the aliases of a model point now.

        Raises:
            NotFound: no such model.
            Unavailable: the registry cannot be reached.
        """


@dataclass(frozen=True, slots=True)
class AliasNow:
    """Where an alias points, and who moved it there."""

    version: int
    moved_by: str


class Leadership(Protocol):
    """At most one scheduler leads at any time."""

    async def try_lead(self) -> int | None:
        """The epoch of this scheduler's lead; None while another one leads.

        Raises:
            Unavailable: the database cannot be reached, and so nobody knows.
        """

    async def release(self) -> None:
        """Lets another one lead."""


class Wakeup(Protocol):
    """Tells the reconcile loop that something changed."""

    def wake(self) -> None:
        """Let it look now."""


__all__ = [
    "AliasNow",
    "AllocationView",
    "ClusterStore",
    "DeploymentStore",
    "DeploymentView",
    "Leadership",
    "NodeView",
    "OperatorSays",
    "ProjectStore",
    "ProjectView",
    "Registry",
    "RolloutStore",
    "Stored",
    "Uses",
    "Wakeup",
    "Work",
    "Works",
]
