"""Jobs remember the nodes that have their newest checkpoint.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision: str | None = "0009"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the nodes, also to jobs that wait or run already; an earlier release places jobs anywhere."""
    op.add_column(
        "jobs",
        sa.Column("homes", JSONB, nullable=False, server_default=sa.text("'[]'")),
        schema="scheduler",
    )
    op.execute(
        "UPDATE scheduler.jobs SET gang = jsonb_set(gang, '{keeps}', 'true')"
        " WHERE kind IN ('train', 'compress', 'batch_predict')"
    )
