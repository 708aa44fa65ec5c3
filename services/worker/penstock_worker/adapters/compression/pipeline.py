"""Steps one after the other, with a checkpoint after each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock_kit.jobs.compress import Step
from penstock_worker.adapters.compression.steps import STEPS
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Facts, Tools
from penstock_worker.usecases.job_context import JobContext, Stopped

_DONE = "done.json"


def run_step(subject: Subject, step: Step, tools: Tools) -> Facts:
    """Apply one step.

    Returns:
        What it did, in numbers, and the "seconds" that it took.

    Raises:
        JobFailure: It cannot be done.
        Stopped: The job shall stop.
    """
    start = time.monotonic()
    tools.watch(0, 1, step.name)
    facts = STEPS[step.name](subject, step.parameters, tools)
    facts = {**facts, "seconds": time.monotonic() - start}
    return {name: value for name, value in facts.items() if math.isfinite(value)}


def run_pipeline(
    context: JobContext,
    steps: Sequence[Step],
    begin: Callable[[], Subject],
    load: Callable[[Path], Subject],
    tools: Tools,
) -> tuple[Subject, list[dict[str, Any]]]:
    """Run all steps that are not done yet.

    Args:
        context: Keeps the checkpoints.
        steps: All of them.
        begin: Returns the subject that nothing was done to.
        load: Returns the subject of a checkpoint's directory.
        tools: What steps may use.

    Returns:
        The subject, and for each step its text and what it did.

    Raises:
        JobFailure: A step cannot be done.
        Stopped: The job shall stop; it goes on after the last finished step.
    """
    last = context.last_checkpoint()
    if last is None:
        subject, done = begin(), []
    else:
        number, directory = last
        done = json.loads((directory / _DONE).read_text())
        subject = load(directory)
        context.log(f"Going on after step {number} of {len(steps)}.")
    for number, step in enumerate(steps[len(done) :], start=len(done) + 1):
        if context.should_stop():
            raise Stopped
        context.log(f"Step {number} of {len(steps)}: {step.text()}")
        facts = run_step(subject, step, tools)
        done.append({"step": step.text(), **facts})
        context.metrics(number, {f"{step.name}/{name}": value for name, value in facts.items()})
        context.progress(number, len(steps), "steps", f"{step.name} done")
        directory = context.new_checkpoint(number)
        subject.save(directory)
        (directory / _DONE).write_text(json.dumps(done))
        context.commit_checkpoint(number)
    return subject, done
