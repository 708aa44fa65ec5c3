"""Jobs that run programs of users."""

from __future__ import annotations

import textwrap

from penstock.registry.v1 import artifact_pb2
from penstock.scheduler.v1 import job_pb2
from support.artifact_caller import ArtifactCaller
from support.job_specs import job

SCRIPT = "penstock_worker.adapters.jobs.script:run_script"


async def program(artifacts: ArtifactCaller, text: str, name: str = "j", **parameters: object) -> job_pb2.Job:
    """A job of a program, pushed as an artifact."""
    code = await artifacts.push(
        "code", {"train.py": textwrap.dedent(text).encode()}, kind=artifact_pb2.ARTIFACT_KIND_CODE, format=""
    )
    data = await artifacts.push("data", {"data.npz": b"rows"})
    made = job("", name=name, script=True)
    made.train.script.code = code.name
    made.train.dataset = data.name
    made.train.seed = 7
    made.train.script.parameters.update(parameters)
    return made
