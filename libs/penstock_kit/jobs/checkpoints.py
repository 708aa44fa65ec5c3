"""What checkpoints of jobs are called in the registry: workers send them, the scheduler deletes them."""

from __future__ import annotations

from collections.abc import Mapping

MADE = "made"
"""Label: when the job was made, in nanoseconds of Unix time. It tells it from deleted jobs of its name."""


def checkpoint_artifact(job: str, part: int) -> str:
    """Return the name of the artifact that part `part` of a job's checkpoints are versions of."""
    return f"artifacts/job-{job}-checkpoint" + (f"-{part}" if part else "")


def made_of(labels: Mapping[str, str]) -> int:
    """Return when the job was made whose checkpoint has these labels; 0 if they do not say."""
    said = labels.get(MADE, "")
    return int(said) if said.isdecimal() else 0
