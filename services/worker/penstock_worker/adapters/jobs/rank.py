"""What runs in a rank: the work of a job, from its entry point to the word on how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import random
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from penstock_kit.errors import InvalidArgument, PenstockError, Unavailable
from penstock_worker.adapters.jobs import limits
from penstock_worker.adapters.jobs.config import LauncherConfig
from penstock_worker.adapters.jobs.disk import full_disk
from penstock_worker.adapters.jobs.line import Line
from penstock_worker.domain.task import End, EndKind, megabytes
from penstock_worker.usecases.job_context import JobContext, JobFailure, Stopped

# Exit statuses, from sysexits.h: EX_SOFTWARE, EX_UNAVAILABLE, EX_TEMPFAIL.
EXIT_FAILED = 70
EXIT_PEERS_LOST = 69
EXIT_STOPPED = 75

LAST_LINES = 12
LAST_CHARACTERS = 1_500
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory", "bad_alloc")
# What gloo, NCCL and torch's store say when a rank at the other end has gone.
_PEERS_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to connect",
    "Socket Timeout",
    "Timed out waiting",
    "NCCL",
    "Gloo connectFullMesh failed",
    "rendezvous",
)


def become_rank(
    config: LauncherConfig,
    environment: Mapping[str, str],
    *,
    local: int,
    generation: int,
    parent: int,
    outputs: tuple[int, int],
    mark: str,
) -> NoReturn:
    """Turn a freshly forked process into a rank and run it to its end.

    Args:
        config: Of the task.
        environment: What torch.distributed wants to know.
        local: Number of the rank on this node.
        generation: Times that ranks were started before.
        parent: The launcher.
        outputs: Descriptors for the standard output and error.
        mark: By which what it starts is known.
    """
    status = EXIT_FAILED
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if not limits.die_with_parent(parent):
            os._exit(EXIT_FAILED)
        limits.offer_to_killer()
        for target, fd in enumerate(outputs, start=1):
            os.dup2(fd, target)
            os.close(fd)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable(all_threads=True)
        os.environ.update(_environment(config, environment, local, mark))
        _new_randomness()
        gc.enable()
        status = run_rank(config, local=local, generation=generation)
    except BaseException:  # noqa: BLE001 - the end of the process: all that is left is to say why
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run_rank(config: LauncherConfig, *, local: int, generation: int) -> int:
    """Do the work; tell the desk how it ended, and return the exit status that says the same."""
    # Imported here: the fork server loads this module, and must not load what only ranks need.
    from penstock_worker.adapters.jobs.context import RankContext

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(config.threads)
    number = int(os.environ.get("RANK", "0"))
    line = Line(config.desk, config.token, number, generation)
    context = RankContext(config, line, local=local)
    signal.signal(signal.SIGTERM, context.ask_to_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        end = work(config, context)
    finally:
        context.close()
    line.call("end", end=end.to_fields())
    line.close()
    return {
        EndKind.SUCCEEDED: 0,
        EndKind.STOPPED: EXIT_STOPPED,
        EndKind.PEERS_LOST: EXIT_PEERS_LOST,
        EndKind.FAILED: EXIT_FAILED,
    }[end.kind]


def work(config: LauncherConfig, context: JobContext) -> End:
    """Call the entry point; whatever it raises becomes an end with words for people."""
    module, _, function = config.entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(context)
    except Stopped as stopped:
        return End(EndKind.STOPPED, str(stopped))
    except SystemExit as error:
        if error.code in (None, 0):
            return End(EndKind.SUCCEEDED)
        return End(EndKind.FAILED, f"It ended with status {error.code}.", "USER_CODE", permanent=False)
    except BaseException as error:  # noqa: BLE001 - every end of the work is told
        end = end_of(error, config.memory_bytes, user_code=config.user_code, directory=Path(config.directory))
        if end.kind is EndKind.FAILED and not isinstance(error, JobFailure):
            traceback.print_exc()
        return end
    return End(EndKind.SUCCEEDED)


def end_of(
    error: BaseException, memory_bytes: int, *, user_code: bool = False, directory: Path | None = None
) -> End:
    """Return what an exception out of the work means.

    Args:
        error: It.
        memory_bytes: What the task was given.
        user_code: The work is a program of a user's.
        directory: Where the job writes.
    """
    if isinstance(error, JobFailure):
        return End(EndKind.FAILED, str(error), error.cause, permanent=error.permanent)
    chain = list(_chain(error))
    if full := full_disk(chain, directory):
        return End(EndKind.FAILED, full, "OUT_OF_DISK", permanent=False)
    words = str(error)
    if any(_lacked_memory(one) for one in chain):
        return End(
            EndKind.FAILED,
            f"Out of memory: {_short(words) or 'no more could be had'}. The task was given "
            f"{megabytes(memory_bytes)}; ask for more, or make batches or the model smaller.",
            "OUT_OF_MEMORY",
            permanent=True,
        )
    if any(_lost_peers(one) for one in chain):
        return End(EndKind.PEERS_LOST, _short(words))
    if isinstance(error, Unavailable):
        return End(EndKind.FAILED, words, "UNAVAILABLE", permanent=False)
    if isinstance(error, PenstockError):
        # What is refused for what it is would be refused again, after all the work.
        refused = isinstance(error, InvalidArgument)
        return End(EndKind.FAILED, words, error.reason.name, permanent=refused)
    return End(
        EndKind.FAILED,
        last_words(error),
        "USER_CODE" if user_code else "ERROR",
        permanent=False,
    )


def last_words(error: BaseException) -> str:
    """Return the exception and the last lines of its traceback."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    tail = "\n".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:]
    return f"{type(error).__name__}: {_short(str(error))}\n{tail}"


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _lacked_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _lost_peers(error: BaseException) -> bool:
    if type(error).__name__ in {"DistNetworkError", "DistStoreError", "DistBackendError"}:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _PEERS_LOST)


def _short(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first[:400]


def _environment(config: LauncherConfig, given: Mapping[str, str], local: int, mark: str) -> dict[str, str]:
    threads = str(config.threads)
    found = {
        **given,
        limits.MARK_VARIABLE: mark,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }
    if config.ranks > 1 or config.tasks > 1:
        found |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(config.ranks)}
        if config.tasks == 1 or config.host.startswith("127."):
            # What stays on this machine needs no name of it that others could look up.
            found["GLOO_SOCKET_IFNAME"] = "lo"
    return found


def _new_randomness() -> None:
    """All ranks would otherwise draw the same random numbers as the fork server left them."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
