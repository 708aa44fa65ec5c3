"""Rollouts, and what served when, in Postgres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Integer, func, select, update
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.errors import Aborted, Reason
from penstock_scheduler.adapters.mapping import deployment_values
from penstock_scheduler.adapters.rollout_mapping import (
    rollout_from_json,
    rollout_to_json,
    targets_from_json,
    targets_to_json,
)
from penstock_scheduler.adapters.rows import DeploymentRow, RolloutRow, ServedRow
from penstock_scheduler.domain.deployment import Deployment, Target
from penstock_scheduler.domain.rollout import Rollout

_DECIDED = (
    "asked",
    "serving",
    "rollout",
    "at_once",
    "state",
    "message",
    "revision",
    "updated_by",
    "update_time",
)


def same_hands(deployment: Deployment) -> ColumnElement[bool]:
    """Whether nobody took a hand in the rollout of a deployment since it was read."""
    stored = func.coalesce(DeploymentRow.rollout["hands"].astext.cast(Integer), -1)
    return stored == (-1 if deployment.rollout is None else deployment.rollout.hands)


class SqlRollouts:
    """Implements `RolloutStore` in an open session."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def keep(self, deployment: Deployment, rollout: Rollout) -> None:
        """See `RolloutStore.keep`."""
        values = {"document": rollout_to_json(rollout)}
        statement = upsert(RolloutRow).values(deployment_uid=deployment.uid, number=rollout.number, **values)
        await self._session.execute(
            statement.on_conflict_do_update(index_elements=["deployment_uid", "number"], set_=values)
        )

    async def decided(self, before: Deployment, after: Deployment) -> None:
        """See `RolloutStore.decided`."""
        values = deployment_values(after)
        done = await self._session.execute(
            update(DeploymentRow)
            .where(
                DeploymentRow.uid == before.uid,
                DeploymentRow.revision == before.revision,
                DeploymentRow.state == before.state.name,
                same_hands(before),
            )
            .values({key: values[key] for key in _DECIDED})
            .returning(DeploymentRow.uid)
        )
        if done.first() is None:
            raise Aborted(f"Deployment {before.name} changed meanwhile.", reason=Reason.CONFLICT)

    async def get(self, deployment: Deployment, number: int) -> Rollout | None:
        """See `RolloutStore.get`."""
        row = await self._session.get(RolloutRow, (deployment.uid, number))
        return None if row is None else rollout_from_json(row.document)

    async def page(self, deployment: Deployment, before: int, limit: int) -> Sequence[Rollout]:
        """See `RolloutStore.page`."""
        query = (
            select(RolloutRow.document)
            .where(RolloutRow.deployment_uid == deployment.uid)
            .order_by(RolloutRow.number.desc())
            .limit(limit)
        )
        if before:
            query = query.where(RolloutRow.number < before)
        return [rollout_from_json(document) for document in await self._session.scalars(query)]

    async def serves(self, uid: int, targets: tuple[Target, ...], now: datetime) -> None:
        """See `RolloutStore.serves`."""
        statement = upsert(ServedRow).values(deployment_uid=uid, time=now, targets=targets_to_json(targets))
        await self._session.execute(
            statement.on_conflict_do_update(
                index_elements=["deployment_uid", "time"], set_={"targets": statement.excluded.targets}
            )
        )

    async def served_last(self) -> Mapping[int, tuple[Target, ...]]:
        """See `RolloutStore.served_last`."""
        query = (
            select(ServedRow.deployment_uid, ServedRow.targets)
            .join(DeploymentRow, DeploymentRow.uid == ServedRow.deployment_uid)
            .where(DeploymentRow.delete_time.is_(None))
            .ext(distinct_on(ServedRow.deployment_uid))
            .order_by(ServedRow.deployment_uid, ServedRow.time.desc())
        )
        return {uid: targets_from_json(targets) for uid, targets in await self._session.execute(query)}

    async def served_at(self, name: str, moment: datetime) -> tuple[tuple[Target, ...], datetime] | None:
        """See `RolloutStore.served_at`."""
        query = (
            select(ServedRow.targets, ServedRow.time)
            .join(DeploymentRow, DeploymentRow.uid == ServedRow.deployment_uid)
            .where(DeploymentRow.name == name, ServedRow.time <= moment)
            .order_by(ServedRow.time.desc())
            .limit(1)
        )
        row = (await self._session.execute(query)).first()
        return None if row is None else (targets_from_json(row.targets), row.time)
