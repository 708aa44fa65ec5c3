"""What happened: every call with its start, end and answer, and every fault. Written down, never judged.

One line of JSON per call and per fault, in the order in which they ended. The file is what the validator
reads, and what is left to look at when it finds fault.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import orjson

OK = "OK"


@dataclass(slots=True)
class Call:
    """One request and what came of it. Times are seconds of `time.monotonic`.

    Attributes:
        id: Unique in a history; it goes with the request.
        kind: What its caller meant by it: small, large, bad, cancelled …
        carrier: grpc, stream or http.
        deployment: Whom it asked.
        version: Which version it asked for; empty for any.
        first, rows, width: The rows it sent, see `Payload`.
        began: When it was sent.
        ended: When it was answered, or failed; 0 if it never was.
        code: OK, or the canonical name of its error; empty if it never ended.
        reason: The error's reason, where the answer gave one.
        detail: The error's words.
        answers: How many answers came.
        digest: Of the rows that came back, in the form of `Payload.digest`.
        versions: Which versions the answer's rows say that they come from.
        said: Which version the answer's header says.
    """

    id: str
    kind: str
    carrier: str
    deployment: str
    version: str = ""
    first: int = 0
    rows: int = 0
    width: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    code: str = ""
    reason: str = ""
    detail: str = ""
    answers: int = 0
    digest: str = ""
    versions: list[str] = field(default_factory=list)
    said: str = ""


@dataclass(slots=True)
class Strike:
    """One fault: what was done, and which errors of callers it explains. Times as in `Call`.

    Attributes:
        fault: What was done.
        explains: Codes of errors.
        began: Before it was done.
        ended: When it had healed.
        done: When it was done.
    """

    fault: str
    explains: list[str]
    began: float
    ended: float = 0.0
    done: float = 0.0


class History:
    """Takes down calls and faults. Used from one thread.

    Args:
        path: The file; an existing one is begun anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._open: dict[str, Call] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, call: Call) -> Call:
        """A request goes out."""
        assert call.id not in self._open, f"{call.id} is not unique"
        self._open[call.id] = call
        return call

    def end(self, call: Call, code: str, reason: str = "", detail: str = "", ended: float = 0.0) -> None:
        """A request has its outcome, which came now or at `ended`."""
        del self._open[call.id]
        call.ended = ended or time.monotonic()
        call.code, call.reason, call.detail = code, reason, detail[:300]
        self._write("call", call)

    def struck(self, strike: Strike) -> None:
        """A fault is over."""
        self._write("strike", strike)

    def close(self) -> None:
        """Nothing more comes: what is open now never ended."""
        for call in self._open.values():
            self._write("call", call)
        self._open.clear()
        self._file.close()

    def _write(self, kind: str, what: Call | Strike) -> None:
        self._file.write(orjson.dumps([kind, asdict(what)]) + b"\n")


def read(path: Path) -> Iterator[Call | Strike]:
    """What a history holds, in the order in which it ended."""
    with path.open("rb") as lines:
        for line in lines:
            kind, fields = orjson.loads(line)
            yield Call(**fields) if kind == "call" else Strike(**fields)


def calls(path: Path, kinds: Iterable[str] = ()) -> Iterator[Call]:
    """The calls of a history; only those of some kinds, if kinds are given."""
    wanted = frozenset(kinds)
    for line in read(path):
        if isinstance(line, Call) and (not wanted or line.kind in wanted):
            yield line
