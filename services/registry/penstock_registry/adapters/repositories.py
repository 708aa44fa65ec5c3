"""Models, request keys and the index of blobs in Postgres."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.errors import AlreadyExists, InvalidArgument, NotFound, Reason
from penstock_registry.adapters.lists import model_condition, paged, sort_key
from penstock_registry.adapters.rows import (
    AliasRow,
    ArtifactFileRow,
    ArtifactVersionRow,
    BlobRow,
    FileRow,
    ModelRow,
    RequestRow,
    VersionRow,
)
from penstock_registry.domain.artifact import ArtifactState
from penstock_registry.domain.model import Alias, Model
from penstock_registry.domain.query import Cursor, Query
from penstock_registry.domain.version import VersionState


class ModelRepository:
    """See `usecases.ports.Models`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, model: str, *, lock: bool = False) -> Model:
        """Return a model."""
        statement = select(ModelRow).where(ModelRow.model == model, ModelRow.delete_time.is_(None))
        if lock:
            statement = statement.with_for_update().execution_options(populate_existing=True)
        row = (await self._session.scalars(statement)).one_or_none()
        if row is None:
            raise NotFound(
                f"No model {model!r}; list models with `penstock models list`. Names are case-sensitive.",
                reason=Reason.MODEL_NOT_FOUND,
                metadata={"model": model},
            )
        return (await self._with_aliases([row]))[0]

    async def add(self, model: Model) -> Model:
        """Store a new model."""
        row = await self._insert(model)
        if row is None:
            raise AlreadyExists(
                f"{model.name} exists already; choose another name, or update it.",
                metadata={"model": model.model},
            )
        return _to_model(row, ())

    async def ensure(self, model: str) -> None:
        """Make the model unless it exists."""
        await self._insert(Model(model))

    async def save(self, model: Model) -> Model:
        """Store description, labels and latest_version; count the change."""
        row = (
            await self._session.scalars(
                update(ModelRow)
                .where(ModelRow.uid == model.uid)
                .values(
                    description=model.description,
                    labels=dict(model.labels),
                    latest_version=model.latest_version,
                    revision=ModelRow.revision + 1,
                    update_time=func.clock_timestamp(),
                )
                .returning(ModelRow),
                execution_options={"populate_existing": True},
            )
        ).one()
        return (await self._with_aliases([row]))[0]

    async def delete(self, model: Model) -> None:
        """Hide the model and mark its versions DELETED."""
        now = func.clock_timestamp()
        await self._session.execute(
            update(ModelRow)
            .where(ModelRow.uid == model.uid)
            .values(delete_time=now, update_time=now, revision=ModelRow.revision + 1)
        )
        await self._session.execute(
            update(VersionRow)
            .where(VersionRow.model_uid == model.uid)
            .values(state=VersionState.DELETED, update_time=now, revision=VersionRow.revision + 1)
        )

    async def page(self, query: Query) -> tuple[list[Model], Cursor | None]:
        """Return a page of models."""
        key = _model_sort_key(query)
        statement = select(ModelRow).where(
            ModelRow.delete_time.is_(None), *(model_condition(term) for term in query.terms)
        )
        rows = (await self._session.scalars(paged(statement, query, key, ModelRow.uid.expression))).all()
        models = await self._with_aliases(list(rows[: query.page_size]))
        if len(rows) <= query.page_size:
            return models, None
        last = rows[query.page_size - 1]
        value = last.model if query.order.field == "name" else getattr(last, query.order.field)
        return models, Cursor(value, last.uid)

    async def _insert(self, model: Model) -> ModelRow | None:
        result = await self._session.scalars(
            insert(ModelRow)
            .values(
                model=model.model,
                description=model.description,
                labels=dict(model.labels),
                latest_version=0,
                revision=1,
            )
            .on_conflict_do_nothing(
                index_elements=[ModelRow.model], index_where=ModelRow.delete_time.is_(None)
            )
            .returning(ModelRow.uid)
        )
        uid = result.one_or_none()
        if uid is None:
            return None
        # A deleted model of this name has used numbers, and caches still know by them what it was. Asked by
        # a statement of its own: the insert may have waited for the one who gave out the last of them.
        used = select(func.max(ModelRow.latest_version)).where(ModelRow.model == model.model)
        return (
            await self._session.scalars(
                update(ModelRow)
                .where(ModelRow.uid == uid)
                .values(latest_version=used.scalar_subquery())
                .returning(ModelRow),
                execution_options={"populate_existing": True, "synchronize_session": False},
            )
        ).one()

    async def _with_aliases(self, rows: list[ModelRow]) -> list[Model]:
        """Return the models of rows, with all their aliases in one query."""
        found: dict[int, list[AliasRow]] = {row.uid: [] for row in rows}
        if rows:
            statement = select(AliasRow).where(AliasRow.model_uid.in_(found)).order_by(AliasRow.alias)
            for alias in (await self._session.scalars(statement)).all():
                found[alias.model_uid].append(alias)
        return [_to_model(row, found[row.uid]) for row in rows]


class RequestRepository:
    """See `usecases.ports.Requests`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def claim(self, actor: str, request_id: str, fingerprint: str) -> int | None:
        """Take the key for this transaction."""
        claimed = await self._session.execute(
            insert(RequestRow)
            .values(actor=actor, request_id=request_id, fingerprint=fingerprint)
            .on_conflict_do_nothing(index_elements=[RequestRow.actor, RequestRow.request_id])
            .returning(RequestRow.request_id)
        )
        if claimed.one_or_none() is not None:
            return None
        # The insert waited for the transaction that holds the key; it has ended.
        row = (
            await self._session.execute(
                select(RequestRow.fingerprint, RequestRow.made_uid).where(
                    RequestRow.actor == actor, RequestRow.request_id == request_id
                )
            )
        ).one()
        if row.fingerprint != fingerprint:
            raise InvalidArgument(
                f"request_id {request_id!r} was used before with other contents; use a new one.",
                reason=Reason.REQUEST_ID_REUSED,
                metadata={"request_id": request_id},
            )
        made: int = row.made_uid
        return made

    async def complete(self, actor: str, request_id: str, uid: int) -> None:
        """Remember what the key made."""
        await self._session.execute(
            update(RequestRow)
            .where(RequestRow.actor == actor, RequestRow.request_id == request_id)
            .values(made_uid=uid)
        )


class BlobRepository:
    """See `usecases.ports.BlobIndex`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def add(self, sha256: str, size_bytes: int) -> None:
        """Remember a blob."""
        await self._session.execute(
            insert(BlobRow)
            .values(sha256=sha256, size_bytes=size_bytes)
            .on_conflict_do_nothing(index_elements=[BlobRow.sha256])
        )

    async def remove(self, *sha256s: str) -> None:
        """Forget blobs."""
        await self._session.execute(delete(BlobRow).where(BlobRow.sha256.in_(sha256s)))

    async def lock_unused(self, sha256s: Sequence[str]) -> list[str]:
        """Return blobs that nothing needs."""
        # Whoever announces contents holds the rows of those that are stored (`hold_blobs`): this waits for
        # that, and the statement after it sees what was announced.
        held = await self._session.scalars(
            select(BlobRow.sha256)
            .where(BlobRow.sha256.in_(sha256s))
            .order_by(BlobRow.sha256)
            .with_for_update()
        )
        locked = list(held)
        needed = await self._session.scalars(
            select(FileRow.sha256)
            .join(VersionRow, VersionRow.uid == FileRow.version_uid)
            .where(FileRow.sha256.in_(locked), VersionRow.state != VersionState.DELETED)
            .union(
                select(ArtifactFileRow.sha256)
                .join(ArtifactVersionRow, ArtifactVersionRow.uid == ArtifactFileRow.version_uid)
                .where(ArtifactFileRow.sha256.in_(locked), ArtifactVersionRow.state != ArtifactState.DELETED)
            )
        )
        return sorted(set(locked) - set(needed))


async def hold_blobs(session: AsyncSession, sha256s: Iterable[str]) -> None:
    """Keep those blobs that are stored from being collected until the end of the transaction."""
    await session.execute(
        select(BlobRow.sha256)
        .where(BlobRow.sha256.in_(sorted(set(sha256s))))
        .order_by(BlobRow.sha256)
        .with_for_update(read=True, key_share=True)
    )


def _model_sort_key(query: Query) -> ColumnElement[Any]:
    columns: dict[str, Any] = {"create_time": ModelRow.create_time, "update_time": ModelRow.update_time}
    column = columns.get(query.order.field)
    return sort_key(query.order) if column is None else column.expression


def _to_model(row: ModelRow, aliases: list[AliasRow] | tuple[()]) -> Model:
    return Model(
        model=row.model,
        description=row.description,
        labels=dict(row.labels),
        latest_version=row.latest_version,
        aliases=tuple(
            Alias(row.model, alias.alias, alias.number, alias.update_time, alias.updated_by)
            for alias in aliases
        ),
        create_time=row.create_time,
        update_time=row.update_time,
        uid=row.uid,
        revision=row.revision,
    )
