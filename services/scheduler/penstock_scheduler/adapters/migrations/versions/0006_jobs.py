"""Jobs, their tasks and events; tasks hold parts of nodes under the rules of replicas.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None

SCHEMA = "scheduler"


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _text(name: str, *, default: str | None = "") -> sa.Column[object]:
    server_default = None if default is None else sa.text(f"'{default}'")
    return sa.Column(name, sa.Text, nullable=False, server_default=server_default)


def _count(name: str, kind: type[sa.Integer] = sa.BigInteger) -> sa.Column[object]:
    return sa.Column(name, kind, nullable=False, server_default=sa.text("0"))


def _json(name: str, default: str) -> sa.Column[object]:
    return sa.Column(name, JSONB, nullable=False, server_default=sa.text(f"'{default}'"))


def _bytes(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.LargeBinary, nullable=False, server_default=sa.text("''"))


def upgrade() -> None:
    """Make the tables and the rules on them; an earlier release knows nothing of them."""
    op.create_table(
        "jobs",
        _text("id", default=None),
        _text("project", default="default"),
        _count("priority", sa.Integer),
        _json("labels", "{}"),
        _text("kind"),
        _bytes("work"),
        sa.Column("gang", JSONB, nullable=False),
        _count("max_restarts", sa.Integer),
        sa.Column("timeout_seconds", sa.Float),
        _text("created_by"),
        _text("state", default=None),
        _text("message"),
        _text("failure_reason"),
        sa.Column("cancelling", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("stop", sa.Text),
        _count("attempt", sa.Integer),
        _count("restarts", sa.Integer),
        _count("losses", sa.Integer),
        _count("tasks_made", sa.Integer),
        _time("not_before", nullable=True),
        _time("start_time", nullable=True),
        _time("placed_time", nullable=True),
        sa.Column("ran_seconds", sa.Float, nullable=False, server_default=sa.text("0")),
        _time("end_time", nullable=True),
        _json("results", "[]"),
        _json("leftovers", "[]"),
        _bytes("report"),
        _count("revision"),
        _text("request_id"),
        _text("fingerprint"),
        # Of these the intake of events is the writer, and bumps no revision.
        _bytes("progress"),
        _json("metrics", "{}"),
        _count("last_event"),
        _count("log_lines"),
        _json("checkpoints", "[]"),
        _time("create_time"),
        _time("update_time"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.CheckConstraint(
            "state IN ('QUEUED', 'STARTING', 'RUNNING', 'FINALIZING', 'STOPPING', 'SUCCEEDED', 'FAILED',"
            " 'CANCELLED')",
            name="ck_jobs_state",
        ),
        sa.CheckConstraint(
            "(end_time IS NOT NULL) = (state IN ('SUCCEEDED', 'FAILED', 'CANCELLED'))", name="ck_jobs_ended"
        ),
        sa.CheckConstraint("results = '[]' OR state IN ('FINALIZING', 'SUCCEEDED')", name="ck_jobs_results"),
        schema=SCHEMA,
    )
    op.create_index(
        "ix_jobs_unfinished",
        "jobs",
        ["id"],
        schema=SCHEMA,
        postgresql_where=sa.text("end_time IS NULL OR leftovers <> '[]'"),
    )
    op.create_index("ix_jobs_create_time", "jobs", ["create_time", "id"], schema=SCHEMA)
    op.create_index(
        "uq_jobs_request_id",
        "jobs",
        ["request_id"],
        unique=True,
        schema=SCHEMA,
        postgresql_where=sa.text("request_id <> ''"),
    )
    # A name that is used again goes on counting: an agent may still know the tasks of the earlier job.
    op.create_table(
        "job_names",
        _text("id", default=None),
        sa.Column("tasks_made", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_names"),
        schema=SCHEMA,
    )
    op.create_table(
        "job_tasks",
        _text("job", default=None),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("index", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        _text("state", default=None),
        _text("order", default=None),
        _text("message"),
        sa.Column("node", sa.Text),
        _json("devices", "[]"),
        sa.Column("resources", JSONB, nullable=False),
        _count("pid", sa.Integer),
        _text("rendezvous"),
        _count("last_event"),
        _count("stored_event"),
        _time("create_time"),
        _time("update_time"),
        sa.PrimaryKeyConstraint("job", "number", name="pk_job_tasks"),
        sa.ForeignKeyConstraint(["job"], ["scheduler.jobs.id"], name="fk_job_tasks_job", ondelete="CASCADE"),
        schema=SCHEMA,
    )
    op.create_index(
        "ix_job_tasks_live",
        "job_tasks",
        ["job", "number"],
        schema=SCHEMA,
        postgresql_where=sa.text("state <> 'STOPPED'"),
    )
    op.create_table(
        "job_events",
        _text("job", default=None),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("task", sa.Integer, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.SmallInteger, nullable=False),
        _time("time"),
        _bytes("document"),
        sa.PrimaryKeyConstraint("job", "sequence", name="pk_job_events"),
        sa.UniqueConstraint("job", "task", "number", name="uq_job_events_number"),
        sa.ForeignKeyConstraint(["job"], ["scheduler.jobs.id"], name="fk_job_events_job", ondelete="CASCADE"),
        schema=SCHEMA,
    )
    op.create_table(
        "task_allocations",
        _text("job", default=None),
        sa.Column("number", sa.Integer, nullable=False),
        _text("node", default=None),
        _count("cpu_millis"),
        _count("memory_bytes"),
        _count("gpus", sa.Integer),
        _count("gpu_memory_bytes"),
        _count("gpu_memory_millis", sa.Integer),
        _text("digest"),
        _count("disk_bytes"),
        _time("create_time"),
        sa.PrimaryKeyConstraint("job", "number", name="pk_task_allocations"),
        sa.UniqueConstraint("job", "number", "node", name="uq_task_allocations_job_number_node"),
        # No cascade: what holds something cannot be deleted.
        sa.ForeignKeyConstraint(
            ["job", "number"],
            ["scheduler.job_tasks.job", "scheduler.job_tasks.number"],
            name="fk_task_allocations_job_number",
        ),
        sa.ForeignKeyConstraint(["node"], ["scheduler.nodes.name"], name="fk_task_allocations_node"),
        sa.CheckConstraint(
            "cpu_millis >= 0 AND memory_bytes >= 0 AND gpus >= 0 AND gpu_memory_bytes >= 0"
            " AND disk_bytes >= 0 AND gpu_memory_millis BETWEEN 0 AND 1000",
            name="ck_task_allocations_not_negative",
        ),
        schema=SCHEMA,
    )
    op.create_table(
        "task_allocation_devices",
        _text("job", default=None),
        sa.Column("number", sa.Integer, nullable=False),
        _text("node", default=None),
        _text("device", default=None),
        _count("memory_bytes"),
        sa.PrimaryKeyConstraint("job", "number", "device", name="pk_task_allocation_devices"),
        sa.ForeignKeyConstraint(
            ["job", "number", "node"],
            [
                "scheduler.task_allocations.job",
                "scheduler.task_allocations.number",
                "scheduler.task_allocations.node",
            ],
            name="fk_task_allocation_devices_job_number_node",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["node", "device"],
            ["scheduler.devices.node", "scheduler.devices.id"],
            name="fk_task_allocation_devices_node_device",
        ),
        sa.CheckConstraint("memory_bytes >= 0", name="ck_task_allocation_devices_not_negative"),
        schema=SCHEMA,
    )
    for statement in _RULES:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: a backup is the way back."""
    raise NotImplementedError("Restore a backup from before the upgrade instead.")


# The functions that add allocations up are those of replicas: the columns have the same names, and so the
# sums per node, device and bundle count both, under the same CHECKs.
_RULES = (
    """
    CREATE TRIGGER count AFTER INSERT OR DELETE ON scheduler.task_allocations
      FOR EACH ROW EXECUTE FUNCTION scheduler.count_allocation()
    """,
    """
    CREATE TRIGGER count_bundle AFTER INSERT OR DELETE ON scheduler.task_allocations
      FOR EACH ROW EXECUTE FUNCTION scheduler.count_bundle()
    """,
    """
    CREATE TRIGGER count AFTER INSERT OR DELETE ON scheduler.task_allocation_devices
      FOR EACH ROW EXECUTE FUNCTION scheduler.count_allocation_device()
    """,
    """
    CREATE TRIGGER immutable BEFORE UPDATE ON scheduler.task_allocations
      FOR EACH ROW EXECUTE FUNCTION scheduler.refuse_change()
    """,
    """
    CREATE TRIGGER immutable BEFORE UPDATE ON scheduler.task_allocation_devices
      FOR EACH ROW EXECUTE FUNCTION scheduler.refuse_change()
    """,
    """
    CREATE FUNCTION scheduler.check_task_allocation() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      job_ text;
      number_ int;
      now_ scheduler.job_tasks;
      held record;
      placed boolean;
    BEGIN
      IF TG_OP = 'DELETE' THEN
        job_ := OLD.job;
        number_ := OLD.number;
      ELSE
        job_ := NEW.job;
        number_ := NEW.number;
      END IF;
      SELECT * INTO now_ FROM scheduler.job_tasks WHERE job = job_ AND number = number_;
      IF NOT FOUND THEN
        RETURN NULL;
      END IF;
      placed := now_.state NOT IN ('PENDING', 'STOPPED');
      SELECT a.*, (SELECT count(*) FROM scheduler.task_allocation_devices d
                    WHERE d.job = a.job AND d.number = a.number
                      AND CASE WHEN a.gpu_memory_millis > 0 THEN d.memory_bytes > 0
                               ELSE d.memory_bytes = a.gpu_memory_bytes END) AS devices
        INTO held FROM scheduler.task_allocations a WHERE a.job = job_ AND a.number = number_;
      IF placed IS DISTINCT FROM FOUND
         OR (placed AND (held.node IS DISTINCT FROM now_.node
                         OR held.gpus <> held.devices
                         OR held.cpu_millis <> (now_.resources->>'cpu_millis')::bigint
                         OR held.memory_bytes <> (now_.resources->>'memory_bytes')::bigint
                         OR held.gpus <> (now_.resources->>'gpus')::int
                         OR held.gpu_memory_bytes <> (now_.resources->>'gpu_memory_bytes')::bigint
                         OR held.gpu_memory_millis <> (now_.resources->>'gpu_memory_millis')::int
                         OR held.disk_bytes <> (now_.resources->>'disk_bytes')::bigint)) THEN
        RAISE EXCEPTION 'task %/% is % but its allocation says otherwise', job_, number_, now_.state
          USING ERRCODE = 'check_violation', CONSTRAINT = 'ck_job_tasks_allocation';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER allocation
      AFTER INSERT OR UPDATE OF state, node, resources ON scheduler.job_tasks
      DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW EXECUTE FUNCTION scheduler.check_task_allocation()
    """,
    """
    CREATE CONSTRAINT TRIGGER allocation AFTER INSERT OR DELETE ON scheduler.task_allocations
      DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW EXECUTE FUNCTION scheduler.check_task_allocation()
    """,
    """
    CREATE CONSTRAINT TRIGGER allocation AFTER INSERT OR DELETE ON scheduler.task_allocation_devices
      DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW EXECUTE FUNCTION scheduler.check_task_allocation()
    """,
    # A terminal state is for ever, and nothing of a job that has ended holds anything.
    """
    CREATE FUNCTION scheduler.check_job_ended() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF OLD.end_time IS NOT NULL
         AND (NEW.state <> OLD.state OR NEW.end_time IS DISTINCT FROM OLD.end_time) THEN
        RAISE EXCEPTION 'job % has ended, %; it cannot become %', OLD.id, OLD.state, NEW.state
          USING ERRCODE = 'check_violation', CONSTRAINT = 'ck_jobs_one_end';
      END IF;
      IF NEW.end_time IS NOT NULL AND EXISTS (
          SELECT FROM scheduler.job_tasks WHERE job = NEW.id AND state NOT IN ('PENDING', 'STOPPED')) THEN
        RAISE EXCEPTION 'job % has ended, but its tasks hold something', NEW.id
          USING ERRCODE = 'check_violation', CONSTRAINT = 'ck_jobs_hold_nothing';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER ended AFTER UPDATE OF state, end_time ON scheduler.jobs
      DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW EXECUTE FUNCTION scheduler.check_job_ended()
    """,
)
