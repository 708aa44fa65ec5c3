"""What a training program of one's own (`train.py`) asks of Penstock while it runs as a job.

    from penstock import training

    parameters = training.parameters()                       # what the job was made with
    data = training.dataset()                                # data.path has files, data.open() tensors
    start, state = training.restore() or (0, None)           # where an earlier attempt came to
    for step in range(start, parameters["steps"]):
        …
        training.report(step, loss=loss)
        if training.checkpoint_due() or training.should_stop():
            training.checkpoint(step + 1, {"model": model.state_dict()})
        if training.should_stop():
            raise training.Stopped
    training.save(model, examples=(torch.zeros(2, 64),), metrics={"accuracy": 0.97})

In a group of ranks each rank runs the program, with torch.distributed's environment set: call
`torch.distributed.init_process_group("gloo")` (or "nccl") first. `should_stop`, `checkpoint_due` and
`checkpoint` are then called by all ranks at the same step; they agree by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from penstock.errors import FailedPrecondition

__all__ = [
    "Dataset",
    "Session",
    "Stopped",
    "bind",
    "checkpoint",
    "checkpoint_due",
    "dataset",
    "device",
    "fail",
    "log",
    "parameters",
    "progress",
    "rank",
    "report",
    "restore",
    "save",
    "save_files",
    "seed",
    "should_stop",
    "world_size",
]


class Stopped(Exception):
    """The program stops because it was asked to, after a checkpoint; the job goes on from there later."""


class Dataset(Protocol):
    """A dataset on this machine. Its files are read-only."""

    @property
    def name(self) -> str:
        """artifacts/{dataset}/versions/{version}."""

    @property
    def path(self) -> Path:
        """The directory of its files."""

    @property
    def format(self) -> str:
        """npz, csv, parquet, images or text."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What is known of the contents: rows, columns, classes, licence."""

    def open(self, **options: Any) -> Any:
        """Return it as the recipes see it.

        Args:
            options: task, label, features, held_out (0.2) and seed (the job's).

        Returns:
            An object whose `train` and `held_out` have `len()` and `batch(indices)`, which gives `inputs`
            (name → tensor) and `targets`; `classes` are the names of the labels.
        """


class Session(Protocol):
    """What stands behind the functions of this module. The worker makes one for each rank."""

    def parameters(self) -> dict[str, Any]:
        """The parameters of the job."""
        ...

    def seed(self) -> int:
        """The seed of the job."""
        ...

    def rank(self) -> int:
        """Which rank this is."""
        ...

    def world_size(self) -> int:
        """How many ranks there are."""
        ...

    def device(self) -> str:
        """The device of this rank."""
        ...

    def dataset(self, name: str) -> Dataset:
        """A dataset; the job's own for an empty name."""
        ...

    def progress(self, done: int, total: int, unit: str, phase: str) -> None:
        """How far it is."""
        ...

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        ...

    def log(self, text: str) -> None:
        """A line of the log."""
        ...

    def should_stop(self) -> bool:
        """Whether to stop."""
        ...

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due."""
        ...

    def checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint."""
        ...

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """Read the last one."""
        ...

    def save(
        self, model: Any, examples: Sequence[Any], metrics: Mapping[str, float], description: str
    ) -> str:
        """Export and upload a model."""
        ...

    def save_files(
        self, path: Path, inputs: Sequence[str], outputs: Sequence[str], metrics: Mapping[str, float]
    ) -> str:
        """Upload model files."""
        ...

    def fail(self, message: str, permanent: bool) -> NoReturn:
        """End the job as FAILED."""
        ...


_session: Session | None = None


def bind(session: Session | None) -> None:
    """Let the functions of this module speak to a session; called by whoever runs the program."""
    global _session
    _session = session


def _bound() -> Session:
    if _session is None:
        raise FailedPrecondition(
            "This program does not run as a job of Penstock. Start it with "
            "`penstock train DATASET --script DIRECTORY --model NAME`."
        )
    return _session


def parameters() -> dict[str, Any]:
    """Return the parameters of the job, as they were given; numbers without a fraction are int."""
    return _bound().parameters()


def seed() -> int:
    """Return the seed of the job. It is for the program to use."""
    return _bound().seed()


def rank() -> int:
    """Return which rank this is, from 0."""
    return _bound().rank()


def world_size() -> int:
    """Return how many ranks there are."""
    return _bound().world_size()


def device() -> str:
    """Return what torch calls the device of this rank, such as "cpu" or "cuda:0"."""
    return _bound().device()


def dataset(name: str = "") -> Dataset:
    """Fetch the job's dataset, or another one by its name; what is on this machine is not fetched again.

    Raises:
        PenstockError: It cannot be had.
    """
    return _bound().dataset(name)


def progress(done: int, total: int, unit: str = "steps", phase: str = "") -> None:
    """Say how far the training is. May be called as often as one likes."""
    _bound().progress(done, total, unit, phase)


def report(step: int, **metrics: float) -> None:
    """Record metrics of a step, not more than a few times a second."""
    _bound().report(step, metrics)


def log(text: str) -> None:
    """Write a line into the job's log. So does `print`."""
    _bound().log(text)


def should_stop() -> bool:
    """Tell whether the program is asked to write a checkpoint and raise `Stopped` now.

    It has some ten seconds for that. Cheap enough for every step; with several ranks it is a collective
    operation.
    """
    return _bound().should_stop()


def checkpoint_due() -> bool:
    """Tell whether the job's interval since the last checkpoint is over; a collective operation."""
    return _bound().checkpoint_due()


def checkpoint(step: int, state: Mapping[str, Any]) -> None:
    """Write down where the training is, so that it goes on from here after whatever happens.

    Args:
        step: Steps done.
        state: Tensors, numbers, strings, lists and dicts of them, such as state dicts, of this rank. What
            torch.load cannot read with weights_only=True is refused when it is restored.

    Raises:
        PenstockError: It cannot be kept, as on a full disk.
    """
    _bound().checkpoint(step, state)


def restore() -> tuple[int, dict[str, Any]] | None:
    """Return (step, state) of this rank at the last checkpoint; none at the beginning.

    After a change of the number of ranks, a rank that had no state gets that of rank 0.
    """
    return _bound().restore()


def save(
    model: Any,
    *,
    examples: Sequence[Any],
    metrics: Mapping[str, float] | None = None,
    description: str = "",
) -> str:
    """Make a trained torch model the result of the job (rank 0; others' calls do nothing).

    It is exported with torch.export; the first dimension of all inputs is the batch and may have any size.

    Args:
        model: A torch.nn.Module that takes tensors and gives tensors.
        examples: One tensor for each input, with at least 2 rows.
        metrics: Measured quality, such as {"accuracy": 0.97}.
        description: What it does, for people.

    Returns:
        models/{model}/versions/{version}, which becomes READY when the job succeeds; empty on other ranks.

    Raises:
        PenstockError: It cannot be exported or uploaded.
    """
    return _bound().save(model, examples, metrics or {}, description)


def save_files(
    path: str | Path,
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Make a model file or directory the result of the job, of any kind that `penstock push` takes.

    Args:
        path: The file or directory; its manifest.yaml goes before what the files say.
        inputs: Input tensors as "name:FP32:-1,64", where the files do not say them.
        outputs: Output tensors likewise.
        metrics: Measured quality.

    Returns:
        As `save`.

    Raises:
        PenstockError: It is no model that could be served, or cannot be uploaded.
    """
    return _bound().save_files(Path(path), inputs, outputs, metrics or {})


def fail(message: str, *, permanent: bool = True) -> NoReturn:
    """End the job as FAILED with words of one's own.

    Args:
        message: Why, for people.
        permanent: Starting again would meet the same.
    """
    _bound().fail(message, permanent)
