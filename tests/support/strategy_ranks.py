"""Groups of ranks that train small models on digits with any strategy, and what they came to.

A group of processes takes several cases in turn, as starting it costs seconds. `run_case` alone is what one
process does, for what the others are compared with.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
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
import torch.distributed as dist
from google.protobuf import json_format
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.adapters.training.chain import Chain
from penstock_worker.adapters.training.objective import CrossEntropy
from penstock_worker.adapters.training.rows import TensorRows
from penstock_worker.adapters.training.strategies import Parts, Strategy, open_strategy
from penstock_worker.usecases.job_context import JobFailure
from support.job_context import FileJobContext


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
        micro: Rows that are computed at once.
        slow: Seconds that each step takes longer in one rank.
        slow_rank: Which.
        gpus: GPUs that ranks compute on; 0 for the CPU.
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
    micro: int = 0
    slow: float = 0.0
    slow_rank: int = 1
    gpus: int = 0


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
        notes: What the strategy says.
        lead: Steps that one worker was ahead of another; the most that any rank saw.
    """

    weights: dict[str, Tensor]
    accuracy: float = math.nan
    held_out: float = math.nan
    losses: Sequence[float] = ()
    failure: tuple[str, str] | None = None
    seconds: float = math.nan
    notes: Sequence[str] = ()
    lead: int = 0


_BLUEPRINTS = {
    "mlp": Blueprint(
        "tabular", "mlp", {"hidden": (96, 64, 48), "activation": "gelu", "dropout": 0.0}, 10, (("x", (64,)),)
    ),
    "cnn": Blueprint(
        "image", "cnn", {"channels": (8, 16), "hidden": 32, "dropout": 0.0}, 10, (("x", (8, 8)),)
    ),
    "vit": Blueprint(
        "image",
        "vit",
        {"patch": 2, "width": 32, "heads": 4, "layers": 2, "dropout": 0.0},
        10,
        (("x", (8, 8)),),
    ),
    # The pixels of a digit as a text of 64 letters.
    "transformer": Blueprint(
        "text",
        "transformer",
        {"width": 32, "heads": 4, "layers": 2, "length": 64, "dropout": 0.0},
        10,
        (("x", (-1,)),),
        vocabulary=18,
    ),
    "gpt": Blueprint(
        "language_model",
        "gpt",
        {"width": 32, "heads": 4, "layers": 2, "length": 63, "dropout": 0.0},
        20,
        (("x", (-1,)),),
        vocabulary=20,
    ),
}
MODELS = tuple(_BLUEPRINTS)


class SlowRows:
    """Rows that one rank must wait for, as if it computed more slowly."""

    def __init__(self, rows: TensorRows, seconds: float) -> None:
        self._rows, self._seconds = rows, seconds

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self._seconds)
        return self._rows.batch(indices)


def digits(model: str, rows: int, device: torch.device) -> tuple[TensorRows, TensorRows]:
    """Digits to train on, and those held out, as a model takes them."""
    inputs, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(targets))
    x = torch.tensor(inputs[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(targets[order], dtype=torch.int64)
    if model in {"cnn", "vit"}:
        x = x.view(-1, 8, 8)
    elif model in {"transformer", "gpt"}:
        # Letter 0 fills up: darkest pixels are none.
        x = (x * 16).round().to(torch.int64)
        if model == "gpt":
            x, y = x[:, :-1], x[:, 1:]
    return TensorRows(x[:rows], y[:rows], device), TensorRows(x[1400:], y[1400:], device)


def batches(rows: int, batch_size: int, start: int) -> Iterator[Tensor]:
    """Global batches from a step on, forever; the last one of each epoch is smaller."""
    per_epoch = math.ceil(rows / batch_size)
    step = start
    while True:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
        yield order[place * batch_size : (place + 1) * batch_size]
        step += 1


def parts_of(case: Case, rank: int) -> tuple[Parts, TensorRows]:
    rows: TensorRows | SlowRows
    device = torch.device("cuda", rank % case.gpus) if case.gpus else torch.device("cpu")
    rows, held_out = digits(case.model, case.rows, device)

    if case.slow and rank == case.slow_rank:
        rows = SlowRows(rows, case.slow)

    def build() -> Chain:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return build_model(_BLUEPRINTS[case.model])

    def build_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, case.optimizer)
        made: torch.optim.Optimizer = kind(parameters, **case.options)
        return made

    weights = torch.linspace(0.5, 2.0, 10, device=device) if case.weighted else None
    parts = Parts(
        build_model=build,
        build_optimizer=build_optimizer,
        objective=CrossEntropy(weights, 63 if case.model == "gpt" else 1),
        rows=rows,
        batch_size=case.batch_size,
        clip_gradient_norm=case.clip,
        precision=case.precision,
        micro_batch_size=case.micro,
    )
    return parts, held_out


def run_case(case: Case, context: FileJobContext) -> Result:
    """Train in this rank."""
    parts, held_out = parts_of(case, context.rank)
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
        return torch.tensor([float((outputs.argmax(-1) == targets).sum()), float(targets.numel())])

    sums = strategy.evaluate(held_out, 50, score, 2)
    weights = strategy.weights()
    return Result(
        weights or {},
        accuracy=float(sums[0] / sums[1]),
        held_out=float(sums[1]),
        losses=losses,
        seconds=seconds,
        notes=list(strategy.notes),
        lead=getattr(strategy, "lead", 0),
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
        codes = _exit_codes(processes, timeout)
    outputs = [(root / f"output.{rank}.txt").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(outputs)
    return [_read(root, number, ranks) for number in range(len(cases))]


def _exit_codes(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Wait until all have ended, or one has failed."""
    deadline = time.monotonic() + timeout
    for process in itertools.cycle(processes):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        codes = [one.poll() for one in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
    return []


@contextmanager
def started(root: Path, ranks: int, cases: Sequence[Case]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a group that takes these cases; what still runs at the end is killed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    # Where they meet, case by case, as an elastic agent has it.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "PORTS": json.dumps([store.port for store in stores]),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
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


def _read(root: Path, number: int, ranks: int) -> Result:
    said = [json.loads((root / f"result.{number}.{rank}.json").read_text()) for rank in range(ranks)]
    found = said[0] | {"lead": max(one["lead"] for one in said)}
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
        # Each group puts another one before it, and with it the rank before each line.
        sys.excepthook = sys.__excepthook__
        case = Case(**found)
        context = FileJobContext(
            root / "job",
            job_pb2.Job(name="jobs/together"),
            rank=rank,
            world_size=size,
            local_rank=rank,
            devices=[f"cuda:{gpu}" for gpu in range(case.gpus)] or ["cpu"],
        )
        result = run_case(case, context)
        said = {name: value for name, value in vars(result).items() if name != "weights"}
        (root / f"result.{number}.{rank}.json").write_text(json.dumps(said))
        if rank == 0:
            save_file(result.weights, root / f"result.{number}.safetensors")


if __name__ == "__main__":
    main()
