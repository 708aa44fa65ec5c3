"""Versions, their files and their lineage in Postgres."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, Row, Select, and_, func, insert, literal, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.errors import NotFound, Reason
from penstock_kit.names import version_name
from penstock_registry.adapters.lists import paged, sort_key, version_condition
from penstock_registry.adapters.repositories import hold_blobs
from penstock_registry.adapters.rows import AliasRow, BlobRow, FileRow, ModelRow, ParentRow, VersionRow
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.manifest import Manifest
from penstock_registry.domain.model import Model
from penstock_registry.domain.profile import DeviceProfile
from penstock_registry.domain.query import Cursor, Query
from penstock_registry.domain.version import Failure, Version, VersionState

R = TypeVar("R", bound=Row[*tuple[Any, ...]])

# About 15 MiB of a message that may have 64.
MAX_FILES_OF_A_PAGE = 100_000


class VersionRepository:
    """See `usecases.ports.Versions`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, model: str, number: int, *, lock: bool = False) -> Version:
        """Return a version that is not DELETED."""
        statement = _versions().where(
            ModelRow.model == model,
            ModelRow.delete_time.is_(None),
            VersionRow.number == number,
            VersionRow.state != VersionState.DELETED,
        )
        if lock:
            statement = statement.with_for_update(of=VersionRow).execution_options(populate_existing=True)
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            await self._explain_absence(model, number)
            raise AssertionError("unreachable")
        return (await self._whole([row]))[0]

    async def get_by_uid(self, uid: int) -> Version:
        """Return a version in whatever state."""
        row = (await self._session.execute(_versions().where(VersionRow.uid == uid))).one_or_none()
        if row is None:
            raise NotFound("The version is gone.", reason=Reason.VERSION_NOT_FOUND)
        return (await self._whole([row]))[0]

    async def add(self, model: Model, version: Version, parents: tuple[int, ...]) -> int:
        """Store a new version, its files and its parents; return its uid."""
        manifest = version.manifest.to_dict()
        metrics = manifest.pop("metrics")
        uid = (
            await self._session.execute(
                insert(VersionRow)
                .values(
                    model_uid=model.uid,
                    number=version.number,
                    state=version.state,
                    manifest=manifest,
                    metrics=metrics,
                    labels=dict(version.labels),
                    runtime=version.manifest.runtime,
                    format=version.manifest.format,
                    digest="",
                    created_by=version.created_by,
                    failure="",
                    failure_reason=0,
                    revision=1,
                )
                .returning(VersionRow.uid)
            )
        ).scalar_one()
        await self._session.execute(
            insert(FileRow),
            [
                {"version_uid": uid, "path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256}
                for f in version.files
            ],
        )
        await hold_blobs(self._session, (file.sha256 for file in version.files))
        if parents:
            await self._session.execute(
                insert(ParentRow), [{"version_uid": uid, "parent_uid": parent} for parent in parents]
            )
        return uid

    async def save(self, version: Version) -> Version:
        """Store state, digest, failure, labels, metrics and profiles; count the change."""
        changed = (
            await self._session.execute(
                update(VersionRow)
                .where(VersionRow.uid == version.uid)
                .values(
                    state=version.state,
                    digest=version.digest,
                    labels=dict(version.labels),
                    metrics=dict(version.manifest.metrics),
                    profiles=[profile.to_dict() for profile in version.profiles],
                    failure=version.failure.message if version.failure else "",
                    failure_reason=int(version.failure.reason) if version.failure else 0,
                    revision=VersionRow.revision + 1,
                    update_time=func.clock_timestamp(),
                )
                .returning(VersionRow.revision, VersionRow.update_time, VersionRow.model_uid)
            )
        ).one()
        await self._session.execute(
            update(ModelRow)
            .where(ModelRow.uid == changed.model_uid)
            .values(update_time=func.clock_timestamp())
        )
        return replace(version, revision=changed.revision, update_time=changed.update_time)

    async def newest_ready(self, model: str) -> Version | None:
        """Return the READY version with the highest number."""
        statement = (
            _versions()
            .where(
                ModelRow.model == model,
                ModelRow.delete_time.is_(None),
                VersionRow.state == VersionState.READY,
            )
            .order_by(VersionRow.number.desc())
            .limit(1)
        )
        row = (await self._session.execute(statement)).one_or_none()
        return (await self._whole([row]))[0] if row is not None else None

    async def page(self, model: str | None, query: Query) -> tuple[list[Version], Cursor | None]:
        """Return a page of versions."""
        key = _version_sort_key(query)
        statement = _versions().add_columns(key.label("sort_key")).where(ModelRow.delete_time.is_(None))
        if model is not None:
            statement = statement.where(ModelRow.model == model)
        if not any(term.field == "state" for term in query.terms):
            statement = statement.where(VersionRow.state != VersionState.DELETED)
        statement = statement.where(*(version_condition(term) for term in query.terms))
        rows = (await self._session.execute(paged(statement, query, key, VersionRow.uid.expression))).all()
        shown = await self._within_limits(rows[: query.page_size])
        versions = await self._whole(shown)
        if len(shown) == len(rows):
            return versions, None
        last = shown[-1]
        return versions, Cursor(last.sort_key, last[0].uid)

    async def uids(self, names: tuple[tuple[str, int], ...]) -> dict[tuple[str, int], int]:
        """Return the uids of versions that exist."""
        rows = await self._session.execute(
            select(ModelRow.model, VersionRow.number, VersionRow.uid)
            .join(ModelRow, ModelRow.uid == VersionRow.model_uid)
            .where(
                tuple_(ModelRow.model, VersionRow.number).in_(names),
                ModelRow.delete_time.is_(None),
                VersionRow.state != VersionState.DELETED,
            )
        )
        return {(row.model, row.number): row.uid for row in rows}

    async def ancestors(self, uid: int, limit: int) -> list[Version]:
        """Return what the version was made from, nearest first."""
        return await self._related(
            uid, limit, here=ParentRow.version_uid.expression, there=ParentRow.parent_uid.expression
        )

    async def descendants(self, uid: int, limit: int) -> list[Version]:
        """Return what was made from the version, nearest first."""
        return await self._related(
            uid, limit, here=ParentRow.parent_uid.expression, there=ParentRow.version_uid.expression
        )

    async def _related(
        self, uid: int, limit: int, *, here: ColumnElement[int], there: ColumnElement[int]
    ) -> list[Version]:
        """Walk the lineage from `uid` along here → there. It has no cycles: a parent is always older."""
        walk = select(there.label("uid"), literal(1).label("distance")).where(here == uid).cte(recursive=True)
        # UNION drops a pair (version, distance) that was reached before on another way.
        walk = walk.union(select(there, walk.c.distance + 1).where(here == walk.c.uid))
        nearest = (
            select(walk.c.uid, func.min(walk.c.distance).label("distance")).group_by(walk.c.uid).subquery()
        )
        statement = (
            _versions()
            .join(nearest, nearest.c.uid == VersionRow.uid)
            .order_by(nearest.c.distance, VersionRow.uid.desc())
            .limit(limit)
        )
        return await self._whole((await self._session.execute(statement)).all())

    async def _within_limits(self, rows: Sequence[R]) -> Sequence[R]:
        """Return as many of the rows, but at least one, as have few enough files for one message."""
        counts = await self._session.execute(
            select(FileRow.version_uid, func.count().label("files"))
            .where(FileRow.version_uid.in_([row[0].uid for row in rows]))
            .group_by(FileRow.version_uid)
        )
        files = {row.version_uid: row.files for row in counts}
        total = 0
        for index, row in enumerate(rows):
            total += files[row[0].uid]
            if total > MAX_FILES_OF_A_PAGE and index:
                return rows[:index]
        return rows

    async def _whole(self, rows: Sequence[Row[*tuple[Any, ...]]]) -> list[Version]:
        """Return the versions of rows (VersionRow, model …) with files and aliases, in two queries."""
        if not rows:
            return []
        files: dict[int, list[BundleFile]] = {row[0].uid: [] for row in rows}
        found = await self._session.execute(
            select(
                FileRow.version_uid,
                FileRow.path,
                FileRow.size_bytes,
                FileRow.sha256,
                BlobRow.sha256.label("blob"),
            )
            .outerjoin(
                BlobRow, and_(BlobRow.sha256 == FileRow.sha256, BlobRow.size_bytes == FileRow.size_bytes)
            )
            .where(FileRow.version_uid.in_(files))
        )
        stored_states = {VersionState.READY, VersionState.ARCHIVED}
        stored = {row[0].uid for row in rows if row[0].state in stored_states}
        for file in found:
            complete = file.blob is not None or file.size_bytes == 0 or file.version_uid in stored
            files[file.version_uid].append(
                BundleFile(file.path, file.size_bytes, file.sha256, file.size_bytes if complete else 0)
            )
        aliases: dict[tuple[int, int], list[str]] = {}
        pointing = await self._session.execute(
            select(AliasRow.model_uid, AliasRow.number, AliasRow.alias)
            .where(
                tuple_(AliasRow.model_uid, AliasRow.number).in_({(r[0].model_uid, r[0].number) for r in rows})
            )
            .order_by(AliasRow.alias)
        )
        for alias in pointing:
            aliases.setdefault((alias.model_uid, alias.number), []).append(alias.alias)
        return [
            _to_version(row[0], row[1], files[row[0].uid], aliases.get((row[0].model_uid, row[0].number), ()))
            for row in rows
        ]

    async def _explain_absence(self, model: str, number: int) -> None:
        """Say whether the model or the version is missing."""
        exists = await self._session.scalar(
            select(ModelRow.uid).where(ModelRow.model == model, ModelRow.delete_time.is_(None))
        )
        if exists is None:
            raise NotFound(
                f"No model {model!r}; list models with `penstock models list`. Names are case-sensitive.",
                reason=Reason.MODEL_NOT_FOUND,
                metadata={"model": model},
            )
        raise NotFound(
            f"No {version_name(model, number)}; list versions with `penstock versions list {model}`.",
            reason=Reason.VERSION_NOT_FOUND,
            metadata={"model": model, "version": str(number)},
        )


def _versions() -> Select[VersionRow, str]:
    return select(VersionRow, ModelRow.model).join(ModelRow, ModelRow.uid == VersionRow.model_uid)


def _version_sort_key(query: Query) -> ColumnElement[Any]:
    if query.order.field == "create_time":
        return cast("ColumnElement[Any]", VersionRow.create_time.expression)
    return sort_key(query.order)


def _to_version(row: VersionRow, model: str, files: Iterable[BundleFile], aliases: Iterable[str]) -> Version:
    failure = Failure(Reason(row.failure_reason), row.failure) if row.failure else None
    return Version(
        model=model,
        number=row.number,
        manifest=Manifest.from_dict({**row.manifest, "metrics": row.metrics}),
        files=tuple(sorted(files, key=lambda file: file.path.encode())),
        state=VersionState(row.state),
        digest=row.digest,
        labels=dict(row.labels),
        created_by=row.created_by,
        create_time=row.create_time,
        update_time=row.update_time,
        failure=failure,
        aliases=tuple(aliases),
        profiles=tuple(DeviceProfile.from_dict(profile) for profile in row.profiles),
        uid=row.uid,
        revision=row.revision,
    )
