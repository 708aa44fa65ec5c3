"""Checkpoints in pieces: each rank writes what it holds, and any number of ranks reads them again.

torch.distributed.checkpoint plans who writes what (what several ranks hold equally is written once, by turns)
and cuts pieces anew on reading. The files are safetensors, so taking up a checkpoint unpickles nothing.

    save    copy ──▶ write in a thread, with a group of its own ──▶ done ──▶ `written` is called by the loop
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from penstock_worker.adapters.training.strategies.group import Group
from penstock_worker.usecases.job_context import JobFailure

_EXTRA = "extra"
# How long a group that ends waits for its checkpoint.
_LAST_SECONDS = 20.0


class Checkpoints:
    """Writes one checkpoint at a time in the background, and reads them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        if group.size == 1:
            # Here rather than around each call, which is made in a thread and would change what others see.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._written: Callable[[], None] | None = None

    @property
    def writing(self) -> bool:
        """Whether one is being written."""
        return self._pending is not None

    def save(
        self,
        directory: Path,
        state: Mapping[str, Tensor],
        extra: Mapping[str, Any],
        written: Callable[[], None],
    ) -> None:
        """Copy a state and begin to write it; the one before is waited for."""
        self.settle(300.0)
        copy = {name: value.detach().clone() for name, value in state.items()}
        if self._group.rank == 0:
            copy[_EXTRA] = torch.frombuffer(bytearray(json.dumps(extra).encode()), dtype=torch.uint8)
        self._written = written
        self._pending = self._thread.submit(self._write, directory, copy)

    def settle_if_written(self) -> None:
        """Say that the checkpoint is written, if it is by now."""
        if self._pending is not None and self._pending.done():
            self.settle(0.0)

    def settle(self, timeout: float) -> None:
        """Wait until it is written, in seconds at most, and say so."""
        if self._pending is None:
            return
        self._pending.result(timeout)
        written, self._pending, self._written = self._written, None, None
        if written is not None:
            written()

    def described(self, directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give shape and dtype of each tensor of a checkpoint."""
        found = dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        return {name: (tuple(value.size), value.properties.dtype) for name, value in found.items()}

    def load(self, directory: Path, state: dict[str, Tensor]) -> dict[str, Any]:
        """Fill tensors from a checkpoint, in place, and give what was saved beside them."""
        (length,), _ = self.described(directory)[_EXTRA]
        wanted = {**state, _EXTRA: torch.empty(length, dtype=torch.uint8)}
        dcp.load(
            wanted,
            storage_reader=dcp.HuggingFaceStorageReader(str(directory)),
            process_group=self._group.writing,
            no_dist=self._group.size == 1,
        )
        extra: dict[str, Any] = json.loads(bytes(wanted[_EXTRA].tolist()))
        return extra

    def close(self) -> None:
        """Begin nothing more, and let what is being written end: by itself, or as its peers are gone."""
        if self._pending is not None:
            wait([self._pending], _LAST_SECONDS)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(self, directory: Path, state: dict[str, Tensor]) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
        try:
            dcp.save(
                state,
                storage_writer=writer,
                process_group=self._group.writing,
                no_dist=self._group.size == 1,
            )
        except (OSError, dcp.CheckpointException) as error:
            if _no_room(error):
                raise JobFailure(
                    f"There is no room for a checkpoint in {directory}: {error}",
                    "OUT_OF_DISK",
                    permanent=False,
                ) from error
            raise


def _no_room(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
