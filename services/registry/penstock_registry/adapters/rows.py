"""Tables of the schema `registry`. Rows never leave `adapters`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from penstock_kit.db import service_metadata

Key = Annotated[int, mapped_column(BigInteger, Identity(always=True), primary_key=True)]
Moment = Annotated[datetime, mapped_column(DateTime(timezone=True), server_default=func.clock_timestamp())]
Json = Annotated[dict[str, Any], mapped_column(JSONB)]
Words = Annotated[str, mapped_column(Text)]


class Base(DeclarativeBase):
    """Of all tables of the registry."""

    metadata = service_metadata("registry")


class ModelRow(Base):
    """A model; the partial unique index frees its name when it is deleted."""

    __tablename__ = "models"
    __table_args__ = (
        Index("uq_models_model", "model", unique=True, postgresql_where=text("delete_time IS NULL")),
        Index("ix_models_labels", "labels", postgresql_using="gin"),
        CheckConstraint("latest_version >= 0", name="latest_version"),
    )

    uid: Mapped[Key]
    model: Mapped[Words]
    description: Mapped[Words]
    labels: Mapped[Json]
    latest_version: Mapped[int] = mapped_column(Integer)
    revision: Mapped[int] = mapped_column(BigInteger)
    create_time: Mapped[Moment]
    update_time: Mapped[Moment]
    delete_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class VersionRow(Base):
    """A version; `manifest` is without its metrics, which have their own column."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("model_uid", "number"),
        Index("ix_versions_labels", "labels", postgresql_using="gin"),
        CheckConstraint("number >= 1", name="number"),
        CheckConstraint("(state IN ('READY', 'ARCHIVED')) <= (digest <> '')", name="digest"),
        CheckConstraint("state IN ('UPLOADING', 'READY', 'ARCHIVED', 'DELETED', 'FAILED')", name="state"),
    )

    uid: Mapped[Key]
    model_uid: Mapped[int] = mapped_column(ForeignKey("registry.models.uid"))
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[Words]
    manifest: Mapped[Json]
    metrics: Mapped[Json]
    labels: Mapped[Json]
    runtime: Mapped[Words]
    format: Mapped[Words]
    digest: Mapped[Words]
    created_by: Mapped[Words]
    failure: Mapped[Words]
    failure_reason: Mapped[int] = mapped_column(Integer)
    profiles: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    revision: Mapped[int] = mapped_column(BigInteger)
    create_time: Mapped[Moment]
    update_time: Mapped[Moment]


class FileRow(Base):
    """A file of a bundle, as announced."""

    __tablename__ = "bundle_files"
    __table_args__ = (Index("ix_bundle_files_sha256", "sha256"),)

    version_uid: Mapped[int] = mapped_column(ForeignKey("registry.versions.uid"), primary_key=True)
    path: Mapped[str] = mapped_column(Text, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[Words]


class ArtifactRow(Base):
    """A name of artifacts; it stays when all are deleted, so that no number is given twice."""

    __tablename__ = "artifacts"
    __table_args__ = (
        UniqueConstraint("artifact"),
        CheckConstraint("latest_version >= 1", name="latest_version"),
        CheckConstraint("kind IN ('DATASET', 'CODE', 'CHECKPOINT', 'PREDICTIONS')", name="kind"),
    )

    uid: Mapped[Key]
    artifact: Mapped[Words]
    kind: Mapped[Words]
    latest_version: Mapped[int] = mapped_column(Integer)
    create_time: Mapped[Moment]


class ArtifactVersionRow(Base):
    """A version of a named set of files that is no model."""

    __tablename__ = "artifact_versions"
    __table_args__ = (
        UniqueConstraint("artifact_uid", "number"),
        Index("ix_artifact_versions_job", "job", postgresql_where=text("job <> ''")),
        CheckConstraint("number >= 1", name="number"),
        CheckConstraint("(state = 'READY') <= (digest <> '')", name="digest"),
        CheckConstraint("state IN ('UPLOADING', 'READY', 'DELETED')", name="state"),
    )

    uid: Mapped[Key]
    artifact_uid: Mapped[int] = mapped_column(ForeignKey("registry.artifacts.uid"))
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[Words]
    format: Mapped[Words]
    description: Mapped[Json]
    labels: Mapped[Json]
    job: Mapped[Words]
    digest: Mapped[Words]
    created_by: Mapped[Words]
    create_time: Mapped[Moment]


class ArtifactFileRow(Base):
    """A file of an artifact, as announced."""

    __tablename__ = "artifact_files"
    __table_args__ = (Index("ix_artifact_files_sha256", "sha256"),)

    version_uid: Mapped[int] = mapped_column(ForeignKey("registry.artifact_versions.uid"), primary_key=True)
    path: Mapped[str] = mapped_column(Text, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[Words]


class BlobRow(Base):
    """Contents that are in the artifact store and were right when they came."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(Text, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    create_time: Mapped[Moment]


class ParentRow(Base):
    """One arrow of the lineage, from a version to what it was made from."""

    __tablename__ = "version_parents"
    __table_args__ = (
        Index("ix_version_parents_parent_uid", "parent_uid"),
        CheckConstraint("parent_uid < version_uid", name="older"),
    )

    version_uid: Mapped[int] = mapped_column(ForeignKey("registry.versions.uid"), primary_key=True)
    parent_uid: Mapped[int] = mapped_column(ForeignKey("registry.versions.uid"), primary_key=True)


class AliasRow(Base):
    """Where an alias points now."""

    __tablename__ = "aliases"
    __table_args__ = (
        ForeignKeyConstraint(
            ["model_uid", "number"], ["registry.versions.model_uid", "registry.versions.number"]
        ),
        Index("ix_aliases_model_uid_number", "model_uid", "number"),
    )

    model_uid: Mapped[int] = mapped_column(ForeignKey("registry.models.uid"), primary_key=True)
    alias: Mapped[str] = mapped_column(Text, primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    updated_by: Mapped[Words]
    update_time: Mapped[Moment]


class AliasMoveRow(Base):
    """Where an alias pointed once; never changed, never removed."""

    __tablename__ = "alias_moves"
    __table_args__ = (Index("ix_alias_moves_model_uid_time_uid", "model_uid", "time", "uid"),)

    uid: Mapped[Key]
    model_uid: Mapped[int] = mapped_column(ForeignKey("registry.models.uid"))
    alias: Mapped[Words]
    from_version: Mapped[int] = mapped_column(Integer)
    to_version: Mapped[int] = mapped_column(Integer)
    actor: Mapped[Words]
    comment: Mapped[Words]
    time: Mapped[Moment]


class RequestRow(Base):
    """A key that a caller used; `made_uid` is what it made, empty only within its transaction."""

    __tablename__ = "requests"

    actor: Mapped[str] = mapped_column(Text, primary_key=True)
    request_id: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[Words]
    made_uid: Mapped[int | None] = mapped_column(BigInteger)
    create_time: Mapped[Moment]
