"""Runs a training program of a user's in this rank, behind `penstock.training`.

The rank is a process of its own, with a lower priority, a bounded log, a watch over memory and processes, and
a clean environment. It is not a wall: the program may do what this user of the machine may. That is why an
operator has to allow it.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import runpy
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from google.protobuf.json_format import MessageToDict

from penstock import training
from penstock.packaging import PackageOptions, open_bundle
from penstock_kit.errors import InvalidArgument, PenstockError
from penstock_worker.adapters.jobs import limits
from penstock_worker.domain.task import EndKind
from penstock_worker.usecases.job_context import FetchedDataset, JobContext, JobFailure, Stopped

ENTRYPOINT = "train.py"
LAST_LINES = 12
LAST_CHARACTERS = 1_500
STATE_FILE = "rank-{}.pt"
# What a program keeps of the environment; all else (tokens, addresses) is not its business.
KEPT = (
    "PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
    "TOKENIZERS_PARALLELISM", limits.MARK_VARIABLE,
)  # fmt: skip
KEPT_PREFIXES = ("TORCHELASTIC_", "OMP_", "MKL_", "OPENBLAS_")
# Mistakes of a program that it would make again.
_MISTAKES = (SyntaxError, ImportError, NameError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True, slots=True)
class _Dataset:
    """See `penstock.training.Dataset`."""

    fetched: FetchedDataset
    default_seed: int
    scratch: Path

    @property
    def name(self) -> str:
        """See `penstock.training.Dataset`."""
        return self.fetched.artifact.name

    @property
    def path(self) -> Path:
        """See `penstock.training.Dataset`."""
        return self.fetched.path

    @property
    def format(self) -> str:
        """See `penstock.training.Dataset`."""
        return self.fetched.artifact.format

    @property
    def description(self) -> Mapping[str, Any]:
        """See `penstock.training.Dataset`."""
        found: dict[str, Any] = MessageToDict(self.fetched.artifact.description)
        return found

    def open(self, **options: Any) -> Any:
        """See `penstock.training.Dataset`."""
        from penstock_worker.adapters.data import open_dataset

        return open_dataset(self.fetched, **{"seed": self.default_seed, "scratch": self.scratch, **options})


class ScriptSession:
    """Implements `penstock.training.Session` with a job's context.

    Args:
        context: Of this rank.
    """

    def __init__(self, context: JobContext) -> None:
        self.published = ""
        self.checkpoints = 0
        self.failure: JobFailure | None = None
        self._context = context
        self._work = context.job.train

    def parameters(self) -> dict[str, Any]:
        """See `Session`."""
        found = MessageToDict(self._work.script.parameters)
        return {name: _whole(value) for name, value in found.items()}

    def seed(self) -> int:
        """See `Session`."""
        return int(self._work.seed)

    def rank(self) -> int:
        """See `Session`."""
        return self._context.rank

    def world_size(self) -> int:
        """See `Session`."""
        return self._context.world_size

    def device(self) -> str:
        """See `Session`."""
        devices = self._context.devices
        return devices[self._context.local_rank % len(devices)]

    def dataset(self, name: str) -> training.Dataset:
        """See `Session`."""
        fetched = self._context.dataset(name or self._work.dataset)
        return _Dataset(fetched, self.seed(), self._context.scratch)

    def progress(self, done: int, total: int, unit: str, phase: str) -> None:
        """See `Session`."""
        self._context.progress(done, total, unit, phase)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Session`."""
        self._context.metrics(step, {name: float(value) for name, value in metrics.items()})

    def log(self, text: str) -> None:
        """See `Session`."""
        self._context.log(str(text))

    def should_stop(self) -> bool:
        """See `Session`."""
        return _any_rank(self._context.should_stop())

    def checkpoint_due(self) -> bool:
        """See `Session`."""
        return _any_rank(self._context.rank == 0 and self._context.checkpoint_due())

    def checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """See `Session`."""
        import torch

        directory = self._context.new_checkpoint(step)
        torch.save(dict(state), directory / STATE_FILE.format(self._context.rank))
        self._context.commit_checkpoint(step)
        self.checkpoints += 1

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """See `Session`."""
        import torch

        last = self._context.last_checkpoint()
        if last is None:
            return None
        step, directory = last
        own = directory / STATE_FILE.format(self._context.rank)
        path = own if own.exists() else directory / STATE_FILE.format(0)
        return step, dict(torch.load(path, map_location=self.device(), weights_only=True))

    def save(
        self, model: Any, examples: Sequence[Any], metrics: Mapping[str, float], description: str
    ) -> str:
        """See `Session`."""
        if self._context.rank:
            return ""
        import torch

        given = tuple(example.detach().cpu() for example in examples)
        if not given or any(example.dim() == 0 or example.shape[0] < 2 for example in given):
            raise InvalidArgument("examples are one tensor for each input, with at least 2 rows.")
        directory = self._fresh("model")
        batch = torch.export.Dim("batch", min=1)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(
                    model.eval().cpu(), given, dynamic_shapes=tuple({0: batch} for _ in given)
                )
                torch.export.save(program, directory / "model.pt2")
        except PenstockError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines()
            raise InvalidArgument(
                f"The model cannot be exported with torch.export: {first[0] if first else error!r}. See "
                "torch's documentation of torch.export, or save files with training.save_files."
            ) from error
        return self._publish(
            directory / "model.pt2",
            PackageOptions(metrics=metrics, description=description, operation="train"),
        )

    def save_files(
        self, path: Path, inputs: Sequence[str], outputs: Sequence[str], metrics: Mapping[str, float]
    ) -> str:
        """See `Session`."""
        if self._context.rank:
            return ""
        options = PackageOptions(inputs=inputs, outputs=outputs, metrics=metrics, operation="train")
        return self._publish(path.absolute(), options)

    def fail(self, message: str, permanent: bool) -> NoReturn:
        """See `Session`."""
        self.failure = JobFailure(message, "USER_CODE", permanent=permanent)
        raise self.failure

    def _publish(self, path: Path, options: PackageOptions) -> str:
        """Upload a model as a version, with the job's dataset in its lineage."""
        with open_bundle(path, options) as bundle:
            directory = self._fresh("bundle")
            for file in bundle.files:
                target = directory / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.source, target)
            manifest = bundle.manifest
            manifest.lineage.operation = "train"
            if self._work.dataset:
                manifest.lineage.datasets.append(self._work.dataset)
            for name, value in self.parameters().items():
                manifest.lineage.parameters[name] = str(value)
            self.published = self._context.publish_version(self._work.model, directory, manifest)
        return self.published

    def _fresh(self, name: str) -> Path:
        for at in range(1000):
            directory = self._context.scratch / f"penstock-{name}-{at}"
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                return directory
        raise InvalidArgument("A job saves its model once, not a thousand times.")


def run_script(context: JobContext) -> None:
    """Run the program of a job of training (`context.job.train.script`).

    Raises:
        JobFailure: The program is not there (INVALID_RECIPE), failed (USER_CODE), or ended without a model
            (NO_MODEL).
        Stopped: It was asked to stop.
    """
    script = context.job.train.script
    code = context.dataset(script.code).path
    entrypoint = code / (script.entrypoint or ENTRYPOINT)
    if not entrypoint.is_file():
        raise JobFailure(
            f"The code has no file {script.entrypoint or ENTRYPOINT}; it has "
            f"{', '.join(sorted(path.name for path in code.iterdir())[:10])}.",
            "INVALID_RECIPE",
        )
    session = ScriptSession(context)
    began = time.monotonic()
    _confine(context.scratch, code)
    training.bind(session)
    try:
        stopped = _run(entrypoint, context.scratch)
    finally:
        training.bind(None)
    if context.rank == 0 and not session.checkpoints:
        seconds = time.monotonic() - began
        if stopped or context.should_stop():
            context.log("The program has written no checkpoint: it begins anew when the job goes on.")
        elif context.checkpoint_due():
            context.log(
                f"The program wrote no checkpoint in {seconds:.0f} s; a failure would have cost all of that. "
                "See penstock.training.checkpoint."
            )
    if stopped or (context.should_stop() and not session.published):
        raise Stopped
    if context.rank == 0 and not session.published:
        raise JobFailure(
            "The program ended without a model. Call penstock.training.save(model, examples=…), or "
            "save_files(path), before it ends.",
            "NO_MODEL",
        )


def _run(entrypoint: Path, scratch: Path) -> bool:
    """Run the program to its end; true if it stopped because it was asked to.

    Raises:
        JobFailure: It failed.
        MemoryError, OSError, RuntimeError: What the machine or other ranks are to blame for.
    """
    try:
        runpy.run_path(str(entrypoint), run_name="__main__")
    except training.Stopped:
        return True
    except SystemExit as error:
        if error.code not in (None, 0):
            raise JobFailure(
                f"The program ended with status {error.code}.", "USER_CODE", permanent=False
            ) from error
    except (JobFailure, MemoryError, OSError):
        raise
    except BaseException as error:
        from penstock_worker.adapters.jobs.rank import end_of

        if isinstance(error, RuntimeError):
            end = end_of(error, 0, user_code=True, directory=scratch)
            if end.kind is EndKind.PEERS_LOST or end.cause in {"OUT_OF_MEMORY", "OUT_OF_DISK"}:
                raise
        traceback.print_exc()
        raise JobFailure(
            last_words(error, entrypoint.parent), "USER_CODE", permanent=isinstance(error, _MISTAKES)
        ) from error
    return False


def last_words(error: BaseException, code: Path) -> str:
    """Return an exception and the last lines of its traceback, from the program's own first frame on."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((at for at, frame in enumerate(frames) if Path(frame.filename).is_relative_to(code)), 0)
    lines = "".join(
        f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: "
        f"{linecache.getline(frame.filename, frame.lineno or 0).strip()}\n"
        for frame in frames[own:]
    ).splitlines()
    tail = "\n".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:]
    return f"{type(error).__name__}: {str(error)[:400]}\n{tail}"


def _confine(scratch: Path, code: Path) -> None:
    """Give the program its limits, a directory to write to, and an environment of its own."""
    limits.confine_user_code()
    for name in list(os.environ):
        if name not in KEPT and not name.startswith(KEPT_PREFIXES):
            del os.environ[name]
    os.environ |= {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.argv = [ENTRYPOINT]
    sys.path.insert(0, str(code))
    os.chdir(scratch)


def _any_rank(said: bool) -> bool:
    """Return whether any rank says so; a collective operation where there is a group."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return said
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([float(said)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item() > 0)


def _whole(value: Any) -> Any:
    """Numbers come as floating point out of a Struct; whole ones are meant as int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value
