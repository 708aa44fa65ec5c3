"""How many replicas the load asks for.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None

SCHEMA = "scheduler"


def upgrade() -> None:
    """Add columns that an earlier release neither reads nor writes."""
    op.add_column("deployments", sa.Column("autoscaling", JSONB), schema=SCHEMA)
    op.add_column("deployments", sa.Column("scale", JSONB), schema=SCHEMA)


def downgrade() -> None:
    """Forget the settings: numbers of replicas stay as they were asked for."""
    op.drop_column("deployments", "scale", schema=SCHEMA)
    op.drop_column("deployments", "autoscaling", schema=SCHEMA)
