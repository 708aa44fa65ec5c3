"""A rank that is killed, or a node that is gone, costs a training no more than it did since its checkpoint.

torchrun starts the ranks, watches them and forms the group anew.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.scheduler.v1 import job_pb2
from support.job_context import FileJobContext, context_from_environment, save_setup
from support.training import example, job_for
from support.waiting import until

pytestmark = [pytest.mark.training, pytest.mark.timeout(150)]

RECIPE: dict[str, Any] = {
    "task": "image",
    "architecture": "mlp",
    "parameters": {"hidden": [96, 64, 48]},
    "epochs": 24,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "seed": 4,
}
STEPS_PER_EPOCH = 45


@contextmanager
def agent(root: Path, port: int, number: int, *, ranks: int, nodes: str) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun on one node."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "strategies"),
        *("--rdzv-conf", f"is_host={number == 0},last_call_timeout=1,join_timeout=60"),
        *("--max-restarts", "3", "--monitor-interval", "0.1", "--local-addr", "127.0.0.1"),
        *("-m", "support.job_context", str(root)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # A store for each group: in one that a group before has used are addresses of ranks that are gone.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with (root / f"output.{number}.txt").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill an agent and all its ranks, as a node that is gone does."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            one.send_signal(signal.SIGKILL)
    process.wait(30)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children():
        environment = child.environ()
        if "RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def prepared(root: Path, strategy: str, spread: dict[str, Any]) -> FileJobContext:
    """A job on digits in `root`, and the context that shows what comes of it."""

    def change(job: job_pb2.Job) -> None:
        for name, value in spread.items():
            setattr(job.train.recipe.strategy, name, value)

    dataset = example(root / "data", "sklearn:digits")
    job = job_for(dataset, change, strategy=strategy, **RECIPE)
    save_setup(root / "job", job, datasets={job.train.dataset: dataset}, checkpoint_seconds=0.3)
    return context_from_environment(root / "job")


def checkpoint_of(context: FileJobContext) -> int:
    found = context.last_checkpoint()
    return 0 if found is None else found[0]


def checked(context: FileJobContext, agents: Sequence[subprocess.Popen[bytes]], root: Path) -> None:
    """The job has come to its end, to the usual quality, and took up a checkpoint on its way."""
    codes = [process.wait(100) for process in agents]
    outputs = "".join(path.read_text() for path in sorted((root / "job").glob("output.*.txt")))
    said = [path.read_text() for path in sorted((root / "job").glob("failure.*.json"))]
    assert codes == [0] * len(agents), f"{outputs[-4000:]}\n{said}"
    (version,) = context.published()
    assert version.version.manifest.metrics["held_out/accuracy"] > 0.92
    done = [line["done"] for line in context.lines("progress")]
    assert done[-1] == RECIPE["epochs"] * STEPS_PER_EPOCH
    assert any("Going on from the checkpoint" in line["text"] for line in context.lines("log"))


@pytest.mark.parametrize(
    ("strategy", "spread", "ranks", "victim"),
    [
        ("ddp", {}, 2, 1),
        ("fsdp", {}, 2, 0),
        ("pipeline", {}, 2, 1),
        ("tensor_parallel", {}, 2, 1),
        ("parameter_server", {}, 3, 1),
        ("parameter_server", {}, 3, 2),
        ("parameter_server", {"asynchronous": True}, 3, 2),
    ],
)
def test_a_killed_rank_costs_what_was_done_since_the_last_checkpoint(
    strategy: str, spread: dict[str, Any], ranks: int, victim: int, tmp_path: Path, free_port: int
) -> None:
    context = prepared(tmp_path, strategy, spread)
    with agent(tmp_path / "job", free_port, 0, ranks=ranks, nodes="1") as process:
        until(lambda: checkpoint_of(context) > 0, 60)
        killed_after = checkpoint_of(context)
        ranks_of(process)[victim].send_signal(signal.SIGKILL)
        checked(context, [process], tmp_path)
    taken_up = [
        int(line["text"].split("step ")[1].split(",")[0])
        for line in context.lines("log")
        if "Going on from the checkpoint" in line["text"]
    ]
    # Nothing that a checkpoint had is done again.
    assert min(taken_up) >= killed_after


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "pipeline", "tensor_parallel", "parameter_server"])
def test_without_one_of_two_nodes_a_training_goes_on_smaller(
    strategy: str, tmp_path: Path, free_port: int
) -> None:
    context = prepared(tmp_path, strategy, {})
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(agent(tmp_path / "job", free_port, number, ranks=2, nodes="1:2"))
            for number in range(2)
        )
        until(lambda: checkpoint_of(context) > 0, 60)
        end(second)
        checked(context, [first], tmp_path)
    sizes = {path.name.split(".of.")[1] for path in (tmp_path / "job" / "checkpoints").glob("*.committed/*")}
    assert sizes == {"4", "2"}


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
