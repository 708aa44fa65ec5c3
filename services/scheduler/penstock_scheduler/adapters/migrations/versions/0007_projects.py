"""Projects: quotas that no plan can exceed, and shares.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None

SCHEMA = "scheduler"
_RESOURCES = ("cpu_millis", "memory_bytes", "gpu_millis")


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=sa.text("0"))


def _text(name: str, default: str | None = "''") -> sa.Column[str]:
    return sa.Column(
        name, sa.Text, nullable=False, server_default=None if default is None else sa.text(default)
    )


def _time(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()"))


def upgrade() -> None:
    """Add projects, let deployments and jobs name one, and count what each holds."""
    op.create_table(
        "projects",
        _text("name", default=None),
        sa.Column("uid", sa.BigInteger, sa.Identity(always=True), nullable=False),
        _text("description"),
        sa.Column("weight", sa.Double, nullable=False, server_default=sa.text("1")),
        sa.Column("revision", sa.Integer, nullable=False, server_default=sa.text("1")),
        _time("create_time"),
        _time("update_time"),
        # What may be held together; 0 is unbounded.
        *(_count(f"{name}_quota") for name in _RESOURCES),
        # What is held, and what successors hold beside it until their predecessors have ended.
        *(_count(f"{name}_allocated") for name in _RESOURCES),
        *(_count(f"{name}_surge") for name in _RESOURCES),
        # The quota, or what was held when an operator took a quota below it; falls with what is held.
        *(sa.Column(f"{name}_bound", sa.BigInteger) for name in _RESOURCES),
        sa.PrimaryKeyConstraint("name", name="pk_projects"),
        sa.CheckConstraint("weight > 0 AND weight < 'Infinity'", name="ck_projects_weight"),
        *(
            sa.CheckConstraint(
                f"{name}_quota >= 0 AND (({name}_quota = 0) = ({name}_bound IS NULL)) "
                f"AND coalesce({name}_bound >= {name}_quota, true)",
                name=f"ck_projects_{name}_quota",
            )
            for name in _RESOURCES
        ),
        *(
            sa.CheckConstraint(
                f"{name}_allocated >= 0 AND {name}_surge >= 0 "
                f"AND coalesce({name}_allocated <= {name}_bound AND {name}_surge <= {name}_bound, true)",
                name=f"ck_projects_{name}_within_quota",
            )
            for name in _RESOURCES
        ),
        schema=SCHEMA,
    )
    op.execute("INSERT INTO scheduler.projects (name) VALUES ('default')")
    op.add_column(
        "replicas", sa.Column("surge", sa.Boolean, nullable=False, server_default=sa.false()), schema=SCHEMA
    )
    for table in ("allocation_devices", "task_allocation_devices"):
        op.add_column(table, _count("gpu_millis"), schema=SCHEMA)
    op.add_column("deployments", _text("project", default="'default'"), schema=SCHEMA)
    for table in ("deployments", "jobs"):
        # Those that are gone name their project still: it falls back to the default one with its end.
        op.create_foreign_key(
            f"fk_{table}_project",
            table,
            "projects",
            ["project"],
            ["name"],
            source_schema=SCHEMA,
            referent_schema=SCHEMA,
            ondelete="SET DEFAULT",
        )
        op.create_index(f"ix_{table}_project", table, ["project"], schema=SCHEMA)
    for statement in _RULES:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: a backup is the way back."""
    raise NotImplementedError("Restore a backup from before the upgrade instead.")


# Sums are kept by triggers, in the transaction of the allocation itself, once a statement; the CHECKs above
# bound them. Whoever locks deployments and projects locks deployments first.
_RULES = (
    # A quota that an operator took below what is held bounds that, then less as it ends, never more again.
    """
    CREATE FUNCTION scheduler.count_in_project(
      which text, surges boolean, cpu bigint, memory bigint, gpu bigint
    ) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
      IF surges THEN
        UPDATE scheduler.projects
           SET cpu_millis_surge = cpu_millis_surge + cpu,
               memory_bytes_surge = memory_bytes_surge + memory,
               gpu_millis_surge = gpu_millis_surge + gpu
         WHERE name = which;
      ELSE
        UPDATE scheduler.projects
           SET cpu_millis_allocated = cpu_millis_allocated + cpu,
               memory_bytes_allocated = memory_bytes_allocated + memory,
               gpu_millis_allocated = gpu_millis_allocated + gpu
         WHERE name = which;
      END IF;
      IF cpu < 0 OR memory < 0 OR gpu < 0 THEN
        UPDATE scheduler.projects
           SET cpu_millis_bound = CASE WHEN cpu_millis_bound > cpu_millis_quota
                 THEN greatest(cpu_millis_quota, cpu_millis_surge,
                               least(cpu_millis_bound, cpu_millis_allocated))
                 ELSE cpu_millis_bound END,
               memory_bytes_bound = CASE WHEN memory_bytes_bound > memory_bytes_quota
                 THEN greatest(memory_bytes_quota, memory_bytes_surge,
                               least(memory_bytes_bound, memory_bytes_allocated))
                 ELSE memory_bytes_bound END,
               gpu_millis_bound = CASE WHEN gpu_millis_bound > gpu_millis_quota
                 THEN greatest(gpu_millis_quota, gpu_millis_surge,
                               least(gpu_millis_bound, gpu_millis_allocated))
                 ELSE gpu_millis_bound END
         WHERE name = which AND (cpu_millis_bound > cpu_millis_quota
                                 OR memory_bytes_bound > memory_bytes_quota
                                 OR gpu_millis_bound > gpu_millis_quota);
      END IF;
    END $$
    """,
    """
    CREATE FUNCTION scheduler.count_allocations_in_projects() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      sign int := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END;
      part record;
    BEGIN
      IF TG_TABLE_NAME = 'task_allocations' THEN
        FOR part IN
          SELECT j.project, false AS surge, sum(c.cpu_millis)::bigint AS cpu,
                 sum(c.memory_bytes)::bigint AS memory
            FROM changed c JOIN scheduler.jobs j ON j.id = c.job GROUP BY 1, 2 ORDER BY 1, 2
        LOOP
          PERFORM scheduler.count_in_project(
            part.project, part.surge, sign * part.cpu, sign * part.memory, 0);
        END LOOP;
      ELSE
        FOR part IN
          SELECT d.project, r.surge, sum(c.cpu_millis)::bigint AS cpu, sum(c.memory_bytes)::bigint AS memory
            FROM changed c JOIN scheduler.replicas r ON r.id = c.replica
            JOIN scheduler.deployments d ON d.uid = r.deployment_uid GROUP BY 1, 2 ORDER BY 1, 2
        LOOP
          PERFORM scheduler.count_in_project(
            part.project, part.surge, sign * part.cpu, sign * part.memory, 0);
        END LOOP;
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER count_in_projects_more AFTER INSERT ON scheduler.allocations
      REFERENCING NEW TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_allocations_in_projects()
    """,
    """
    CREATE TRIGGER count_in_projects_less AFTER DELETE ON scheduler.allocations
      REFERENCING OLD TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_allocations_in_projects()
    """,
    """
    CREATE TRIGGER count_in_projects_more AFTER INSERT ON scheduler.task_allocations
      REFERENCING NEW TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_allocations_in_projects()
    """,
    """
    CREATE TRIGGER count_in_projects_less AFTER DELETE ON scheduler.task_allocations
      REFERENCING OLD TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_allocations_in_projects()
    """,
    # A part of a GPU counts to the nearest thousandth of its memory, as the planner reckons.
    """
    CREATE FUNCTION scheduler.measure_allocation_device() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      size numeric;
    BEGIN
      SELECT memory_bytes INTO size FROM scheduler.devices WHERE node = NEW.node AND id = NEW.device;
      NEW.gpu_millis := CASE
        WHEN NEW.memory_bytes = 0 OR coalesce(size, 0) = 0 THEN 1000
        ELSE least(1000, greatest(1, floor((2000 * NEW.memory_bytes::numeric + size) / (2 * size)))) END;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER measure BEFORE INSERT ON scheduler.allocation_devices
      FOR EACH ROW EXECUTE FUNCTION scheduler.measure_allocation_device()
    """,
    """
    CREATE TRIGGER measure BEFORE INSERT ON scheduler.task_allocation_devices
      FOR EACH ROW EXECUTE FUNCTION scheduler.measure_allocation_device()
    """,
    """
    CREATE FUNCTION scheduler.count_devices_in_projects() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      sign int := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END;
      part record;
    BEGIN
      IF TG_TABLE_NAME = 'task_allocation_devices' THEN
        FOR part IN
          SELECT j.project, false AS surge, sum(c.gpu_millis)::bigint AS gpu
            FROM changed c JOIN scheduler.jobs j ON j.id = c.job GROUP BY 1, 2 ORDER BY 1, 2
        LOOP
          PERFORM scheduler.count_in_project(part.project, part.surge, 0, 0, sign * part.gpu);
        END LOOP;
      ELSE
        FOR part IN
          SELECT d.project, r.surge, sum(c.gpu_millis)::bigint AS gpu
            FROM changed c JOIN scheduler.replicas r ON r.id = c.replica
            JOIN scheduler.deployments d ON d.uid = r.deployment_uid GROUP BY 1, 2 ORDER BY 1, 2
        LOOP
          PERFORM scheduler.count_in_project(part.project, part.surge, 0, 0, sign * part.gpu);
        END LOOP;
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER count_in_projects_more AFTER INSERT ON scheduler.allocation_devices
      REFERENCING NEW TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_devices_in_projects()
    """,
    """
    CREATE TRIGGER count_in_projects_less AFTER DELETE ON scheduler.allocation_devices
      REFERENCING OLD TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_devices_in_projects()
    """,
    """
    CREATE TRIGGER count_in_projects_more AFTER INSERT ON scheduler.task_allocation_devices
      REFERENCING NEW TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_devices_in_projects()
    """,
    """
    CREATE TRIGGER count_in_projects_less AFTER DELETE ON scheduler.task_allocation_devices
      REFERENCING OLD TABLE AS changed
      FOR EACH STATEMENT EXECUTE FUNCTION scheduler.count_devices_in_projects()
    """,
    """
    CREATE FUNCTION scheduler.move_to_project() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      part record;
    BEGIN
      PERFORM 1 FROM scheduler.projects WHERE name IN (OLD.project, NEW.project)
        ORDER BY name FOR NO KEY UPDATE;
      FOR part IN
        SELECT replicas.surge,
               sum(a.cpu_millis)::bigint AS cpu,
               sum(a.memory_bytes)::bigint AS memory,
               coalesce(sum((SELECT sum(d.gpu_millis) FROM scheduler.allocation_devices d
                              WHERE d.replica = a.replica)), 0)::bigint AS gpu
          FROM scheduler.replicas JOIN scheduler.allocations a ON a.replica = replicas.id
         WHERE replicas.deployment_uid = NEW.uid GROUP BY 1
      LOOP
        PERFORM scheduler.count_in_project(OLD.project, part.surge, -part.cpu, -part.memory, -part.gpu);
        PERFORM scheduler.count_in_project(NEW.project, part.surge, part.cpu, part.memory, part.gpu);
      END LOOP;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER move_to_project AFTER UPDATE OF project ON scheduler.deployments
      FOR EACH ROW WHEN (OLD.project IS DISTINCT FROM NEW.project)
      EXECUTE FUNCTION scheduler.move_to_project()
    """,
    """
    CREATE FUNCTION scheduler.settle_surge() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
      part record;
    BEGIN
      FOR part IN
        SELECT deployments.project, a.cpu_millis AS cpu, a.memory_bytes AS memory,
               coalesce((SELECT sum(d.gpu_millis) FROM scheduler.allocation_devices d
                          WHERE d.replica = a.replica), 0)::bigint AS gpu
          FROM scheduler.allocations a, scheduler.deployments
         WHERE a.replica = NEW.id AND deployments.uid = NEW.deployment_uid
      LOOP
        PERFORM scheduler.count_in_project(part.project, OLD.surge, -part.cpu, -part.memory, -part.gpu);
        PERFORM scheduler.count_in_project(part.project, NEW.surge, part.cpu, part.memory, part.gpu);
      END LOOP;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER settle_surge AFTER UPDATE OF surge ON scheduler.replicas
      FOR EACH ROW WHEN (OLD.surge IS DISTINCT FROM NEW.surge)
      EXECUTE FUNCTION scheduler.settle_surge()
    """,
    # What is given out already.
    "ALTER TABLE scheduler.allocation_devices DISABLE TRIGGER immutable",
    """
    UPDATE scheduler.allocation_devices held
       SET gpu_millis = CASE WHEN held.memory_bytes = 0 OR d.memory_bytes = 0 THEN 1000
             ELSE least(1000, greatest(1, floor((2000 * held.memory_bytes::numeric + d.memory_bytes)
                                                / (2 * d.memory_bytes)))) END
      FROM scheduler.devices d WHERE d.node = held.node AND d.id = held.device
    """,
    "ALTER TABLE scheduler.allocation_devices ENABLE TRIGGER immutable",
    """
    UPDATE scheduler.projects
       SET cpu_millis_allocated = (SELECT coalesce(sum(cpu_millis), 0) FROM scheduler.allocations),
           memory_bytes_allocated = (SELECT coalesce(sum(memory_bytes), 0) FROM scheduler.allocations),
           gpu_millis_allocated = (SELECT coalesce(sum(gpu_millis), 0) FROM scheduler.allocation_devices)
     WHERE name = 'default'
    """,
)
