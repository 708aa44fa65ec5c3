"""Projects in Postgres, with what they hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import BigInteger, Double, Identity, delete, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from penstock_kit.db import violated_constraint
from penstock_kit.errors import AlreadyExists
from penstock_scheduler.adapters.rows import Base, Big, Int, Key, Str, Time
from penstock_scheduler.domain.project import Holding, Project
from penstock_scheduler.usecases.ports import ProjectView


class ProjectRow(Base):
    """A project; the database keeps and bounds the sums of what is allocated, and of what surges."""

    __tablename__ = "projects"
    name: Mapped[Key]
    uid: Mapped[int] = mapped_column(BigInteger, Identity(always=True))
    description: Mapped[Str]
    weight: Mapped[float] = mapped_column(Double)
    revision: Mapped[Int]
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    cpu_millis_quota: Mapped[Big]
    memory_bytes_quota: Mapped[Big]
    gpu_millis_quota: Mapped[Big]
    cpu_millis_bound: Mapped[int | None] = mapped_column(BigInteger)
    memory_bytes_bound: Mapped[int | None] = mapped_column(BigInteger)
    gpu_millis_bound: Mapped[int | None] = mapped_column(BigInteger)
    cpu_millis_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    memory_bytes_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    gpu_millis_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cpu_millis_surge: Mapped[int] = mapped_column(BigInteger, server_default="0")
    memory_bytes_surge: Mapped[int] = mapped_column(BigInteger, server_default="0")
    gpu_millis_surge: Mapped[int] = mapped_column(BigInteger, server_default="0")


# What waits: replicas without a place, and the tasks of jobs in the queue.
_WAITING = text(
    """
    SELECT project, sum(count)::int FROM (
      SELECT d.project, count(*) AS count
        FROM scheduler.replicas r JOIN scheduler.deployments d ON d.uid = r.deployment_uid
       WHERE r.state = 'PENDING' AND d.project = ANY(:names) GROUP BY 1
      UNION ALL
      SELECT project, sum((gang->>'tasks')::int) FROM scheduler.jobs
       WHERE end_time IS NULL AND state = 'QUEUED' AND project = ANY(:names) GROUP BY 1
    ) parts GROUP BY 1
    """
)
_TOTAL = text(
    """
    SELECT coalesce(sum(cpu_millis), 0)::bigint, coalesce(sum(memory_bytes), 0)::bigint,
           (SELECT 1000 * count(*) FROM scheduler.devices JOIN scheduler.nodes ON nodes.name = devices.node
             WHERE devices.kind = 'GPU' AND nodes.state = 'READY')
      FROM scheduler.nodes WHERE state = 'READY'
    """
)
_USED_BY = text(
    """
    SELECT 'deployments/' || name FROM scheduler.deployments
     WHERE project = :name AND delete_time IS NULL
    UNION ALL
    SELECT 'jobs/' || id FROM scheduler.jobs WHERE project = :name AND end_time IS NULL
    ORDER BY 1 LIMIT 1
    """
)
_HELD_BY_DEPLOYMENT = text(
    """
    SELECT coalesce(sum(a.cpu_millis), 0)::bigint, coalesce(sum(a.memory_bytes), 0)::bigint,
           coalesce(sum((SELECT sum(gpu_millis) FROM scheduler.allocation_devices v
                          WHERE v.replica = a.replica)), 0)::bigint
      FROM scheduler.allocations a JOIN scheduler.replicas r ON r.id = a.replica
     WHERE r.deployment_uid = :uid
    """
)


class SqlProjects:
    """Implements `ProjectStore` in an open session."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def load(self) -> Mapping[str, Project]:
        """All projects, by name."""
        rows = await self._session.scalars(select(ProjectRow))
        return {row.name: project_from_row(row) for row in rows}

    async def lock(self, names: Collection[str], *, alone: bool = False) -> Mapping[str, Project]:
        """See `ProjectStore.lock`."""
        query = select(ProjectRow).where(ProjectRow.name.in_(names)).order_by(ProjectRow.name)
        locking = query.with_for_update(key_share=not alone)
        rows = await self._session.scalars(locking.execution_options(populate_existing=True))
        return {row.name: project_from_row(row) for row in rows}

    async def held(self, name: str) -> Holding:
        """See `ProjectStore.held`."""
        row = await self._session.get_one(ProjectRow, name)
        return _counted(row).plus(_surging(row))

    async def held_by(self, deployment_uid: int) -> Holding:
        """See `ProjectStore.held_by`."""
        row = (await self._session.execute(_HELD_BY_DEPLOYMENT, {"uid": deployment_uid})).one()
        return Holding(*row)

    async def used_by(self, name: str) -> str:
        """See `ProjectStore.used_by`."""
        return await self._session.scalar(_USED_BY, {"name": name}) or ""

    async def view(self, name: str) -> ProjectView | None:
        """See `ProjectStore.view`."""
        row = await self._session.get(ProjectRow, name, populate_existing=True)
        return None if row is None else (await self._views([row]))[0]

    async def views(self, after: str, limit: int) -> Sequence[ProjectView]:
        """See `ProjectStore.views`."""
        query = select(ProjectRow).where(ProjectRow.name > after).order_by(ProjectRow.name).limit(limit)
        return await self._views(list(await self._session.scalars(query)))

    async def add(self, project: Project) -> None:
        """See `ProjectStore.add`."""
        quota = project.quota
        try:
            await self._session.execute(
                insert(ProjectRow).values(
                    name=project.name,
                    create_time=project.create_time,
                    **_values(project),
                    cpu_millis_bound=quota.cpu_millis or None,
                    memory_bytes_bound=quota.memory_bytes or None,
                    gpu_millis_bound=quota.gpu_millis or None,
                )
            )
        except IntegrityError as error:
            if violated_constraint(error) == "pk_projects":
                raise AlreadyExists(
                    f"Project {project.name} exists already; choose another name, or update it.",
                    metadata={"project": project.name},
                ) from error
            raise

    async def replace(self, project: Project) -> None:
        """See `ProjectStore.replace`."""
        row = ProjectRow
        bounds = {
            f"{each}_bound": func.greatest(
                quota, getattr(row, f"{each}_allocated"), getattr(row, f"{each}_surge")
            )
            if quota
            else None
            for each, quota in project.quota._asdict().items()
        }
        await self._session.execute(
            update(row).where(row.name == project.name).values(**_values(project), **bounds)
        )

    async def remove(self, name: str) -> None:
        """See `ProjectStore.remove`."""
        await self._session.execute(delete(ProjectRow).where(ProjectRow.name == name))

    async def _views(self, rows: Sequence[ProjectRow]) -> Sequence[ProjectView]:
        names = [row.name for row in rows]
        found = await self._session.execute(_WAITING, {"names": names})
        waiting: dict[str, int] = {row[0]: row[1] for row in found}
        total = Holding(*(await self._session.execute(_TOTAL)).one())
        return [
            ProjectView(
                project_from_row(row), _counted(row).plus(_surging(row)), total, waiting.get(row.name, 0)
            )
            for row in rows
        ]


def project_from_row(row: ProjectRow) -> Project:
    """A project as stored."""
    return Project(
        name=row.name,
        quota=Holding(row.cpu_millis_quota, row.memory_bytes_quota, row.gpu_millis_quota),
        weight=row.weight,
        description=row.description,
        revision=row.revision,
        create_time=row.create_time,
        update_time=row.update_time,
        uid=row.uid,
    )


def _values(project: Project) -> dict[str, float | str | datetime]:
    """Columns that an update changes, but for the bounds."""
    return {
        "description": project.description,
        "weight": project.weight,
        "revision": project.revision,
        "update_time": project.update_time,
        "cpu_millis_quota": project.quota.cpu_millis,
        "memory_bytes_quota": project.quota.memory_bytes,
        "gpu_millis_quota": project.quota.gpu_millis,
    }


def _counted(row: ProjectRow) -> Holding:
    return Holding(row.cpu_millis_allocated, row.memory_bytes_allocated, row.gpu_millis_allocated)


def _surging(row: ProjectRow) -> Holding:
    return Holding(row.cpu_millis_surge, row.memory_bytes_surge, row.gpu_millis_surge)
