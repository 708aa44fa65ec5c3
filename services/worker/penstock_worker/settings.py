"""Settings of a worker agent, read from PENSTOCK_<FIELD IN CAPITALS>."""

from __future__ import annotations

import re
import socket
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from penstock_kit.joining import tokens_of
from penstock_kit.settings import ServiceSettings

GIB = 1024**3
MIB = 1024**2
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


def default_node_name() -> str:
    """Return the name of this machine as the id of a node: lower case, what does not belong left out."""
    name = re.sub(r"[^a-z0-9.-]", "-", socket.gethostname().lower()).strip("-.")[:63].strip("-.")
    return name or "node"


class WorkerSettings(ServiceSettings):
    """What a worker agent reads."""

    worker_node: str = Field(
        default_factory=default_node_name,
        description="Name of this node, one worker for each; default is the name of the machine",
    )
    join_token: Annotated[tuple[str, ...], NoDecode] = Field(
        (), repr=False, description="By which this worker joins: one that the scheduler has; the first counts"
    )
    worker_labels: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="Labels of this node: key=value,key=value"
    )
    worker_listen: str = Field("127.0.0.1:7103", description="Where the agent's own gRPC service listens")
    worker_address: str = Field(
        "", description="Address of that service as others see it; default is what it listens on"
    )
    worker_cpu_millis: int = Field(
        0, ge=0, description="Thousandths of a core that replicas may use; 0 takes what the process may use"
    )
    worker_memory_bytes: int = Field(
        0, ge=0, description="Memory that replicas may use; 0 takes what there is, less the reserve"
    )
    worker_memory_reserve_bytes: int = Field(
        512 * MIB, ge=0, description="Memory kept back for the agent, its fork server and the machine"
    )
    worker_cache_bytes: int = Field(20 * GIB, ge=1, description="Disk that the bundle cache may take")
    worker_download_parallelism: int = Field(4, ge=1, le=64, description="Files fetched at the same time")
    worker_runtimes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Runtimes to offer, such as torch,onnx; default is all that can be imported"
    )
    worker_start_seconds: float = Field(
        600.0, gt=0, description="How long a replica may take to load before it is ended and tried again"
    )
    worker_drain_seconds: float = Field(
        30.0, ge=0, description="How long a replica may take to finish what it has begun"
    )
    worker_orphan_drain_seconds: float = Field(
        5.0, ge=0, description="The same when the agent itself has died"
    )
    worker_log_bytes: int = Field(
        8 * MIB, ge=4096, description="Size of a replica's log before it is rotated; one old one is kept"
    )
    worker_log_files: int = Field(200, ge=1, description="Logs of replicas that are kept")

    worker_job_host: str = Field(
        "",
        description="Address at which ranks on other nodes reach those here; default is that of the worker",
    )
    worker_job_grace_seconds: float = Field(
        10.0, gt=0, description="How long a task of a job may take to write a checkpoint and end"
    )
    worker_job_regroups: int = Field(
        5, ge=0, description="Times that the ranks of a task start again in place after one was killed"
    )
    worker_job_nice: int = Field(
        10, ge=0, le=19, description="How much processes of jobs step back behind replicas for the processor"
    )
    allow_user_code: bool = Field(
        False, description="Let jobs of training bring their own program (train.py): it runs unconfined"
    )

    @field_validator("join_token", mode="before")
    @classmethod
    def _parse_tokens(cls, value: object) -> object:
        return tokens_of(value) if isinstance(value, str) else value

    @field_validator("worker_node")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(
                "a node's name is 1 to 63 lower-case letters, digits, '.' and '-', "
                "with a letter or digit at both ends"
            )
        return value

    @field_validator("worker_labels", mode="before")
    @classmethod
    def _parse_labels(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        labels = {}
        for pair in filter(None, (part.strip() for part in value.split(","))):
            key, equals, text = pair.partition("=")
            if not equals or not key.strip():
                raise ValueError(f"{pair!r} is not key=value")
            labels[key.strip()] = text.strip()
        return labels

    @field_validator("worker_runtimes", mode="before")
    @classmethod
    def _parse_runtimes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(filter(None, (part.strip() for part in value.split(","))))
