"""Artifacts and their files in Postgres."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Row, Select, and_, func, insert, select, true, update
from sqlalchemy.dialects.postgresql import insert as insert_or
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.errors import FailedPrecondition, NotFound, Reason
from penstock_kit.names import artifact_name
from penstock_registry.adapters.lists import paged
from penstock_registry.adapters.repositories import hold_blobs
from penstock_registry.adapters.rows import ArtifactFileRow, ArtifactRow, ArtifactVersionRow, BlobRow
from penstock_registry.domain.artifact import Artifact, ArtifactKind, ArtifactState
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.query import Cursor, Query

# About 15 MiB of a message that may have 64.
MAX_FILES_OF_A_PAGE = 100_000


class ArtifactRepository:
    """See `usecases.ports.Artifacts`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def add(self, artifact: Artifact) -> int:
        """Store a new artifact under the next number of its name; return its uid."""
        row = await self._next_number(artifact)
        uid: int = (
            await self._session.execute(
                insert(ArtifactVersionRow)
                .values(
                    artifact_uid=row.uid,
                    number=row.latest_version,
                    state=artifact.state,
                    format=artifact.format,
                    description=dict(artifact.description),
                    labels=dict(artifact.labels),
                    job=artifact.job,
                    digest="",
                    created_by=artifact.created_by,
                )
                .returning(ArtifactVersionRow.uid)
            )
        ).scalar_one()
        await self._session.execute(
            insert(ArtifactFileRow),
            [
                {"version_uid": uid, "path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256}
                for f in artifact.files
            ],
        )
        await hold_blobs(self._session, (file.sha256 for file in artifact.files))
        return uid

    async def get(
        self, artifact: str, number: int, *, lock: bool = False, path: str | None = None
    ) -> Artifact:
        """Return an artifact that is not DELETED."""
        statement = _artifacts().where(
            ArtifactRow.artifact == artifact,
            ArtifactVersionRow.number == number,
            ArtifactVersionRow.state != ArtifactState.DELETED,
        )
        if lock:
            statement = statement.with_for_update(of=ArtifactVersionRow).execution_options(
                populate_existing=True
            )
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            raise _not_found(artifact_name(artifact, number), artifact_name(artifact, number))
        return (await self._whole([row], path))[0]

    async def get_by_uid(self, uid: int) -> Artifact:
        """Return an artifact in whatever state."""
        row = (await self._session.execute(_artifacts().where(ArtifactVersionRow.uid == uid))).one_or_none()
        if row is None:
            raise NotFound("The artifact is gone.", reason=Reason.RESOURCE_NOT_FOUND)
        return (await self._whole([row]))[0]

    async def newest_ready(self, artifact: str) -> Artifact:
        """Return the READY one with the highest number."""
        statement = (
            _artifacts()
            .where(ArtifactRow.artifact == artifact, ArtifactVersionRow.state == ArtifactState.READY)
            .order_by(ArtifactVersionRow.number.desc())
            .limit(1)
        )
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            raise _not_found(f"READY version of artifacts/{artifact}", f"artifacts/{artifact}")
        return (await self._whole([row]))[0]

    async def save(self, artifact: Artifact) -> None:
        """Store state and digest."""
        await self._session.execute(
            update(ArtifactVersionRow)
            .where(ArtifactVersionRow.uid == artifact.uid)
            .values(state=artifact.state, digest=artifact.digest)
        )

    async def page(
        self, artifact: str | None, kind: ArtifactKind | None, query: Query
    ) -> tuple[list[Artifact], Cursor | None]:
        """Return a page of artifacts."""
        statement = _artifacts().where(ArtifactVersionRow.state != ArtifactState.DELETED)
        if artifact is not None:
            statement = statement.where(ArtifactRow.artifact == artifact)
        else:
            newest = (
                select(func.max(ArtifactVersionRow.uid))
                .where(ArtifactVersionRow.state != ArtifactState.DELETED)
                .group_by(ArtifactVersionRow.artifact_uid)
            )
            statement = statement.where(ArtifactVersionRow.uid.in_(newest))
        if kind is not None:
            statement = statement.where(ArtifactRow.kind == kind)
        elif artifact is None:
            statement = statement.where(ArtifactRow.kind != ArtifactKind.CHECKPOINT)
        key = ArtifactVersionRow.create_time.expression
        rows = (
            await self._session.execute(paged(statement, query, key, ArtifactVersionRow.uid.expression))
        ).all()
        shown = await self._within_limits(rows[: query.page_size])
        found = await self._whole(shown)
        if len(shown) == len(rows):
            return found, None
        last = shown[-1][0]
        return found, Cursor(last.create_time, last.uid)

    async def _next_number(self, artifact: Artifact) -> ArtifactRow:
        """Count up the name's number, making the name if it is new, and keep it locked."""
        row = (
            await self._session.scalars(
                insert_or(ArtifactRow)
                .values(artifact=artifact.artifact, kind=artifact.kind, latest_version=1)
                .on_conflict_do_update(
                    index_elements=[ArtifactRow.artifact],
                    set_={"latest_version": ArtifactRow.latest_version + 1},
                )
                .returning(ArtifactRow),
                execution_options={"populate_existing": True},
            )
        ).one()
        if row.kind != artifact.kind:
            used = await self._session.scalar(
                select(func.count())
                .select_from(ArtifactVersionRow)
                .where(
                    ArtifactVersionRow.artifact_uid == row.uid,
                    ArtifactVersionRow.state != ArtifactState.DELETED,
                )
            )
            if used:
                raise FailedPrecondition(
                    f"artifacts/{artifact.artifact} is a {row.kind}; choose another "
                    f"name for a {artifact.kind}.",
                    reason=Reason.CONFLICT,
                    metadata={"artifact": artifact.artifact, "kind": row.kind},
                )
            await self._session.execute(
                update(ArtifactRow).where(ArtifactRow.uid == row.uid).values(kind=artifact.kind)
            )
        return row

    async def _within_limits(
        self, rows: Sequence[Row[ArtifactVersionRow, str, str]]
    ) -> Sequence[Row[ArtifactVersionRow, str, str]]:
        """Return as many of the rows, but at least one, as have few enough files for one message."""
        counts = await self._session.execute(
            select(ArtifactFileRow.version_uid, func.count().label("files"))
            .where(ArtifactFileRow.version_uid.in_([row[0].uid for row in rows]))
            .group_by(ArtifactFileRow.version_uid)
        )
        files = {row.version_uid: row.files for row in counts}
        total = 0
        for index, row in enumerate(rows):
            total += files[row[0].uid]
            if total > MAX_FILES_OF_A_PAGE and index:
                return rows[:index]
        return rows

    async def _whole(
        self, rows: Sequence[Row[ArtifactVersionRow, str, str]], path: str | None = None
    ) -> list[Artifact]:
        """Return the artifacts of rows with their files, or with one file."""
        if not rows:
            return []
        files: dict[int, list[BundleFile]] = {row[0].uid: [] for row in rows}
        ready = {row[0].uid for row in rows if row[0].state == ArtifactState.READY}
        found = await self._session.execute(
            select(
                ArtifactFileRow.version_uid,
                ArtifactFileRow.path,
                ArtifactFileRow.size_bytes,
                ArtifactFileRow.sha256,
                BlobRow.sha256.label("blob"),
            )
            .outerjoin(
                BlobRow,
                and_(
                    BlobRow.sha256 == ArtifactFileRow.sha256,
                    BlobRow.size_bytes == ArtifactFileRow.size_bytes,
                ),
            )
            .where(
                ArtifactFileRow.version_uid.in_(files),
                ArtifactFileRow.path == path if path is not None else true(),
            )
        )
        for file in found:
            complete = file.blob is not None or file.size_bytes == 0 or file.version_uid in ready
            files[file.version_uid].append(
                BundleFile(file.path, file.size_bytes, file.sha256, file.size_bytes if complete else 0)
            )
        return [_to_artifact(row, files[row[0].uid]) for row in rows]


def _artifacts() -> Select[ArtifactVersionRow, str, str]:
    return select(ArtifactVersionRow, ArtifactRow.artifact, ArtifactRow.kind).join(
        ArtifactRow, ArtifactRow.uid == ArtifactVersionRow.artifact_uid
    )


def _not_found(what: str, name: str) -> NotFound:
    return NotFound(
        f"No {what}; list datasets with `penstock datasets list`. Names are case-sensitive.",
        reason=Reason.RESOURCE_NOT_FOUND,
        metadata={"artifact": name},
    )


def _to_artifact(row: Row[ArtifactVersionRow, str, str], files: Iterable[BundleFile]) -> Artifact:
    stored, name, kind = row
    description: dict[str, Any] = stored.description
    return Artifact(
        artifact=name,
        number=stored.number,
        kind=ArtifactKind(kind),
        files=tuple(sorted(files, key=lambda file: file.path.encode())),
        state=ArtifactState(stored.state),
        digest=stored.digest,
        format=stored.format,
        description=description,
        labels=dict(stored.labels),
        job=stored.job,
        created_by=stored.created_by,
        create_time=stored.create_time,
        uid=stored.uid,
    )
