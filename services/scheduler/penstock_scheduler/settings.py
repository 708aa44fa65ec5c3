"""Settings of the scheduler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from penstock_kit.joining import tokens_of
from penstock_kit.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """What an operator may set; see `ServiceSettings` for the names of the variables."""

    scheduler_listen: str = Field(
        "127.0.0.1:7102", description="host:port or unix:/path on which the scheduler listens"
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis that jobs are queued in, and that agents send their events through",
    )
    join_token: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        repr=False,
        description="By which workers join, commas between several; without any, only this machine's do",
    )
    node_lease_seconds: float = Field(
        3.0, gt=0, description="A node whose agent went away is given up after this long"
    )
    node_silence_seconds: float = Field(
        # Its replicas are to serve elsewhere within 10 s, the start of others included.
        7.0,
        gt=0,
        description="A node whose agent is connected but silent is given up after this long",
    )
    node_return_seconds: float = Field(
        15.0,
        ge=0,
        description="A job waits so long for a node with its newest checkpoint, then goes on elsewhere",
    )
    scheduler_default_cpu_millis: int = Field(
        # A replica that waits costs next to nothing: 40 fit a machine of 2 cores.
        50,
        ge=1,
        description="Thousandths of a core for a replica where nobody states it",
    )
    scheduler_default_memory_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1,
        description="Memory for a replica where nobody states it, beside twice its bundle's size",
    )
    alias_poll_seconds: float = Field(
        1.0, gt=0, description="How often the registry is asked where aliases point"
    )

    job_details_days: float = Field(
        30.0,
        ge=0,
        description="Logs, curves and checkpoints of jobs are deleted so long after their end; 0 keeps them",
    )
    jobs_days: float = Field(
        365.0,
        ge=0,
        description="Jobs are deleted so long after their end, their results stay; 0 keeps them",
    )

    @field_validator("join_token", mode="before")
    @classmethod
    def _parse_tokens(cls, value: object) -> object:
        return tokens_of(value) if isinstance(value, str) else value
