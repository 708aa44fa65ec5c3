"""What the agent tells a launcher when it starts one."""

from __future__ import annotations

import base64
import dataclasses
import json

from penstock.scheduler.v1 import job_pb2

DECODED = "decoded"
"""Of a task's directory: what its ranks share of datasets, while it runs."""
ROUND_VARIABLE = "PENSTOCK_ROUND"
"""Environment of ranks: tells one meeting of ranks from all others."""


@dataclasses.dataclass(frozen=True, slots=True)
class LauncherConfig:
    """All that a launcher and its ranks know of the mesh. Addresses are for batch predictions only."""

    task: str
    """jobs/{job}/tasks/{task}."""
    index: int
    tasks: int
    least_tasks: int
    ranks: int
    attempt: int
    entry: str
    """What a rank runs, "package.module:function"."""
    spec: str
    """The serialized `penstock.scheduler.v1.Job`, in base64."""
    desk: str
    """Path of the agent's socket."""
    token: str
    """Says there which task this is."""
    directory: str
    """The job's directory on this node."""
    log_path: str
    log_bytes: int
    """The log is rotated at this size; one old one is kept."""
    memory_bytes: int
    """What all ranks together may have."""
    threads: int
    devices: tuple[str, ...]
    """As torch calls them."""
    host: str
    """Address of this node as other nodes see it."""
    rendezvous: str
    """host:port where the ranks of all tasks meet; empty for the task that has the store."""
    grace_seconds: float
    """Between being asked to stop and being killed."""
    max_regroups: int
    """Times that the ranks start again after one of them was killed."""
    user_code: bool = False
    max_output_bytes: int = 0
    max_processes: int = 0
    allow_python_runtime: bool = False
    allow_compiled_models: bool = False
    nice: int = 10
    redis_url: str = ""
    """Where the queues of deployments are; empty but for the kind that calls them, as the next."""
    scheduler_address: str = ""

    @property
    def job(self) -> job_pb2.Job:
        """The job."""
        return job_pb2.Job.FromString(base64.b64decode(self.spec))

    def to_json(self) -> str:
        """Return it as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LauncherConfig:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "devices": tuple(fields["devices"])})
