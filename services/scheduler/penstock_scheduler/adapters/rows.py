"""Rows of the schema `scheduler`. They never leave this package.

The migrations make the tables; columns kept by triggers (what is allocated) are only read here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from sqlalchemy import BigInteger, DateTime, Identity, Integer, LargeBinary, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from penstock_kit.db import service_metadata

Time = Annotated[datetime, mapped_column(DateTime(timezone=True))]
Str = Annotated[str, mapped_column(Text)]
Key = Annotated[str, mapped_column(Text, primary_key=True)]
Int = Annotated[int, mapped_column(Integer)]
Big = Annotated[int, mapped_column(BigInteger)]
Json = Annotated[Any, mapped_column(JSONB)]


class Base(DeclarativeBase):
    """Tables of the schema `scheduler`."""

    metadata = service_metadata("scheduler")


class LeaderRow(Base):
    """One row; its epoch grows with every change of leader and fences off the earlier one."""

    __tablename__ = "leader"
    single: Mapped[bool] = mapped_column(primary_key=True)
    epoch: Mapped[Big]


class VersionRow(Base):
    """The registry's message about a version; `revision` counts how often it was found changed."""

    __tablename__ = "versions"
    model: Mapped[Key]
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    measured_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    revision: Mapped[int] = mapped_column(Integer, server_default="0")


class AliasesRow(Base):
    """Where the aliases of a model point, as the registry last said."""

    __tablename__ = "model_aliases"
    model: Mapped[Key]
    aliases: Mapped[Json]


class DeploymentRow(Base):
    """A deployment; kept with a delete_time after its last replica is gone."""

    __tablename__ = "deployments"
    uid: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[Str]
    asked: Mapped[Json]
    serving: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    labels: Mapped[Json]
    project: Mapped[str] = mapped_column(Text, server_default="default")
    max_queue_depth: Mapped[Int]
    cache: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    rollout_policy: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    rollout: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    at_once: Mapped[bool] = mapped_column(server_default="false")
    autoscaling: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    scale: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    state: Mapped[Str]
    message: Mapped[Str]
    revision: Mapped[Int]
    updated_by: Mapped[Str]
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    delete_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class RevisionRow(Base):
    """What was asked for at one revision. Kept for ever."""

    __tablename__ = "deployment_revisions"
    deployment_uid: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    spec: Mapped[Json]
    time: Mapped[Time]
    actor: Mapped[Str]
    cause: Mapped[Str]


class RolloutRow(Base):
    """A rollout with its evidence. Kept for ever."""

    __tablename__ = "rollouts"
    deployment_uid: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    document: Mapped[Json]


class ServedRow(Base):
    """What callers of a deployment got from a moment on. Kept for ever."""

    __tablename__ = "served"
    deployment_uid: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    time: Mapped[datetime] = mapped_column(DateTime(timezone=True), primary_key=True)
    targets: Mapped[Json]


class RequestRow(Base):
    """A mutation that carried a request_id."""

    __tablename__ = "requests"
    request_id: Mapped[Key]
    fingerprint: Mapped[Str]
    deployment_uid: Mapped[Big]
    time: Mapped[Time]


class NodeRow(Base):
    """A node; the sums of what is allocated are kept and bounded by the database.

    `cordoned`, `draining` and `taints` are written by operators alone.
    """

    __tablename__ = "nodes"
    name: Mapped[Key]
    state: Mapped[Str]
    address: Mapped[Str]
    agent_version: Mapped[Str]
    labels: Mapped[Json]
    runtimes: Mapped[Json]
    cached_digests: Mapped[Json]
    cpu_millis: Mapped[Big]
    memory_bytes: Mapped[Big]
    cpu_millis_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    memory_bytes_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    instance: Mapped[Str]
    disk_bytes: Mapped[Big]
    disk_bytes_free: Mapped[Big]
    disk_bytes_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cordoned: Mapped[bool] = mapped_column(server_default="false")
    draining: Mapped[bool] = mapped_column(server_default="false")
    taints: Mapped[Any] = mapped_column(JSONB, server_default="[]")
    message: Mapped[Str]
    last_seen_time: Mapped[Time]


class DeviceRow(Base):
    """A device of a node, in the agent's order."""

    __tablename__ = "devices"
    node: Mapped[Key]
    id: Mapped[Key]
    kind: Mapped[Str]
    model: Mapped[Str]
    position: Mapped[Int]
    parent_uuid: Mapped[Str]
    memory_bytes: Mapped[Big]
    memory_bytes_allocated: Mapped[int] = mapped_column(BigInteger, server_default="0")
    holders: Mapped[int] = mapped_column(Integer, server_default="0")
    exclusive: Mapped[bool] = mapped_column(server_default="false")


class ReplicaRow(Base):
    """A replica."""

    __tablename__ = "replicas"
    id: Mapped[Key]
    deployment_uid: Mapped[Big]
    model: Mapped[Str]
    version: Mapped[Int]
    digest: Mapped[Str]
    spec_digest: Mapped[Str]
    state: Mapped[Str]
    message: Mapped[Str]
    node: Mapped[str | None] = mapped_column(Text)
    devices: Mapped[Json]
    resources: Mapped[Json]
    batching: Mapped[Json]
    constraints: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    surge: Mapped[bool] = mapped_column(server_default="false")
    restarts: Mapped[Int]
    pid: Mapped[Int]
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class AllocationRow(Base):
    """A part of a node held by a replica."""

    __tablename__ = "allocations"
    replica: Mapped[Key]
    node: Mapped[Str]
    cpu_millis: Mapped[Big]
    memory_bytes: Mapped[Big]
    gpus: Mapped[Int]
    gpu_memory_bytes: Mapped[Big]
    gpu_memory_millis: Mapped[Int]
    digest: Mapped[Str]
    disk_bytes: Mapped[Big]
    create_time: Mapped[Time]


class AllocationDeviceRow(Base):
    """A GPU, or a part of its memory, held by a replica; memory 0 means the whole GPU."""

    __tablename__ = "allocation_devices"
    replica: Mapped[Key]
    device: Mapped[Key]
    node: Mapped[Str]
    memory_bytes: Mapped[Big]


class JobRow(Base):
    """A job; the intake of events alone writes progress, metrics, last_event, log_lines and checkpoints."""

    __tablename__ = "jobs"
    id: Mapped[Key]
    project: Mapped[Str]
    priority: Mapped[Int]
    labels: Mapped[Json]
    kind: Mapped[Str]
    work: Mapped[bytes] = mapped_column(LargeBinary)
    gang: Mapped[Json]
    max_restarts: Mapped[Int]
    timeout_seconds: Mapped[float | None]
    created_by: Mapped[Str]
    state: Mapped[Str]
    message: Mapped[Str]
    failure_reason: Mapped[Str]
    cancelling: Mapped[bool]
    stop: Mapped[str | None] = mapped_column(Text)
    attempt: Mapped[Int]
    restarts: Mapped[Int]
    losses: Mapped[Int]
    tasks_made: Mapped[Int]
    not_before: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    homes: Mapped[Any] = mapped_column(JSONB, server_default="[]")
    start_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    placed_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    ran_seconds: Mapped[float]
    end_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    results: Mapped[Json]
    leftovers: Mapped[Json]
    report: Mapped[bytes] = mapped_column(LargeBinary)
    revision: Mapped[Big]
    request_id: Mapped[Str]
    fingerprint: Mapped[Str]
    progress: Mapped[bytes] = mapped_column(LargeBinary, server_default="")
    metrics: Mapped[Any] = mapped_column(JSONB, server_default="{}")
    last_event: Mapped[int] = mapped_column(BigInteger, server_default="0")
    log_lines: Mapped[int] = mapped_column(BigInteger, server_default="0")
    checkpoints: Mapped[Any] = mapped_column(JSONB, server_default="[]")
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class JobNameRow(Base):
    """The name of a job that was deleted, and how many tasks it had."""

    __tablename__ = "job_names"
    id: Mapped[Key]
    tasks_made: Mapped[Int]
    delete_time: Mapped[Time]


class TaskRow(Base):
    """A task of a job; the intake of events alone writes stored_event."""

    __tablename__ = "job_tasks"
    job: Mapped[Key]
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    index: Mapped[Int]
    attempt: Mapped[Int]
    state: Mapped[Str]
    order: Mapped[Str]
    message: Mapped[Str]
    node: Mapped[str | None] = mapped_column(Text)
    devices: Mapped[Json]
    resources: Mapped[Json]
    pid: Mapped[Int]
    rendezvous: Mapped[Str]
    last_event: Mapped[Big]
    stored_event: Mapped[int] = mapped_column(BigInteger, server_default="0")
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class JobEventRow(Base):
    """Something that happened in a job, as its agent said it."""

    __tablename__ = "job_events"
    job: Mapped[Key]
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    task: Mapped[Int]
    number: Mapped[Big]
    kind: Mapped[int] = mapped_column(SmallInteger)
    time: Mapped[Time]
    document: Mapped[bytes] = mapped_column(LargeBinary)


class TaskAllocationRow(Base):
    """A part of a node held by a task."""

    __tablename__ = "task_allocations"
    job: Mapped[Key]
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    node: Mapped[Str]
    cpu_millis: Mapped[Big]
    memory_bytes: Mapped[Big]
    gpus: Mapped[Int]
    gpu_memory_bytes: Mapped[Big]
    gpu_memory_millis: Mapped[Int]
    digest: Mapped[Str]
    disk_bytes: Mapped[Big]
    create_time: Mapped[Time]


class TaskAllocationDeviceRow(Base):
    """A GPU, or a part of its memory, held by a task; memory 0 means the whole GPU."""

    __tablename__ = "task_allocation_devices"
    job: Mapped[Key]
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    device: Mapped[Key]
    node: Mapped[Str]
    memory_bytes: Mapped[Big]
