"""Nodes, replicas and allocations in Postgres."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import delete, exists, insert, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.db import violated_constraint
from penstock_kit.errors import Aborted, Internal, Reason
from penstock_scheduler.adapters.documents import version_from_document
from penstock_scheduler.adapters.jobs import SqlJobs
from penstock_scheduler.adapters.mapping import (
    deployment_from_row,
    deployment_values,
    device_values,
    node_from_row,
    node_values,
    replica_from_row,
    replica_values,
)
from penstock_scheduler.adapters.projects import SqlProjects
from penstock_scheduler.adapters.rollouts import same_hands
from penstock_scheduler.adapters.rows import (
    AliasesRow,
    AllocationDeviceRow,
    AllocationRow,
    Base,
    DeploymentRow,
    DeviceRow,
    LeaderRow,
    NodeRow,
    ReplicaRow,
    RequestRow,
    TaskAllocationRow,
    VersionRow,
)
from penstock_scheduler.domain.deployment import Deployment, DeploymentState
from penstock_scheduler.domain.job import Task
from penstock_scheduler.domain.node import DeviceKind, Node, NodeState
from penstock_scheduler.domain.planner import Plan
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.version import Version, VersionKey
from penstock_scheduler.usecases.ports import AllocationView, NodeView, OperatorSays, Stored

_STOPPED = ReplicaState.STOPPED.name
_ROWS = 1000
T = TypeVar("T")


class SqlCluster:
    """Implements `ClusterStore` in an open session.

    Args:
        session: the open session.
        versions: a cache of versions by their revision; shared by all sessions of the process.
    """

    def __init__(self, session: AsyncSession, versions: dict[VersionKey, Version]) -> None:
        self._session = session
        self._versions = versions
        self._jobs = SqlJobs(session)
        self._projects = SqlProjects(session)
        self._loaded: Stored | None = None

    async def load(self) -> Stored:
        """See `ClusterStore.load`. A few statements, whatever the size of the cluster."""
        session = self._session
        devices: dict[str, list[DeviceRow]] = defaultdict(list)
        for device in await session.scalars(select(DeviceRow)):
            devices[device.node].append(device)
        nodes = [node_from_row(row, devices[row.name]) for row in await session.scalars(select(NodeRow))]
        alive = select(DeploymentRow).where(DeploymentRow.delete_time.is_(None))
        deployments = [deployment_from_row(row) for row in await session.scalars(alive)]
        names = {d.uid: d.name for d in deployments}
        rows = await session.scalars(select(ReplicaRow).where(ReplicaRow.state != _STOPPED))
        # The statements see different moments. The leader alone makes replicas and ends deployments, so that
        # its loop misses nothing; any other reader leaves out those of a deployment that it did not see.
        replicas = [
            replica_from_row(row, names[row.deployment_uid]) for row in rows if row.deployment_uid in names
        ]
        needed = {r.version for r in replicas}
        for deployment in deployments:
            for spec in (deployment.asked, deployment.serving):
                needed.update(target.version for target in (spec.targets if spec else ()))
        jobs, tasks, marks = await self._jobs.load()
        self._loaded = Stored(
            nodes={n.name: n for n in nodes},
            deployments={d.name: d for d in deployments},
            replicas={r.id: r for r in replicas},
            versions=await self.load_versions(needed),
            aliases={row.model: row.aliases for row in await session.scalars(select(AliasesRow))},
            jobs=jobs,
            tasks=tasks,
            job_marks=marks,
            projects=await self._projects.load(),
        )
        return self._loaded

    async def load_versions(self, keys: set[VersionKey]) -> Mapping[VersionKey, Version]:
        """See `ClusterStore.load_versions`."""
        # What was measured of a version changes, unlike all else of it.
        changing = select(
            VersionRow.model, VersionRow.number, VersionRow.measured_memory_bytes, VersionRow.revision
        ).where(or_(VersionRow.measured_memory_bytes.is_not(None), VersionRow.revision > 0))
        measured: dict[VersionKey, int] = {}
        old: set[VersionKey] = set()
        for model, number, count, revision in await self._session.execute(changing):
            key = VersionKey(model, number)
            measured[key] = count or 0
            known = self._versions.get(key)
            if known is not None and known.revision != revision:
                old.add(key)
        # What is old is replaced, never taken out: another session may be about to return it.
        missing = sorted(key for key in keys if key in old or key not in self._versions)
        if missing:
            query = select(VersionRow).where(tuple_(VersionRow.model, VersionRow.number).in_(missing))
            for row in await self._session.scalars(query):
                version = replace(version_from_document(row.document), revision=row.revision)
                self._versions[version.key] = version
        for key, count in measured.items():
            known = self._versions.get(key)
            if known is not None and count and known.measured_memory_bytes != count:
                self._versions[key] = replace(known, measured_memory_bytes=count)
        return {key: self._versions[key] for key in keys}

    async def apply(self, plan: Plan, epoch: int) -> None:
        """See `ClusterStore.apply`."""
        session = self._session
        # A share lock: whoever takes the lead over waits for this transaction, or this one sees it.
        if await session.scalar(select(LeaderRow.epoch).with_for_update(read=True)) != epoch:
            raise Aborted("Another scheduler leads now.", reason=Reason.CONFLICT)
        uids = await self._lock_deployments(
            {r.deployment for r in plan.replicas}, {d.name for d in plan.deployments}
        )
        await self._lock_projects(plan)
        stopped = [r.id for r in plan.replicas if r.state is ReplicaState.STOPPED]
        try:
            if stopped:
                # In one statement, as what projects hold is counted once for each.
                await session.execute(
                    delete(AllocationDeviceRow).where(AllocationDeviceRow.replica.in_(stopped))
                )
                await session.execute(delete(AllocationRow).where(AllocationRow.replica.in_(stopped)))
            await self._jobs.free([task for task in plan.tasks if not task.placed])
            await self._save_nodes(plan.nodes)
            await self._save_replicas(plan.replicas, uids)
            await self._jobs.save(plan.jobs, plan.tasks)
            await self._allocate([r for r in plan.replicas if r.placed], [t for t in plan.tasks if t.placed])
            for deployment in plan.deployments:
                await self._save_deployment(deployment)
            for key, count in plan.measured:
                await session.execute(
                    update(VersionRow)
                    .where(VersionRow.model == key.model, VersionRow.number == key.number)
                    .values(measured_memory_bytes=count)
                )
            if plan.removed:
                await session.execute(
                    update(DeploymentRow)
                    .where(DeploymentRow.name.in_(plan.removed), DeploymentRow.delete_time.is_(None))
                    .where(DeploymentRow.state == DeploymentState.DELETING.name)
                    .values(delete_time=datetime.now(UTC))
                )
        except IntegrityError as error:
            raise refused(error) from error

    async def keep_aliases(self, model: str, aliases: Mapping[str, int]) -> None:
        """See `ClusterStore.keep_aliases`."""
        statement = upsert(AliasesRow).values(model=model, aliases=dict(aliases))
        await self._session.execute(
            statement.on_conflict_do_update(index_elements=["model"], set_={"aliases": dict(aliases)})
        )

    async def prune(self, before: datetime) -> None:
        """See `ClusterStore.prune`."""
        await self._session.execute(
            delete(ReplicaRow).where(ReplicaRow.state == _STOPPED, ReplicaRow.update_time < before)
        )
        await self._session.execute(delete(RequestRow).where(RequestRow.time < before))
        gone = (
            select(NodeRow.name)
            .where(NodeRow.state == NodeState.LOST.name, NodeRow.last_seen_time < before)
            .where(~exists().where(ReplicaRow.node == NodeRow.name))
            .where(~exists().where(TaskAllocationRow.node == NodeRow.name))
        )
        names = list(await self._session.scalars(gone))
        await self._session.execute(delete(DeviceRow).where(DeviceRow.node.in_(names)))
        await self._session.execute(delete(NodeRow).where(NodeRow.name.in_(names)))

    async def node(self, name: str, *, lock: bool = False) -> NodeView | None:
        """See `ClusterStore.node`."""
        query = select(NodeRow).where(NodeRow.name == name)
        found = await self._node_views(query.with_for_update(key_share=True) if lock else query)
        return found[0] if found else None

    async def mark_node(self, name: str, says: OperatorSays) -> bool:
        """See `ClusterStore.mark_node`."""
        done = await self._session.execute(
            update(NodeRow)
            .where(NodeRow.name == name)
            .values(
                cordoned=says.cordoned, draining=says.draining, taints=[list(taint) for taint in says.taints]
            )
            .returning(NodeRow.name)
        )
        return done.first() is not None

    async def nodes(self, after: str, limit: int) -> Sequence[NodeView]:
        """See `ClusterStore.nodes`."""
        return await self._node_views(
            select(NodeRow).where(NodeRow.name > after).order_by(NodeRow.name).limit(limit)
        )

    async def replicas(
        self, after: str, limit: int, *, deployment: str, node: str, stopped: bool
    ) -> Sequence[Replica]:
        """See `ClusterStore.replicas`."""
        query = (
            select(ReplicaRow, DeploymentRow.name)
            .join(DeploymentRow, DeploymentRow.uid == ReplicaRow.deployment_uid)
            .where(ReplicaRow.id > after)
            .order_by(ReplicaRow.id)
            .limit(limit)
        )
        if deployment:
            query = query.where(DeploymentRow.name == deployment)
        if node:
            query = query.where(ReplicaRow.node == node)
        if not stopped:
            query = query.where(ReplicaRow.state != _STOPPED)
        return [replica_from_row(row, name) for row, name in await self._session.execute(query)]

    async def allocations(self, after: str, limit: int, *, node: str) -> Sequence[AllocationView]:
        """See `ClusterStore.allocations`."""
        if "/" in after:  # no replica has one in its id
            return await self._jobs.allocations(after, limit, node=node)
        query = (
            select(ReplicaRow, DeploymentRow.name, AllocationRow.create_time)
            .join(DeploymentRow, DeploymentRow.uid == ReplicaRow.deployment_uid)
            .join(AllocationRow, AllocationRow.replica == ReplicaRow.id)
            .where(AllocationRow.replica > after)
            .order_by(AllocationRow.replica)
            .limit(limit)
        )
        if node:
            query = query.where(AllocationRow.node == node)
        found = [
            AllocationView(row.id, replica_from_row(row, name), time)
            for row, name, time in await self._session.execute(query)
        ]
        if len(found) < limit:
            found += await self._jobs.allocations("", limit - len(found), node=node)
        return found

    # -- parts ------------------------------------------------------------------------------------

    async def _lock_projects(self, plan: Plan) -> None:
        """Makes sure that the quotas which a plan keeps stay until the transaction ends.

        Raises:
            Aborted: one was changed since the plan was made.
        """
        before = self._loaded
        if before is None:
            return
        names = {before.deployments[r.deployment].project for r in plan.replicas}
        names.update(before.jobs[task.job].project for task in plan.tasks)
        present = await self._projects.lock(names) if names else {}
        for name in sorted(names):
            if present.get(name) != before.projects.get(name):
                raise Aborted(f"Project {name} changed meanwhile.", reason=Reason.CONFLICT)

    async def _lock_deployments(self, placed: Collection[str], judged: Collection[str]) -> Mapping[str, int]:
        """Makes sure that deployments stay in their projects until the transaction ends; their uids by name.

        Args:
            placed: those of whose replicas something changes.
            judged: those that change themselves.

        Raises:
            Aborted: one has moved since the plan was made.
        """
        query = (
            select(DeploymentRow.name, DeploymentRow.uid, DeploymentRow.project)
            .where(DeploymentRow.name.in_({*placed, *judged}), DeploymentRow.delete_time.is_(None))
            .order_by(DeploymentRow.uid)
        )
        rows = list(await self._session.execute(query.with_for_update(key_share=True)))
        known = self._loaded.deployments if self._loaded else {}
        for row in rows:
            if row.name in known and row.project != known[row.name].project:
                raise Aborted(f"Deployment {row.name} moved meanwhile.", reason=Reason.CONFLICT)
        return {row.name: row.uid for row in rows}

    async def _save_nodes(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            values = node_values(node)
            statement = upsert(NodeRow).values(**values)
            await self._session.execute(
                statement.on_conflict_do_update(index_elements=["name"], set_=_excluded(statement, values))
            )
            devices = device_values(node)
            await self._session.execute(
                delete(DeviceRow).where(
                    DeviceRow.node == node.name, DeviceRow.id.not_in([d["id"] for d in devices])
                )
            )
            if devices:
                statement = upsert(DeviceRow).values(devices)
                await self._session.execute(
                    statement.on_conflict_do_update(
                        index_elements=["node", "id"], set_=_excluded(statement, devices[0])
                    )
                )

    async def _save_replicas(self, replicas: Sequence[Replica], uids: Mapping[str, int]) -> None:
        changing = (
            "state",
            "message",
            "node",
            "devices",
            "resources",
            "surge",
            "restarts",
            "pid",
            "update_time",
        )
        for part in _parts(replicas):
            statement = upsert(ReplicaRow).values([replica_values(r, uids[r.deployment]) for r in part])
            await self._session.execute(
                statement.on_conflict_do_update(index_elements=["id"], set_=_excluded(statement, changing))
            )

    async def _allocate(self, replicas: Sequence[Replica], tasks: Sequence[Task]) -> None:
        """Gives replicas and tasks their parts of nodes; those that have them already keep them."""
        query = select(AllocationRow.replica).where(AllocationRow.replica.in_([r.id for r in replicas]))
        held = set(await self._session.scalars(query)) if replicas else set()
        fresh = [r for r in replicas if r.id not in held]
        keeping = {task.id for task in await self._jobs.held(tasks)}
        new_tasks = [task for task in tasks if task.id not in keeping]
        if not fresh and not new_tasks:
            return
        sizes = await self._take_in({r.node for r in fresh} | {task.node for task in new_tasks})
        if new_tasks:
            await self._jobs.allocate(new_tasks, sizes)
        if not fresh:
            return
        now = datetime.now(UTC)
        await self._insert(
            AllocationRow,
            [
                {
                    "replica": r.id,
                    "node": r.node,
                    "cpu_millis": r.resources.cpu_millis,
                    "memory_bytes": r.resources.memory_bytes,
                    "gpus": r.resources.gpus,
                    "gpu_memory_bytes": r.resources.gpu_memory_bytes,
                    "gpu_memory_millis": r.resources.gpu_memory_millis,
                    "digest": r.digest,
                    "disk_bytes": r.resources.disk_bytes,
                    "create_time": now,
                }
                for r in fresh
            ],
        )
        devices = [
            {
                "replica": r.id,
                "node": r.node,
                "device": d,
                "memory_bytes": r.resources.gpu_bytes(sizes.get((r.node, d), 0)),
            }
            for r in fresh
            if r.resources.gpus
            for d in r.devices
        ]
        await self._insert(AllocationDeviceRow, devices)

    async def _insert(self, row: type[Base], values: Sequence[Mapping[str, Any]]) -> None:
        """Inserts rows, many by each statement."""
        for part in _parts(values):
            await self._session.execute(insert(row).values(list(part)))

    async def _take_in(self, names: Collection[str]) -> Mapping[tuple[str, str], int]:
        """Makes sure that nodes take new replicas until the transaction ends; the memory of their GPUs.

        Raises:
            Aborted: one was cordoned since the plan was made.
        """
        query = select(NodeRow.name, NodeRow.cordoned, NodeRow.draining).where(NodeRow.name.in_(names))
        for row in await self._session.execute(query.order_by(NodeRow.name).with_for_update(key_share=True)):
            if row.cordoned or row.draining:
                raise Aborted(f"Node {row.name} was cordoned meanwhile.", reason=Reason.CONFLICT)
        gpus = select(DeviceRow.node, DeviceRow.id, DeviceRow.memory_bytes).where(
            DeviceRow.node.in_(names), DeviceRow.kind == DeviceKind.GPU.name
        )
        return {(row.node, row.id): row.memory_bytes for row in await self._session.execute(gpus)}

    async def _save_deployment(self, deployment: Deployment) -> None:
        """Stores where a deployment stands, unless what it is asked for has changed meanwhile."""
        values = deployment_values(deployment)
        done = await self._session.execute(
            update(DeploymentRow)
            .where(
                DeploymentRow.uid == deployment.uid,
                DeploymentRow.revision == deployment.revision,
                DeploymentRow.state != DeploymentState.DELETING.name,
                same_hands(deployment),
            )
            .values({key: values[key] for key in ("serving", "scale", "state", "message", "update_time")})
            .returning(DeploymentRow.uid)
        )
        if done.first() is None:
            raise Aborted(f"Deployment {deployment.name} changed meanwhile.", reason=Reason.CONFLICT)

    async def _node_views(self, query: Any) -> Sequence[NodeView]:
        rows = list(await self._session.scalars(query))
        devices: dict[str, list[DeviceRow]] = defaultdict(list)
        names = [row.name for row in rows]
        for device in await self._session.scalars(select(DeviceRow).where(DeviceRow.node.in_(names))):
            devices[device.node].append(device)
        return [
            NodeView(
                node_from_row(row, devices[row.name]),
                row.cpu_millis_allocated,
                row.memory_bytes_allocated,
                row.disk_bytes_allocated,
                {
                    d.id: d.memory_bytes if d.exclusive else d.memory_bytes_allocated
                    for d in devices[row.name]
                },
            )
            for row in rows
        ]


def refused(error: IntegrityError) -> Internal:
    """What it means that the database refused a plan."""
    constraint = violated_constraint(error)
    return Internal(
        f"The database refused a plan: it would break {constraint}. Nothing was changed.",
        metadata={"constraint": constraint},
    )


def _parts(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """As many at a time as a statement may have parameters for."""
    return (items[start : start + _ROWS] for start in range(0, len(items), _ROWS))


def _excluded(statement: Any, columns: Iterable[str]) -> dict[str, Any]:
    return {column: statement.excluded[column] for column in columns}
