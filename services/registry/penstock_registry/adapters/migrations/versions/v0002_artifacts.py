"""Artifacts: datasets, code, checkpoints, predictions.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

SCHEMA = "registry"


def _moment(name: str) -> sa.Column[object]:
    return sa.Column(
        name, sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp(), nullable=False
    )


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False)


def _key() -> sa.Column[int]:
    return sa.Column("uid", sa.BigInteger, sa.Identity(always=True), nullable=False)


def upgrade() -> None:
    """Make the tables of artifacts; what an older release uses stays as it is."""
    op.create_table(
        "artifacts",
        _key(),
        _text("artifact"),
        _text("kind"),
        sa.Column("latest_version", sa.Integer, nullable=False),
        _moment("create_time"),
        sa.PrimaryKeyConstraint("uid", name="pk_artifacts"),
        sa.UniqueConstraint("artifact", name="uq_artifacts_artifact"),
        sa.CheckConstraint("latest_version >= 1", name="ck_artifacts_latest_version"),
        sa.CheckConstraint(
            "kind IN ('DATASET', 'CODE', 'CHECKPOINT', 'PREDICTIONS')", name="ck_artifacts_kind"
        ),
        schema=SCHEMA,
    )
    op.create_table(
        "artifact_versions",
        _key(),
        sa.Column("artifact_uid", sa.BigInteger, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        _text("state"),
        _text("format"),
        sa.Column("description", JSONB, nullable=False),
        sa.Column("labels", JSONB, nullable=False),
        _text("job"),
        _text("digest"),
        _text("created_by"),
        _moment("create_time"),
        sa.PrimaryKeyConstraint("uid", name="pk_artifact_versions"),
        sa.UniqueConstraint("artifact_uid", "number", name="uq_artifact_versions_artifact_uid_number"),
        sa.ForeignKeyConstraint(
            ["artifact_uid"], [f"{SCHEMA}.artifacts.uid"], name="fk_artifact_versions_artifact_uid"
        ),
        sa.CheckConstraint("number >= 1", name="ck_artifact_versions_number"),
        sa.CheckConstraint("(state = 'READY') <= (digest <> '')", name="ck_artifact_versions_digest"),
        sa.CheckConstraint("state IN ('UPLOADING', 'READY', 'DELETED')", name="ck_artifact_versions_state"),
        schema=SCHEMA,
    )
    op.create_index(
        "ix_artifact_versions_job",
        "artifact_versions",
        ["job"],
        schema=SCHEMA,
        postgresql_where=sa.text("job <> ''"),
    )
    op.create_table(
        "artifact_files",
        sa.Column("version_uid", sa.BigInteger, nullable=False),
        _text("path"),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        _text("sha256"),
        sa.PrimaryKeyConstraint("version_uid", "path", name="pk_artifact_files"),
        sa.ForeignKeyConstraint(
            ["version_uid"], [f"{SCHEMA}.artifact_versions.uid"], name="fk_artifact_files_version_uid"
        ),
        schema=SCHEMA,
    )
    op.create_index("ix_artifact_files_sha256", "artifact_files", ["sha256"], schema=SCHEMA)
