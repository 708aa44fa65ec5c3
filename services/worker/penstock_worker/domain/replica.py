"""What an agent tells a replica process when it starts it, and what the process tells back.

The agent starts the process with a `ReplicaConfig` (as JSON, so that it crosses a socket or a command line)
and reads one JSON line per change of state from the file descriptor `ReplicaConfig.status_fd`:

    {"state": "LOADING", "message": ""}
    {"state": "READY", "message": ""}

The states of a process:

    LOADING ──▶ READY ──▶ STOPPED
       │          │
       └──────────┴──▶ FAILED

A process that dies without a last line was killed; its exit status says by what.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any, TypeAlias

Curve: TypeAlias = tuple[tuple[int, float], ...]
"""Rows in one call, rising, and its seconds."""


class ProcessState(enum.Enum):
    """Where a replica process is in its life."""

    LOADING = "LOADING"
    """It opens the bundle and warms the model up."""
    READY = "READY"
    """It answers requests."""
    FAILED = "FAILED"
    """It could not load the bundle, or cannot go on; it ends with a status other than 0."""
    STOPPED = "STOPPED"
    """It was told to end and has answered what was queued; it ends with status 0."""


NEXT_STATES: dict[ProcessState, frozenset[ProcessState]] = {
    ProcessState.LOADING: frozenset({ProcessState.READY, ProcessState.FAILED, ProcessState.STOPPED}),
    ProcessState.READY: frozenset({ProcessState.FAILED, ProcessState.STOPPED}),
    ProcessState.FAILED: frozenset(),
    ProcessState.STOPPED: frozenset(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class BatchingPolicy:
    """How requests are joined into one call of the model."""

    max_batch_size: int = 0
    """Rows in one call at most. 0: the model has no batch dimension. 1: requests are not joined."""
    max_delay_microseconds: int = 0
    """How long a request may wait for others; 0 takes what is waiting."""
    pad_variable_dimensions: bool = False
    """Pad -1 dimensions beyond the batch to the longest in the batch with zeros."""
    latency_objective_microseconds: int = 0
    """Time from queueing to answer that most requests should keep; 0 for none."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """All that a replica process needs to serve one version. It crosses to the process as JSON."""

    replica: str
    """Id of the replica, without `replicas/`."""
    consumer: str
    """Name of this process in its queue: `<replica>.<incarnation>`, new at each start."""
    queue: str
    """Name of the queue it reads: `<deployment>:<version number>:<digest12>`."""
    redis_url: str
    """Where the queue is, as `unix:///path` or `redis://host:port/0`."""
    bundle_dir: str
    """Directory that holds the files of the version, checked against its digest."""
    manifest: str
    """The version's `penstock.registry.v1.Manifest` in the JSON mapping of protobuf (`MessageToJson`)."""
    model: str
    """Id of the model, without `models/`."""
    version: int
    """Number of the version."""
    batching: BatchingPolicy = BatchingPolicy()
    """How requests are joined; the deployment's choice, which may differ from the manifest's."""
    devices: tuple[str, ...] = ()
    """Devices it may use: `gpu0`, …; empty for the CPU alone."""
    allow_python_runtime: bool = False
    """Whether an operator allowed that code of the bundle is run."""
    allow_compiled_models: bool = False
    """Whether an operator allowed that compiled code of the bundle is run."""
    status_fd: int = -1
    """Inherited file descriptor that takes one JSON line per change of state; -1 for none."""
    log_level: str = "info"
    """Least level of the log lines on standard error."""
    otlp_endpoint: str = ""
    """Where traces go; empty for nowhere."""
    drain_seconds: float = 30.0
    """How long it may go on answering after SIGTERM."""
    scheduler_address: str = ""
    """Where the scheduler listens, for models that call others; empty if that is not known."""
    curve: Curve = ()
    """How long calls take by their rows, as a profile on such a device measured it; empty if none did."""

    def to_json(self) -> str:
        """Writes the configuration as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> ReplicaConfig:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is not such JSON.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["batching"] = BatchingPolicy(**fields["batching"])
            fields["devices"] = tuple(fields["devices"])
            fields["curve"] = tuple((int(rows), float(seconds)) for rows, seconds in fields["curve"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a replica configuration: {error}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One line that a replica process writes to its agent."""

    state: ProcessState
    message: str = ""

    def to_line(self) -> bytes:
        """Writes the status as one line of JSON, with its end."""
        return json.dumps({"state": self.state.value, "message": self.message}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> ProcessStatus:
        """Reads what `to_line` wrote.

        Raises:
            ValueError: if it is not such a line.
        """
        try:
            fields = json.loads(line)
            return cls(ProcessState(fields["state"]), str(fields["message"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a status line: {error}") from error
