"""What operators say of nodes, disk, shares of GPUs, and the memory that versions were seen to use.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

SCHEMA = "scheduler"


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False, server_default=sa.text("false"))


def _count(name: str, kind: type[sa.Integer] = sa.BigInteger) -> sa.Column[int]:
    return sa.Column(name, kind, nullable=False, server_default=sa.text("0"))


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, server_default=sa.text("''"))


def upgrade() -> None:
    """Add columns that an earlier release neither reads nor writes, and count disk."""
    op.add_column("nodes", _flag("cordoned"), schema=SCHEMA)
    op.add_column("nodes", _flag("draining"), schema=SCHEMA)
    op.add_column(
        "nodes", sa.Column("taints", JSONB, nullable=False, server_default=sa.text("'[]'")), schema=SCHEMA
    )
    op.add_column("nodes", _text("message"), schema=SCHEMA)
    op.add_column("nodes", _text("instance"), schema=SCHEMA)
    for name in ("disk_bytes", "disk_bytes_free", "disk_bytes_allocated"):
        op.add_column("nodes", _count(name), schema=SCHEMA)
    # A node that does not say what disk it has (an agent of an earlier release) is not bounded by it.
    op.create_check_constraint(
        "ck_nodes_disk_within_node",
        "nodes",
        "disk_bytes_allocated >= 0 AND (disk_bytes = 0 OR disk_bytes_allocated <= disk_bytes)",
        schema=SCHEMA,
    )
    op.add_column("devices", _text("parent_uuid"), schema=SCHEMA)
    op.add_column("replicas", sa.Column("constraints", JSONB), schema=SCHEMA)
    op.add_column("versions", sa.Column("measured_memory_bytes", sa.BigInteger), schema=SCHEMA)
    op.add_column("allocations", _text("digest"), schema=SCHEMA)
    op.add_column("allocations", _count("disk_bytes"), schema=SCHEMA)
    op.add_column("allocations", _count("gpu_memory_millis", sa.Integer), schema=SCHEMA)
    op.create_check_constraint(
        "ck_allocations_disk_and_share",
        "allocations",
        "disk_bytes >= 0 AND gpu_memory_millis BETWEEN 0 AND 1000",
        schema=SCHEMA,
    )
    op.create_table(
        "bundles_held",
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("disk_bytes", sa.BigInteger, nullable=False),
        _count("holders", sa.Integer),
        sa.PrimaryKeyConstraint("node", "digest", "disk_bytes", name="pk_bundles_held"),
        sa.ForeignKeyConstraint(
            ["node"], ["scheduler.nodes.name"], name="fk_bundles_held_node", ondelete="CASCADE"
        ),
        sa.CheckConstraint("holders >= 0", name="ck_bundles_held_holders"),
        schema=SCHEMA,
    )
    for statement in _RULES:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: a backup is the way back."""
    raise NotImplementedError("Restore a backup from before the upgrade instead.")


# Replicas of one bundle share its files, so that a node's disk is counted once per bundle. Allocations of
# an earlier release name no bundle and no disk.
_RULES = (
    """
    CREATE FUNCTION scheduler.count_bundle() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      now_holding int;
    BEGIN
      IF TG_OP = 'INSERT' THEN
        IF NEW.disk_bytes > 0 THEN
          INSERT INTO scheduler.bundles_held AS held VALUES (NEW.node, NEW.digest, NEW.disk_bytes, 1)
            ON CONFLICT (node, digest, disk_bytes) DO UPDATE SET holders = held.holders + 1
            RETURNING holders INTO now_holding;
          IF now_holding = 1 THEN
            UPDATE scheduler.nodes SET disk_bytes_allocated = disk_bytes_allocated + NEW.disk_bytes
             WHERE name = NEW.node;
          END IF;
        END IF;
      ELSIF OLD.disk_bytes > 0 THEN
        UPDATE scheduler.bundles_held SET holders = holders - 1
         WHERE node = OLD.node AND digest = OLD.digest AND disk_bytes = OLD.disk_bytes
        RETURNING holders INTO now_holding;
        IF now_holding = 0 THEN
          DELETE FROM scheduler.bundles_held
           WHERE node = OLD.node AND digest = OLD.digest AND disk_bytes = OLD.disk_bytes;
          UPDATE scheduler.nodes SET disk_bytes_allocated = disk_bytes_allocated - OLD.disk_bytes
           WHERE name = OLD.node;
        END IF;
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER count_bundle AFTER INSERT OR DELETE ON scheduler.allocations
      FOR EACH ROW EXECUTE FUNCTION scheduler.count_bundle()
    """,
    """
    CREATE OR REPLACE FUNCTION scheduler.check_replica_allocation() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      changed text;
      now_ scheduler.replicas;
      held record;
      placed boolean;
    BEGIN
      IF TG_TABLE_NAME = 'replicas' THEN
        changed := NEW.id;
      ELSIF TG_OP = 'DELETE' THEN
        changed := OLD.replica;
      ELSE
        changed := NEW.replica;
      END IF;
      SELECT * INTO now_ FROM scheduler.replicas WHERE id = changed;
      IF NOT FOUND THEN
        RETURN NULL;
      END IF;
      placed := now_.state NOT IN ('PENDING', 'STOPPED');
      SELECT a.*, (SELECT count(*) FROM scheduler.allocation_devices d
                    WHERE d.replica = a.replica
                      AND CASE WHEN a.gpu_memory_millis > 0 THEN d.memory_bytes > 0
                               ELSE d.memory_bytes = a.gpu_memory_bytes END) AS devices
        INTO held FROM scheduler.allocations a WHERE a.replica = changed;
      IF placed IS DISTINCT FROM FOUND
         OR (placed AND (held.node IS DISTINCT FROM now_.node
                         OR held.gpus <> held.devices
                         OR held.cpu_millis <> (now_.resources->>'cpu_millis')::bigint
                         OR held.memory_bytes <> (now_.resources->>'memory_bytes')::bigint
                         OR held.gpus <> (now_.resources->>'gpus')::int
                         OR held.gpu_memory_bytes <> (now_.resources->>'gpu_memory_bytes')::bigint
                         OR held.gpu_memory_millis
                            <> coalesce((now_.resources->>'gpu_memory_millis')::int, 0)
                         OR held.disk_bytes <> coalesce((now_.resources->>'disk_bytes')::bigint, 0))) THEN
        RAISE EXCEPTION 'replica % is % but its allocation says otherwise', now_.id, now_.state
          USING ERRCODE = 'check_violation', CONSTRAINT = 'ck_replicas_allocation';
      END IF;
      RETURN NULL;
    END $$
    """,
)
