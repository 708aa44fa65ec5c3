"""Deployments in Postgres."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.db import violated_constraint
from penstock_kit.errors import AlreadyExists, FailedPrecondition, Reason
from penstock_scheduler.adapters.mapping import (
    deployment_from_row,
    deployment_values,
    revision_from_row,
    spec_to_json,
)
from penstock_scheduler.adapters.rows import (
    DeploymentRow,
    ReplicaRow,
    RequestRow,
    RevisionRow,
    VersionRow,
)
from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Revision
from penstock_scheduler.domain.project import unknown_project
from penstock_scheduler.domain.replica import ReplicaState
from penstock_scheduler.domain.version import Version, VersionKey
from penstock_scheduler.usecases.ports import DeploymentView, Uses


class SqlDeployments:
    """Implements `DeploymentStore` in an open session."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, name: str, *, lock: bool = False) -> Deployment | None:
        """See `DeploymentStore.get`."""
        query = select(DeploymentRow).where(DeploymentRow.name == name, DeploymentRow.delete_time.is_(None))
        row = await self._session.scalar(query.with_for_update() if lock else query)
        return None if row is None else deployment_from_row(row)

    async def view(self, name: str) -> DeploymentView | None:
        """See `DeploymentStore.view`."""
        deployment = await self.get(name)
        if deployment is None:
            return None
        ready = await self._ready([deployment.uid])
        return DeploymentView(deployment, ready[deployment.uid])

    async def views(self, after: str, limit: int, uses: Uses | None) -> Sequence[DeploymentView]:
        """See `DeploymentStore.views`."""
        query = (
            select(DeploymentRow)
            .where(DeploymentRow.delete_time.is_(None), DeploymentRow.name > after)
            .order_by(DeploymentRow.name)
            .limit(limit)
        )
        if uses is not None:
            query = query.where(_uses(uses))
        deployments = [deployment_from_row(row) for row in await self._session.scalars(query)]
        ready = await self._ready([d.uid for d in deployments])
        return [DeploymentView(d, ready[d.uid]) for d in deployments]

    async def add(self, deployment: Deployment) -> Deployment:
        """See `DeploymentStore.add`."""
        statement = insert(DeploymentRow).values(**deployment_values(deployment)).returning(DeploymentRow)
        try:
            row = (await self._session.scalars(statement)).one()
        except IntegrityError as error:
            if violated_constraint(error) == "uq_deployments_name":
                raise AlreadyExists(
                    f"Deployment {deployment.name} exists already; choose another name, or update it.",
                    metadata={"deployment": deployment.name},
                ) from error
            if violated_constraint(error) == "fk_deployments_project":
                raise unknown_project(deployment.project) from error
            raise
        return deployment_from_row(row)

    async def replace(self, deployment: Deployment) -> None:
        """See `DeploymentStore.replace`."""
        await self._session.execute(
            update(DeploymentRow)
            .where(DeploymentRow.uid == deployment.uid)
            .values(**deployment_values(deployment))
        )

    async def add_revision(self, deployment: Deployment, cause: str) -> None:
        """See `DeploymentStore.add_revision`."""
        await self._session.execute(
            insert(RevisionRow).values(
                deployment_uid=deployment.uid,
                number=deployment.revision,
                spec=spec_to_json(deployment.asked),
                time=deployment.update_time,
                actor=deployment.updated_by,
                cause=cause,
            )
        )

    async def revision(self, deployment: Deployment, number: int) -> Revision | None:
        """See `DeploymentStore.revision`."""
        row = await self._session.get(RevisionRow, (deployment.uid, number))
        return None if row is None else revision_from_row(row, deployment.name)

    async def revisions(self, deployment: Deployment, before: int, limit: int) -> Sequence[Revision]:
        """See `DeploymentStore.revisions`."""
        query = (
            select(RevisionRow)
            .where(RevisionRow.deployment_uid == deployment.uid)
            .order_by(RevisionRow.number.desc())
            .limit(limit)
        )
        if before:
            query = query.where(RevisionRow.number < before)
        return [revision_from_row(row, deployment.name) for row in await self._session.scalars(query)]

    async def claim_request(self, request_id: str, fingerprint: str) -> Deployment | None:
        """See `DeploymentStore.claim_request`."""
        await self._session.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:id, 0))"),
            {"id": f"scheduler/{request_id}"},
        )
        request = await self._session.get(RequestRow, request_id)
        if request is None:
            return None
        if request.fingerprint != fingerprint:
            raise FailedPrecondition(
                f"The request_id {request_id} was used before for something else; use a new one.",
                reason=Reason.REQUEST_ID_REUSED,
                metadata={"request_id": request_id},
            )
        row = await self._session.get_one(DeploymentRow, request.deployment_uid)
        return deployment_from_row(row)

    async def keep_request(self, request_id: str, fingerprint: str, deployment: Deployment) -> None:
        """See `DeploymentStore.keep_request`."""
        await self._session.execute(
            insert(RequestRow).values(
                request_id=request_id,
                fingerprint=fingerprint,
                deployment_uid=deployment.uid,
                time=datetime.now(UTC),
            )
        )

    async def keep_versions(self, versions: Collection[Version]) -> None:
        """See `DeploymentStore.keep_versions`."""
        if versions:
            # In one order, so that two callers never wait for each other.
            values = [
                {"model": v.key.model, "number": v.key.number, "document": v.document}
                for v in sorted(versions, key=lambda v: v.key)
            ]
            given = upsert(VersionRow).values(values)
            await self._session.execute(
                given.on_conflict_do_update(
                    index_elements=[VersionRow.model, VersionRow.number],
                    set_={"document": given.excluded.document, "revision": VersionRow.revision + 1},
                    where=VersionRow.document != given.excluded.document,
                )
            )

    async def _ready(self, uids: Iterable[int]) -> Mapping[int, Mapping[VersionKey, int]]:
        query = (
            select(ReplicaRow.deployment_uid, ReplicaRow.model, ReplicaRow.version, func.count())
            .where(ReplicaRow.deployment_uid.in_(list(uids)), ReplicaRow.state == ReplicaState.READY.name)
            .group_by(ReplicaRow.deployment_uid, ReplicaRow.model, ReplicaRow.version)
        )
        ready: dict[int, dict[VersionKey, int]] = defaultdict(dict)
        for uid, model, version, count in await self._session.execute(query):
            ready[uid][VersionKey(model, version)] = count
        return ready


def _uses(uses: Uses) -> ColumnElement[bool]:
    target: dict[str, Any] = {"model": uses.model}
    if uses.alias:
        target["alias"] = uses.alias
    if uses.version:
        target["resolved_version"] = uses.version
    wanted = {"targets": [target]}
    asked, served = DeploymentRow.asked.contains(wanted), DeploymentRow.serving.contains(wanted)
    # One that is being deleted asks for nothing any more; its replicas have loaded what they need.
    return and_(DeploymentRow.state != DeploymentState.DELETING.name, or_(asked, served))
