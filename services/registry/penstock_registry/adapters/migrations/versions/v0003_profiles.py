"""Profiles of versions: what they need and do on each kind of device.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column with a default, so that an older release can go on adding versions."""
    op.add_column(
        "versions",
        sa.Column("profiles", JSONB, server_default=sa.text("'[]'::jsonb"), nullable=False),
        schema="registry",
    )
