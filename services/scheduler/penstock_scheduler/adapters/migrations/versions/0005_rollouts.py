"""Rollouts, their evidence, and what served when.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

SCHEMA = "scheduler"


def upgrade() -> None:
    """Add columns that an earlier release neither reads nor writes, and two tables."""
    op.add_column("deployments", sa.Column("rollout_policy", JSONB), schema=SCHEMA)
    op.add_column("deployments", sa.Column("rollout", JSONB), schema=SCHEMA)
    op.add_column(
        "deployments",
        sa.Column("at_once", sa.Boolean, nullable=False, server_default=sa.text("false")),
        schema=SCHEMA,
    )
    op.create_table(
        "rollouts",
        sa.Column("deployment_uid", sa.BigInteger, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("document", JSONB, nullable=False),
        sa.PrimaryKeyConstraint("deployment_uid", "number", name="pk_rollouts"),
        sa.ForeignKeyConstraint(
            ["deployment_uid"], ["scheduler.deployments.uid"], name="fk_rollouts_deployment_uid"
        ),
        schema=SCHEMA,
    )
    op.create_table(
        "served",
        sa.Column("deployment_uid", sa.BigInteger, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("targets", JSONB, nullable=False),
        sa.PrimaryKeyConstraint("deployment_uid", "time", name="pk_served"),
        sa.ForeignKeyConstraint(
            ["deployment_uid"], ["scheduler.deployments.uid"], name="fk_served_deployment_uid"
        ),
        schema=SCHEMA,
    )


def downgrade() -> None:
    """Forget the rollouts and what served when."""
    for table in ("served", "rollouts"):
        op.drop_table(table, schema=SCHEMA)
    for column in ("at_once", "rollout", "rollout_policy"):
        op.drop_column("deployments", column, schema=SCHEMA)
