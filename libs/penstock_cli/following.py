"""Following a job: its progress, its curve and its log, until it has ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from rich.console import RenderableType
from rich.live import Live

from penstock import Client
from penstock.errors import FailedPrecondition, PenstockError, Reason
from penstock.jobs import describe_job
from penstock.names import short
from penstock.scheduler.v1 import job_pb2, job_service_pb2
from penstock_cli.job_options import JobOptions
from penstock_cli.job_views import Account, job_view, progress_text, show_job
from penstock_cli.output import console, note, print_json, say
from penstock_cli.session import connect

WATCH_SECONDS = 30 * 24 * 3600.0
_LAST_EVENTS_SECONDS = 2.0
_KINDS = (job_service_pb2.JOB_EVENT_KIND_METRICS, job_service_pb2.JOB_EVENT_KIND_LOG)
_SAY_EVERY_PERCENT = 10


def submit(job: job_pb2.Job, options: JobOptions, *, then: Callable[[job_pb2.Job], None] = show_job) -> None:
    """Queue a job, and follow it unless its options say otherwise.

    Args:
        job: With its work.
        options: How it is followed.
        then: Shows the job that has succeeded.

    Raises:
        PenstockError: It was refused, or it did not succeed.
    """
    with connect(options.endpoint) as client:
        made = client.create_job(job)
        if options.detach:
            if options.json:
                print_json(made)
            else:
                say(f"{short(made.name)} is queued. Follow it with `penstock jobs watch {short(made.name)}`.")
            return
        ended = follow(client, made.name, quiet=options.json)
        if options.json:
            print_json(ended)
        elif ended.state == job_pb2.JOB_STATE_SUCCEEDED:
            then(ended)
    raise_if_not_succeeded(ended)


def follow(client: Client, name: str, *, timeout: float = WATCH_SECONDS, quiet: bool = False) -> job_pb2.Job:
    """Show a job until it has ended; return it. Whoever interrupts it is told that the job goes on.

    Args:
        client: To the mesh.
        name: Name of the job.
        timeout: Seconds.
        quiet: Show nothing.
    """
    try:
        # A wrong address is said at once; who began to watch waits for a mesh that restarts.
        job = client.get_job(name)
        if quiet:
            return client.watch_job(name, timeout=timeout)
        if sys.stdout.isatty():
            return _live(client, job, timeout)
        return _lines(client, name, timeout)
    except KeyboardInterrupt:
        brief = short(name)
        note(f"It goes on. `penstock jobs watch {brief}` shows it, `penstock jobs cancel {brief}` ends it.")
        raise


def raise_if_not_succeeded(job: job_pb2.Job) -> None:
    """Return if a job has succeeded.

    Raises:
        FailedPrecondition: It has not.
    """
    if job.state != job_pb2.JOB_STATE_SUCCEEDED:
        raise FailedPrecondition(
            f"{short(job.name)} is {describe_job(job)} See `penstock jobs logs {short(job.name)}`.",
            reason=Reason.WRONG_STATE,
            metadata={"job": short(job.name), "failure_reason": job.failure_reason},
        )


def _live(client: Client, latest: job_pb2.Job, timeout: float) -> job_pb2.Job:
    name, account = latest.name, Account()
    # Events come in one thread, states in another, and a third draws.
    lock = threading.Lock()

    def draw() -> RenderableType:
        with lock:
            return job_view(latest, account)

    def hear(event: job_pb2.JobEvent) -> None:
        with lock:
            account.hear(event)

    def see(job: job_pb2.Job) -> None:
        nonlocal latest
        with lock:
            latest = job

    # Events are a courtesy: without them the job is still watched.
    def listen() -> None:
        with suppress(PenstockError):
            client.watch_job_events(name, hear, kinds=_KINDS, timeout=timeout)

    # Drawn a few times a second, however many events come: a long job has thousands of them at once.
    with Live(get_renderable=draw, console=console(), refresh_per_second=4):
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        ended = client.watch_job(name, timeout=timeout, on_change=see)
        listener.join(_LAST_EVENTS_SECONDS)
    return ended


def _lines(client: Client, name: str, timeout: float) -> job_pb2.Job:
    said: set[str] = set()

    def tell(job: job_pb2.Job) -> None:
        done = 100 * job.progress.done // job.progress.total if job.progress.total else 0
        step = done - done % _SAY_EVERY_PERCENT
        key = f"{job.state} {job.attempt} {job.message} {step}"
        if key not in said:
            said.add(key)
            parts = (short(job.name), describe_job(job), progress_text(job), job.progress.phase)
            say("  ".join(filter(None, parts)))

    return client.watch_job(name, timeout=timeout, on_change=tell)
