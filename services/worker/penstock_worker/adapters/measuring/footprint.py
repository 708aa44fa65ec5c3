"""What one replica of a version needs: memory for itself alone, and time to its first answer.

Both are measured in a process of their own that has imported the runtime's libraries before, as the fork
server has for replicas: what all replicas share does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from penstock.registry.v1 import manifest_pb2
from penstock_worker.adapters.measuring.loading import open_version
from penstock_worker.adapters.measuring.rows import drawn_inputs
from penstock_worker.adapters.node_probe import memory_of
from penstock_worker.hotpath.execution import ModelError
from penstock_worker.hotpath.loading import RUNTIMES
from penstock_worker.usecases.job_context import JobFailure

# Calls with a full batch: allocators and arenas have grown to their size by then.
_CALLS = 5
# A bundle of tens of gigabytes off a slow disk has loaded by then.
DEADLINE_SECONDS = 900.0
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """What was measured.

    Attributes:
        load_seconds: From the files, which were read once before, to the first answer.
        memory_bytes: Of main memory that the process has for itself under load, beyond its libraries.
        gpu_memory_bytes: Of GPU memory; 0 without one.
    """

    load_seconds: float
    memory_bytes: int
    gpu_memory_bytes: int


def measure_footprint(
    directory: Path,
    manifest: manifest_pb2.Manifest,
    *,
    name: str,
    devices: Sequence[str] = ("cpu",),
    allow_python_runtime: bool = False,
    allow_compiled_models: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Footprint:
    """Load a version in a process of its own and look at what that takes.

    Args:
        directory: The files.
        manifest: What they are.
        name: What to call it in words.
        devices: As torch calls them.
        allow_python_runtime: Whether an operator allowed code of bundles.
        allow_compiled_models: Whether an operator allowed compiled code of bundles.
        check: Called often meanwhile; may raise to end it.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be opened; OUT_OF_MEMORY if that killed the process.
    """
    question = {
        "directory": str(directory),
        "manifest": json_format.MessageToDict(manifest),
        "name": name,
        "devices": list(devices),
        "allow_python_runtime": allow_python_runtime,
        "allow_compiled_models": allow_compiled_models,
    }
    process = subprocess.Popen(  # noqa: S603 - this module, by this interpreter
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        answer = _answer(process, json.dumps(question).encode(), check)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What is still buffered for a process that has ended goes nowhere.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
    if "failure" in answer:
        raise JobFailure(answer["failure"], answer["cause"])
    return Footprint(**answer)


def _answer(process: subprocess.Popen[bytes], question: bytes, check: Callable[[], None]) -> dict[str, Any]:
    ends = time.monotonic() + DEADLINE_SECONDS
    asked: bytes | None = question
    while True:
        try:
            said, _ = process.communicate(asked, timeout=_POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            asked = None
            check()
            if time.monotonic() > ends:
                raise JobFailure(
                    f"The version was not loaded after {DEADLINE_SECONDS:.0f} s.", "UNSUPPORTED"
                ) from None
    if process.returncode == 0 and said:
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found
    if process.returncode == -9:
        raise JobFailure(
            "The process that loaded the version was killed, as if memory had run out; give the job more.",
            "OUT_OF_MEMORY",
        )
    raise JobFailure(
        f"The process that loaded the version ended with status {process.returncode}.", "UNSUPPORTED"
    )


def main() -> None:
    """Measure in this process; the question comes as JSON on the standard input."""
    question = json.loads(sys.stdin.buffer.read())
    # What the model prints must not look like the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    manifest = json_format.ParseDict(
        question["manifest"], manifest_pb2.Manifest(), ignore_unknown_fields=True
    )
    try:
        found = dataclasses.asdict(_measure(question, manifest))
    except JobFailure as failure:
        found = {"failure": str(failure), "cause": failure.cause}
    except ModelError as error:
        found = {"failure": error.message, "cause": "UNSUPPORTED"}
    print(json.dumps(found), file=answers, flush=True)


def _measure(question: dict[str, Any], manifest: manifest_pb2.Manifest) -> Footprint:
    directory = Path(question["directory"])
    for entry in importlib.metadata.entry_points(group=RUNTIMES, name=manifest.runtime):
        warm_up = getattr(importlib.import_module(entry.module), "warm_up", None)
        if warm_up is not None:
            warm_up()
    for path in directory.rglob("*"):
        if path.is_file():
            _read(path)
    gc.collect()
    before = memory_of(os.getpid())
    start = time.perf_counter()
    opened = open_version(
        directory,
        manifest,
        name=question["name"],
        devices=question["devices"],
        allow_python_runtime=question["allow_python_runtime"],
        allow_compiled_models=question["allow_compiled_models"],
    )
    opened.predict(drawn_inputs(opened.signature, 1))
    seconds = time.perf_counter() - start
    inputs = drawn_inputs(opened.signature, opened.max_rows)
    for _ in range(_CALLS):
        opened.predict(inputs)
    own = max(0, memory_of(os.getpid()) - before)
    gpu = 0
    if any(device.startswith("cuda") for device in question["devices"]):
        import torch

        gpu = torch.cuda.max_memory_reserved()
    return Footprint(seconds, own, gpu)


def _read(path: Path) -> None:
    """Bring a file into the page cache: a cached bundle was just written or is in use."""
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


if __name__ == "__main__":
    main()
