"""What checkpoints of jobs are called in the registry: workers send them, the scheduler deletes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

LONGEST = 63
"""Characters of an artifact's id."""
DIGITS = 16
MADE = "made"
"""Label: when the job was made, in nanoseconds of Unix time. It tells it from deleted jobs of its name."""


def checkpoint_artifact(job: str, part: int) -> str:
    """Return the name of the artifact that part `part` of a job's checkpoints are versions of.

    The name of a job may be as long as that of an artifact: of a long one it has the beginning and a digest.
    """
    ending = "-checkpoint" + (f"-{part}" if part else "")
    room = LONGEST - len("job-") - len(ending)
    if len(job) > room:
        digest = hashlib.sha256(job.encode()).hexdigest()[:DIGITS]
        job = f"{job[: room - DIGITS - 1]}-{digest}"
    return f"artifacts/job-{job}{ending}"


def made_of(labels: Mapping[str, str]) -> int:
    """Return when the job was made whose checkpoint has these labels; 0 if they do not say."""
    said = labels.get(MADE, "")
    return int(said) if said.isdecimal() else 0
