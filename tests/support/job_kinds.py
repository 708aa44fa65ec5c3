"""Kinds of jobs for tests: the label `do` of the job says what a rank does, the others with which values."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from penstock.registry.v1 import artifact_pb2
from penstock_worker.usecases.job_context import JobContext, JobFailure, Stopped

PAUSE_SECONDS = 0.01


def run(context: JobContext) -> None:
    """The entry point of all of them."""
    _KINDS[context.job.labels["do"]](context)


def hello(context: JobContext) -> None:
    """Says all that can be said."""
    print("printed by the work")
    print("an error of the work", file=sys.stderr)
    context.log(f"rank {context.rank} of {context.world_size} on {','.join(context.devices)}")
    context.progress(1, 2, "steps", "half of it")
    context.metrics(1, {"loss": 0.5})
    context.progress(2, 2, "steps", "done")
    context.report({"answer": 42, "words": ["a", "b"]})


def count(context: JobContext) -> None:
    """Counts to `to` with a checkpoint every `every` steps; each step is noted in `trace`, a file."""
    labels = context.job.labels
    last = context.last_checkpoint()
    step = 0
    if last is not None:
        step = int((last[1] / "count").read_text())
        assert step == last[0]
    trace = Path(labels["trace"])
    with trace.open("a") as file:
        print(f"from {step}", file=file, flush=True)
        while step < int(labels["to"]):
            if context.should_stop():
                save(context, step)
                raise Stopped
            step += 1
            print(step, file=file, flush=True)
            context.progress(step, int(labels["to"]), "steps")
            if step % int(labels["every"]) == 0:
                save(context, step)
            if labels.get("hold") == str(step):
                wait_for(Path(labels["trace"] + ".go"), context, step)
            time.sleep(PAUSE_SECONDS)
    context.report({"counted": step})


def save(context: JobContext, step: int) -> None:
    """Write a checkpoint of one number."""
    directory = context.new_checkpoint(step)
    (directory / "count").write_text(str(step))
    context.commit_checkpoint(step)


def wait_for(path: Path, context: JobContext, step: int) -> None:
    """Wait until a test makes a file; stop if asked to."""
    deadline = time.monotonic() + 60
    while not path.exists():
        if context.should_stop():
            save(context, step)
            raise Stopped
        assert time.monotonic() < deadline
        time.sleep(PAUSE_SECONDS)


def fail(context: JobContext) -> None:
    """Fails as the label `how` says."""
    match context.job.labels["how"]:
        case "failure":
            raise JobFailure("The data has a NaN in row 7.", "INVALID_DATA")
        case "bug":
            raise ZeroDivisionError("a bug in the work")
        case "disk":
            raise OSError(28, "No space left on device", "/data/model.bin")
        case "memory":
            raise MemoryError("8 GB for a table")
        case "vanish":
            os._exit(7)
        case "deaf":
            wait_deaf()


def wait_deaf() -> None:
    """Never stop by oneself."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(PAUSE_SECONDS)


def together(context: JobContext) -> None:
    """All ranks count together through a process group, with checkpoints; see `count`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    labels = context.job.labels
    dist.init_process_group("gloo")
    last = context.last_checkpoint()
    step = last[0] if last else 0
    if last is not None:
        ranks = int((last[1] / "rank-0").read_text().split()[1])
        for rank in range(ranks):
            assert (last[1] / f"rank-{rank}").read_text() == f"{step} {ranks}"
    trace = Path(labels["trace"])
    try:
        while step < int(labels["to"]):
            stop = torch.tensor([float(context.should_stop()), 1.0])
            dist.all_reduce(stop)
            assert int(stop[1]) == context.world_size
            if stop[0] > 0:
                save_together(context, step)
                raise Stopped
            step += 1
            with trace.open("a") as file:
                print(f"{step} {context.rank} {os.getpid()} {context.world_size}", file=file)
            context.progress(step, int(labels["to"]), "steps")
            if step % int(labels["every"]) == 0:
                save_together(context, step)
            if labels.get("hold") == str(step):
                hold_together(Path(labels["trace"] + ".go"))
            time.sleep(PAUSE_SECONDS)
    finally:
        dist.destroy_process_group()
    if "publish" in labels and context.rank == 0:
        wait_for(Path(labels["trace"] + ".go"), context, step)
    context.report({"counted": step, "world_size": context.world_size})


def hold_together(path: Path) -> None:
    """Wait until a test makes a file; when asked to stop, without a checkpoint, as if killed."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(PAUSE_SECONDS)


def save_together(context: JobContext, step: int) -> None:
    """Each rank writes its own file: the step, and how many ranks there are."""
    directory = context.new_checkpoint(step)
    (directory / f"rank-{context.rank}").write_text(f"{step} {context.world_size}")
    context.commit_checkpoint(step)


def fetch(context: JobContext) -> None:
    """Fetches `dataset`, after the file `fill` took all but `leave` bytes of its disk; `open`s it."""
    labels = context.job.labels
    if "fill" in labels:
        path = Path(labels["fill"])
        with path.open("wb") as file:
            file.write(bytes(shutil.disk_usage(path.parent).free - int(labels["leave"])))
    fetched = context.dataset(labels["dataset"])
    if "open" in labels:
        from penstock_worker.adapters.data import open_dataset

        context.report({"rows": len(open_dataset(fetched).train)})


def publish(context: JobContext) -> None:
    """Publishes an artifact of `bytes`."""
    size = int(context.job.labels["bytes"])
    directory = context.scratch / "made"
    directory.mkdir()
    (directory / "data.bin").write_bytes(os.urandom(size))
    kind = artifact_pb2.ARTIFACT_KIND_DATASET
    context.publish_artifact("made", kind, directory, format="npz")


def grow(context: JobContext) -> None:
    """Notes its process in `trace`, waits for `trace`.go, and takes `bytes` of memory."""
    trace = Path(context.job.labels["trace"])
    with trace.open("a") as file:
        print(os.getpid(), file=file)
    wait_for(trace.with_name(f"{trace.name}.go"), context, 0)
    held = bytearray(int(context.job.labels["bytes"]))
    held[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(held[:: os.sysconf("SC_PAGE_SIZE")])
    wait_deaf()


_KINDS: dict[str, Callable[[JobContext], None]] = {
    "hello": hello,
    "count": count,
    "fail": fail,
    "together": together,
    "fetch": fetch,
    "publish": publish,
    "grow": grow,
}
