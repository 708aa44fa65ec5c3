"""The replica process: one version of one deployment, served from its queue.

    LOADING ──▶ READY ──SIGTERM──▶ answers what is queued ──▶ STOPPED
       └── cannot load ──▶ FAILED

SIGUSR1 in place of SIGTERM leaves the queue to others at once: it answers what it has begun, and ends.
SIGKILL at any moment loses nothing: what was read and not answered goes to another replica.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

from penstock_kit.errors import PenstockError
from penstock_kit.oip import Codec
from penstock_kit.queue.ports import Reader
from penstock_kit.queue.reader import QueueReader
from penstock_kit.telemetry.logs import configure_logging
from penstock_worker.domain.replica import ProcessState, ProcessStatus, ReplicaConfig
from penstock_worker.domain.runtime import DeviceLost, Mesh
from penstock_worker.hotpath.answering import Answering, Tracer
from penstock_worker.hotpath.concurrent import ConcurrentServing
from penstock_worker.hotpath.execution import Outcome
from penstock_worker.hotpath.loading import Loaded, LoadedConcurrent, load
from penstock_worker.hotpath.serving import Serving
from penstock_worker.hotpath.statistics import Counters

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 1.0
_RETRY_SECONDS = 0.1
# A thread that holds the interpreter lets another have it after this long, instead of Python's 5 ms: the
# threads that read and answer must not wait for a model written in Python, nor the computing thread for them
# each time that torch gives it the interpreter back. With 1 ms a model of 5 ms answers a twentieth less.
_SWITCH_SECONDS = 0.0002


class _Terminated(BaseException):
    """SIGTERM came before there was anything to finish."""


def run_replica(config: ReplicaConfig) -> int:
    """Load a version and serve it until SIGTERM. Call it on the main thread of a process of its own.

    Returns:
        The exit status: 0 after SIGTERM, 1 if the version cannot be served.
    """
    configure_logging("penstock-replica", level=config.log_level.upper())
    logging.getLogger("penstock_worker").info(
        "replica starting",
        extra={"replica": config.replica, "model": config.model, "version": config.version},
    )
    status = _Status(config.status_fd)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGUSR1, _terminate)
        status.tell(ProcessState.LOADING)
        loaded = load(config)
        if isinstance(loaded, LoadedConcurrent):
            name = f"replica-{config.consumer}"
            loaded.servable.start(Mesh(config.redis_url, config.scheduler_address, name))
        reader = QueueReader(config.redis_url, config.queue, config.consumer)
        _join(reader)
        _serve(config, loaded, reader, status)
    except _Terminated:
        status.tell(ProcessState.STOPPED, "ended while loading")
        return 0
    except PenstockError as error:
        log.error("replica failed: %s", error.message)
        status.tell(ProcessState.FAILED, error.message)
        return 1
    except (Exception, DeviceLost) as error:
        log.exception("replica failed")
        status.tell(ProcessState.FAILED, f"{type(error).__name__}: {error}")
        return 1
    status.tell(ProcessState.STOPPED)
    return 0


def _serve(config: ReplicaConfig, loaded: Loaded | LoadedConcurrent, reader: Reader, status: _Status) -> None:
    counters = Counters()
    codec = Codec(loaded.signature, str(config.version))
    answering = Answering(reader, codec, counters, _tracer(config))
    serving = _serving(config, loaded, reader, answering)
    if isinstance(serving, Serving):
        counters.policy = serving.policy

    def stop(number: int, _frame: FrameType | None) -> None:
        serving.stop(handed_over=number == signal.SIGUSR1)

    sys.setswitchinterval(_SWITCH_SECONDS)
    # What is loaded stays: the collector need not look at it again, nor copy pages that processes share.
    gc.collect()
    gc.freeze()
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(reader, counters, ended), name="heartbeat", daemon=True)
    heart.start()
    try:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, stop)
        status.tell(ProcessState.READY)
        log.info("replica ready", extra=_facts(loaded))
        serving.run()
    finally:
        ended.set()
        heart.join(timeout=2 * _HEARTBEAT_SECONDS)
        if snapshot := counters.snapshot():
            reader.publish_statistics(snapshot)
    # Not after a failure: a request may have caused it. What is left is then given back as a dead process's
    # is, so that a request which ends one replica after the other is found out.
    reader.leave()
    (loaded.servable if isinstance(loaded, LoadedConcurrent) else loaded.executor).close()
    log.info("replica stopped")


def _serving(
    config: ReplicaConfig, loaded: Loaded | LoadedConcurrent, reader: Reader, answering: Answering
) -> Serving | ConcurrentServing:
    if isinstance(loaded, LoadedConcurrent):
        return ConcurrentServing(
            reader,
            loaded.servable,
            loaded.signature,
            answering,
            queue_name=config.queue,
            drain_seconds=config.drain_seconds,
        )
    return Serving(
        reader,
        loaded.executor,
        answering,
        max_delay_seconds=config.batching.max_delay_microseconds / 1e6,
        objective_seconds=config.batching.latency_objective_microseconds / 1e6,
        seconds_of_one=loaded.seconds_of_one,
        seconds_of_max=loaded.seconds_of_max,
        drain_seconds=config.drain_seconds,
        profile=config.curve,
    )


def _facts(loaded: Loaded | LoadedConcurrent) -> dict[str, float]:
    if isinstance(loaded, LoadedConcurrent):
        return {"concurrency": loaded.servable.limit}
    return {
        "batch": loaded.executor.max_rows,
        "milliseconds_of_one": round(loaded.seconds_of_one * 1e3, 3),
        "milliseconds_of_batch": round(loaded.seconds_of_max * 1e3, 3),
    }


def _join(reader: Reader) -> None:
    """Wait for the queue: READY means that a request would be answered now."""
    told = False
    while not reader.heartbeat():
        if not told:
            log.warning("the queue is away; waiting for it")
            told = True
        time.sleep(_RETRY_SECONDS)


def _beat(reader: Reader, counters: Counters, ended: threading.Event) -> None:
    """Keep the lease, publish statistics, and take back what dead peers held, each second.

    A model that holds the interpreter lock for over 3 s in one C call starves this thread. Its requests are
    then computed by a peer too; the gateway takes the first answer of each and drops the other.
    """
    while not ended.wait(_HEARTBEAT_SECONDS):
        try:
            reader.heartbeat()
            if (snapshot := counters.snapshot()) and not reader.publish_statistics(snapshot):
                counters.again()
            reader.reclaim_lost()
        except Exception:
            # A lost beat is made up by the next; a thread that ended would cost the lease.
            log.exception("a heartbeat failed")


def _tracer(config: ReplicaConfig) -> Tracer | None:
    if not config.otlp_endpoint:
        return None
    # Imported here: it costs time and memory, and few need it.
    from penstock_kit.telemetry.tracing import configure_tracing, record_span

    configure_tracing("penstock-replica", config.otlp_endpoint)
    facts: dict[str, str | int | float] = {
        "penstock.replica": config.replica,
        "penstock.model": config.model,
        "penstock.version": config.version,
    }

    def trace(outcome: Outcome, end_ns: int) -> None:
        failure = outcome.result.message if isinstance(outcome.result, PenstockError) else ""
        record_span(
            "replica.infer",
            traceparent=outcome.request.header.traceparent,
            start_ns=outcome.started_ns,
            end_ns=end_ns,
            attributes={**facts, "penstock.compute_ns": outcome.compute_ns},
            failure=failure,
        )

    return trace


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


class _Status:
    """Tells the agent where the process is, one line per change."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def tell(self, state: ProcessState, message: str = "") -> None:
        if self._descriptor < 0:
            return
        # An agent that is gone hears nothing; serving goes on.
        with contextlib.suppress(OSError):
            os.write(self._descriptor, ProcessStatus(state, message).to_line())
