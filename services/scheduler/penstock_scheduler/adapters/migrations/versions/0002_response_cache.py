"""How gateways treat equal requests to a deployment; null where nobody ever set it.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

SCHEMA = "scheduler"


def upgrade() -> None:
    """Add a column that an earlier release neither reads nor writes."""
    op.add_column("deployments", sa.Column("cache", JSONB), schema=SCHEMA)


def downgrade() -> None:
    """Forget the settings."""
    op.drop_column("deployments", "cache", schema=SCHEMA)
