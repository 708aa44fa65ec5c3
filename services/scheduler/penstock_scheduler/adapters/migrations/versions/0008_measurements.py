"""Copies of versions can be renewed: what is measured of them changes.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision: str | None = "0007"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Count how often a copy was renewed, so that whoever remembers one sees that it is old."""
    op.add_column(
        "versions",
        sa.Column("revision", sa.Integer, nullable=False, server_default=sa.text("0")),
        schema="scheduler",
    )
