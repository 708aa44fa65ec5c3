"""Groups of ranks that train small models on digits with any strategy, and what they came to.

A group of processes takes several cases in turn, as starting it costs seconds. `run_case` alone is what one
process does, for what the others are compared with.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import json_format
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_worker.adapters.training.chain import Chain
from penstock_worker.adapters.training.rows import TensorRows
from penstock_worker.adapters.training.strategies import Parts, Strategy, open_strategy
from penstock_worker.usecases.job_context import JobFailure
from support.job_context import FileJobContext

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        strategy: As the proto's JSON.
        model: Which of `MODELS`.
        optimizer: Of torch.optim.
        options: Its arguments.
        steps: How many.
        batch_size: Rows of a global batch.
        clip: Norm of the gradient at most.
        weighted: Whether classes differ in weight.
        save: A checkpoint after the last step goes there.
        load: A checkpoint that it begins with.
        precision: What is computed in.
        rows: Of digits, to train on.
    """

    strategy: dict[str, Any] = field(default_factory=dict)
    model: str = "mlp"
    optimizer: str = "AdamW"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3})
    steps: int = 20
    batch_size: int = 32
    clip: float = 0.0
    weighted: bool = False
    save: str = ""
    load: str = ""
    precision: str = "fp32"
    rows: int = 1400


@dataclass(frozen=True)
class Result:
    """What came out, at rank 0.

    Attributes:
        weights: State of the whole model.
        accuracy: On rows held out.
        held_out: How many of them were measured.
        losses: What the votes said, in order.
        failure: Words and cause, if the job cannot be done.
        seconds: What the steps took.
        facts: What else a strategy's ranks say of themselves.
    """

    weights: dict[str, Tensor]
    accuracy: float = math.nan
    held_out: float = math.nan
    losses: Sequence[float] = ()
    failure: tuple[str, str] | None = None
    seconds: float = math.nan
    facts: Sequence[dict[str, Any]] = ()


class CrossEntropy:
    """Cross entropy of classes, or of the next token at each place."""

    def __init__(self, class_weights: Tensor | None, per_row: float) -> None:
        self._weights = class_weights
        self._per_row = per_row

    @property
    def row_weight(self) -> float | None:
        return self._per_row if self._weights is None else None

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        flat = outputs.float().reshape(-1, outputs.shape[-1])
        return functional.cross_entropy(flat, targets.reshape(-1), weight=self._weights, reduction="sum")

    def weight(self, targets: Tensor) -> Tensor:
        if self._weights is None:
            return torch.tensor(float(targets.numel()))
        return self._weights[targets].sum()


def mlp() -> Chain:
    return Chain(
        [
            nn.Sequential(nn.Linear(64, 96), nn.GELU()),
            nn.Sequential(nn.Linear(96, 64), nn.GELU()),
            nn.Sequential(nn.Linear(64, 48), nn.GELU()),
            nn.Linear(48, 10),
        ]
    )


MODELS = {"mlp": mlp}


def digits(rows: int) -> tuple[TensorRows, TensorRows]:
    """Digits to train on, and those held out."""
    inputs, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(targets))
    x = torch.tensor(inputs[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(targets[order], dtype=torch.int64)
    return TensorRows(x[:rows], y[:rows], CPU), TensorRows(x[1400:], y[1400:], CPU)


def batches(rows: int, batch_size: int, start: int) -> Iterator[Tensor]:
    """Global batches from a step on, forever; the last one of each epoch is smaller."""
    per_epoch = math.ceil(rows / batch_size)
    step = start
    while True:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
        yield order[place * batch_size : (place + 1) * batch_size]
        step += 1


def parts_of(case: Case) -> tuple[Parts, TensorRows]:
    train, held_out = digits(case.rows)

    def build_model() -> Chain:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return MODELS[case.model]()

    def build_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, case.optimizer)
        made: torch.optim.Optimizer = kind(parameters, **case.options)
        return made

    weights = torch.linspace(0.5, 2.0, 10) if case.weighted else None
    parts = Parts(
        build_model=build_model,
        build_optimizer=build_optimizer,
        objective=CrossEntropy(weights, 1.0),
        rows=train,
        batch_size=case.batch_size,
        clip_gradient_norm=case.clip,
        precision=case.precision,
    )
    return parts, held_out


def run_case(case: Case, context: FileJobContext) -> Result:
    """Train in this rank."""
    parts, held_out = parts_of(case)
    spec = json_format.ParseDict(case.strategy, job_work_pb2.Strategy())
    try:
        strategy = open_strategy(spec, context, parts)
    except JobFailure as failure:
        return Result({}, failure=(str(failure), failure.cause))
    try:
        return _train(case, strategy, held_out)
    finally:
        strategy.close()


def _train(case: Case, strategy: Strategy, held_out: TensorRows) -> Result:
    if case.load:
        assert strategy.load(Path(case.load)) == {"words": "kept"}
    losses = []
    order = batches(case.rows, case.batch_size, strategy.steps)
    begin = time.perf_counter()
    for step in range(1, case.steps + 1):
        strategy.step(next(order), rate=1.0 / (1.0 + 0.02 * strategy.steps))
        decision = strategy.agree(now=step == case.steps)
        if decision.loss is not None:
            losses.append(decision.loss)
    seconds = time.perf_counter() - begin
    if case.save:
        done: list[bool] = []
        Path(case.save).mkdir(exist_ok=True)
        strategy.save(Path(case.save), {"words": "kept"}, lambda: done.append(True))
        strategy.settle()
        assert done == [True]

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor([float((outputs.argmax(-1) == targets).sum()), float(len(targets))])

    sums = strategy.evaluate(held_out, 50, score, 2)
    weights = strategy.weights()
    return Result(
        weights or {},
        accuracy=float(sums[0] / sums[1]),
        held_out=float(sums[1]),
        losses=losses,
        seconds=seconds,
    )


def alone(case: Case, root: Path) -> Result:
    """Run a case in this process."""
    threads = torch.get_num_threads()
    try:
        return run_case(case, FileJobContext(root, job_pb2.Job(name="jobs/alone")))
    finally:
        torch.set_num_threads(threads)


def together(root: Path, ranks: int, cases: Sequence[Case], timeout: float = 100) -> list[Result]:
    """Run cases in turn in one group of ranks; their exit codes must be 0."""
    with started(root, ranks, cases) as processes:
        deadline = time.monotonic() + timeout
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    outputs = [(root / f"output.{rank}.txt").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(outputs)
    return [_read(root, number) for number in range(len(cases))]


@contextmanager
def started(root: Path, ranks: int, cases: Sequence[Case]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a group that takes these cases; what still runs at the end is killed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in cases]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "PORTS": json.dumps(ports),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            with (root / f"output.{rank}.txt").open("ab") as output:
                command = [sys.executable, "-W", "error", "-m", "support.strategy_ranks", str(root)]
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(30)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference between weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _read(root: Path, number: int) -> Result:
    found = json.loads((root / f"result.{number}.json").read_text())
    weights = load_file(root / f"result.{number}.safetensors")
    failure = tuple(found.pop("failure") or ()) or None
    return Result(weights, failure=failure, **found)


def main() -> None:
    """One rank of a group."""
    root = Path(sys.argv[1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ports = json.loads(os.environ["PORTS"])
    for number, found in enumerate(json.loads((root / "cases.json").read_text())):
        os.environ["MASTER_PORT"] = str(ports[number])
        context = FileJobContext(
            root / "job", job_pb2.Job(name="jobs/together"), rank=rank, world_size=size, local_rank=rank
        )
        result = run_case(Case(**found), context)
        if rank == 0:
            save_file(
                {name: value.clone() for name, value in result.weights.items()},
                root / f"result.{number}.safetensors",
            )
            said = {name: value for name, value in vars(result).items() if name != "weights"}
            (root / f"result.{number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
