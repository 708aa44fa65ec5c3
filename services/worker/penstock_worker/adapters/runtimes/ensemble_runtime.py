"""Ensembles: graphs of other deployed models. Nothing is computed here; tensors are passed on.

The manifest's graph says it all: the bundle's file is what a person wrote, and is not read. The heavy parts
(grpc, an event loop in a thread) begin in `start`, in the replica process: the fork server must have neither.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence

import uvloop

from penstock_kit.errors import FailedPrecondition, PenstockError, Reason, Unavailable
from penstock_worker.domain.runtime import Bundle, Call, ConcurrentServable, Mesh
from penstock_worker.hotpath.ensemble import Ensemble

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 512
_CLOSE_SECONDS = 5.0
_BEGIN_SECONDS = 5.0


class EnsembleRuntime:
    """Prepares graphs."""

    formats = frozenset({"ensemble"})
    runs_bundle_code = False

    def load(self, bundle: Bundle, devices: Sequence[str]) -> ConcurrentServable:
        """Prepare the graph of a bundle. The parameter `concurrency` says how many requests run at once.

        Raises:
            FailedPrecondition: There is no graph, or `concurrency` is no number.
        """
        if not bundle.steps:
            raise FailedPrecondition("The manifest names no steps.", reason=Reason.MANIFEST_MISMATCH)
        text = bundle.parameters.get("concurrency", str(DEFAULT_LIMIT))
        if not text.isdecimal() or not 1 <= int(text) <= 65_536:
            raise FailedPrecondition(
                f"The parameter concurrency is {text!r}; use 1 to 65536.", reason=Reason.LOAD_FAILED
            )
        return EnsembleServable(bundle, int(text))


class EnsembleServable:
    """An ensemble on an event loop in a thread of its own.

    Args:
        bundle: Its graph and signature.
        limit: Requests that it runs at the same time.
    """

    def __init__(self, bundle: Bundle, limit: int) -> None:
        self.limit = limit
        self._bundle = bundle
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ensemble: Ensemble | None = None
        self._started = threading.Event()
        self._problem: PenstockError | None = None
        self._stopping: asyncio.Event | None = None

    def start(self, mesh: Mesh) -> None:
        """Connect, and wait for the first routes."""
        if not mesh.scheduler_address:
            raise FailedPrecondition(
                "An ensemble needs the scheduler's address to find its steps.", reason=Reason.LOAD_FAILED
            )
        self._thread = threading.Thread(target=self._run, args=(mesh,), name="ensemble", daemon=True)
        self._thread.start()
        self._started.wait()  # for as long as a replica may take to load: its agent keeps that time
        if self._problem is not None:
            raise self._problem

    def begin(self, calls: Sequence[Call], *, wait: bool = False) -> None:
        """Begin requests."""
        loop, ensemble = self._loop, self._ensemble
        if loop is None or ensemble is None:
            raise Unavailable("The ensemble has not been started.", reason=Reason.NOT_READY)
        loop.call_soon_threadsafe(ensemble.begin, calls)
        if wait:
            begun = threading.Event()
            loop.call_soon_threadsafe(begun.set)
            begun.wait(_BEGIN_SECONDS)

    def abandon(self, calls: Sequence[Call]) -> None:
        """Give up requests."""
        if self._loop is not None and self._ensemble is not None:
            self._loop.call_soon_threadsafe(self._ensemble.abandon, calls)

    def close(self) -> None:
        """End the loop."""
        if self._loop is None or self._stopping is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _run(self, mesh: Mesh) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(mesh))
        except PenstockError as error:
            self._problem = error
        except Exception as error:
            log.exception("the ensemble's loop failed")
            self._problem = Unavailable(f"The ensemble's loop failed: {error}")
        finally:
            self._started.set()

    async def _serve(self, mesh: Mesh) -> None:
        ensemble = Ensemble(self._bundle.steps, self._bundle.signature, mesh)
        async with ensemble.connected():
            self._loop = asyncio.get_running_loop()
            self._stopping = asyncio.Event()
            self._ensemble = ensemble
            self._started.set()
            await self._stopping.wait()
