"""A command's client, and what goes wrong while talking to it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated

import typer

from penstock import Client
from penstock.errors import Code, DeadlineExceeded, NotFound, PenstockError, Reason, Unavailable
from penstock.names import short
from penstock.transport import DEFAULT_ENDPOINT

# A person waits: long enough for a gateway that restarts, short enough to notice a wrong address.
_RETRY_SECONDS = 3.0
_MOST_NAMES = 1000
_MOST_JOBS = 100  # each comes with all it found
_ABOUT = {
    Reason.MODEL_NOT_FOUND: "model",
    Reason.DEPLOYMENT_NOT_FOUND: "deployment",
    Reason.ALIAS_NOT_FOUND: "alias",
}
_BY_KEY = ("job", "project", "node", "artifact")

Endpoint = Annotated[
    str,
    typer.Option(
        "--endpoint", envvar="PENSTOCK_ENDPOINT", metavar="HOST:PORT", help="Address of the gateway."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many.")]

ENDPOINT = DEFAULT_ENDPOINT

# Part of the interface: scripts test them.
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130


@contextmanager
def connect(endpoint: str, *, timeout: float = 30.0) -> Iterator[Client]:
    """Yield a client; a name that does not exist gets the nearest ones that do."""
    with Client(endpoint, timeout=timeout, retry_seconds=_RETRY_SECONDS) as client:
        try:
            yield client
        except NotFound as error:
            raise _with_suggestion(client, error) from error


def exit_code(error: PenstockError) -> int:
    """Return the exit status that an error ends a command with."""
    if isinstance(error, NotFound):
        return EXIT_NOT_FOUND
    if isinstance(error, (Unavailable, DeadlineExceeded)):
        return EXIT_UNAVAILABLE
    return EXIT_USAGE if error.code == Code.INVALID_ARGUMENT else EXIT_FAILED


def nearest(name: str, known: Sequence[str]) -> str:
    """Return "Did you mean …?" with the names most like `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def _with_suggestion(client: Client, error: NotFound) -> NotFound:
    # What the error is about, by the key that names it, and the names that there are.
    lists: dict[str, Callable[[], list[str]]] = {
        "alias": lambda: [short(a.name) for a in client.get_model(error.metadata["model"]).aliases],
        "model": lambda: [short(m.name) for m in client.list_models(limit=_MOST_NAMES)],
        "deployment": lambda: [short(d.name) for d in client.list_deployments(limit=_MOST_NAMES)],
        "job": lambda: [short(j.name) for j in client.list_jobs(limit=_MOST_JOBS)],
        "project": lambda: [short(p.name) for p in client.list_projects(limit=_MOST_NAMES)],
        "node": lambda: [short(n.name) for n in client.list_nodes(limit=_MOST_NAMES)],
        "artifact": lambda: [a.name.split("/")[1] for a in client.list_datasets(limit=_MOST_NAMES)],
    }
    key = _ABOUT.get(error.reason) or next((key for key in _BY_KEY if key in error.metadata), "")
    wanted = short(error.metadata.get(key, "").partition("/versions/")[0])
    if not wanted:
        return error
    hint = ""
    # The names are a courtesy: whatever fails here, the error itself is what the person must see.
    with suppress(PenstockError, KeyError):
        # A name that there is says that its version is the one that is missing.
        known = lists[key]()
        hint = nearest(wanted, known) if wanted not in known else ""
    if not hint or hint in error.message:
        return error
    return NotFound(f"{error.message} {hint}", reason=error.reason, metadata=error.metadata)
