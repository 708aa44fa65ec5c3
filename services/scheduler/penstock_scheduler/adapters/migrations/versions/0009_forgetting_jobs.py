"""Names of deleted jobs are forgotten, too, once nobody can still know their tasks.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision: str | None = "0008"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Say when a job was deleted; an earlier release leaves that to the database."""
    op.add_column(
        "job_names",
        sa.Column(
            "delete_time",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("CURRENT_TIMESTAMP"),
        ),
        schema="scheduler",
    )
