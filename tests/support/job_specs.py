"""Jobs as tests want them of an agent; what their ranks do is in `support.job_kinds`."""

from __future__ import annotations

from pathlib import Path

from penstock.scheduler.v1 import job_pb2, job_work_pb2


def job(do: str, *, name: str = "j", script: bool = False, ranks: int = 1, **labels: object) -> job_pb2.Job:
    """A job whose ranks do something of `support.job_kinds`."""
    made = job_pb2.Job(
        name=f"jobs/{name}",
        ranks_per_node=ranks,
        labels={"do": do, **{key: str(value) for key, value in labels.items()}},
        train=job_work_pb2.TrainWork(dataset="d", model="models/m"),
    )
    if script:
        made.train.script.code = "c"
    else:
        made.train.recipe.SetInParent()
    return made


def steps_of(trace: Path) -> list[int]:
    """The steps that were counted, in order, those done again twice."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [int(line) for line in lines if line.isdigit()]


def together(trace: Path) -> list[tuple[int, int, int, int]]:
    """(step, rank, process, ranks in all) of each step of each rank."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    found = [tuple(int(word) for word in line.split()) for line in lines]
    return [(line[0], line[1], line[2], line[3]) for line in found if len(line) == 4]
