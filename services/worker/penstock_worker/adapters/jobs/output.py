"""What ranks print: into a bounded log, and as lines for the events; the rest is counted and said.

A program may print gigabytes. All of it is read, as a full pipe would hold the program up, but what is over
the bounds costs no more than counting its bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from penstock_worker.domain.task import Allowance, megabytes

READ_BYTES = 256 * 1024
MAX_LINE_CHARACTERS = 4_000
BURST_LINES = 500
LINES_PER_SECOND = 50.0
BURST_BYTES = 512 * 1024
BYTES_PER_SECOND = 128 * 1024.0
DEFAULT_OUTPUT_BYTES = 64 * 1024**2
SAY_DROPPED_SECONDS = 5.0

Tell = Callable[[str, int, bool], None]
"""Takes a line, the rank, and whether it came from the standard error."""


class BoundedLog:
    """A file that is rotated at a size; one old one is kept.

    Args:
        path: The file; its folder is there.
        limit_bytes: The size.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        """Append; what a full disk does not take is lost."""
        if self._size + len(data) > self._limit_bytes:
            with contextlib.suppress(OSError):
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file.close()
                self._file = self._path.open("ab", buffering=0)
                self._size = 0
        with contextlib.suppress(OSError):
            self._size += self._file.write(data[-self._limit_bytes :])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Output:
    """The output of all ranks of one task.

    Args:
        log: Where it is kept.
        tell: Called for each line that goes into the events.
        max_bytes: What the task may print in all; 0 means 64 MiB.
    """

    def __init__(self, log: BoundedLog, tell: Tell, max_bytes: int = 0) -> None:
        self._log = log
        self._tell = tell
        self._max_bytes = max_bytes or DEFAULT_OUTPUT_BYTES
        self._seen = 0
        self._lines = Allowance(BURST_LINES, LINES_PER_SECOND)
        self._bytes = Allowance(BURST_BYTES, BYTES_PER_SECOND)
        self._dropped_lines = 0
        self._dropped_bytes = 0
        self._cut_off = False
        self._said_at = 0.0
        self.last_lines: list[str] = []

    def take(self, data: bytes, rank: int, error: bool) -> None:
        """Take a piece that consists of whole lines, or the end of what a rank printed."""
        self._seen += len(data)
        if self._seen > self._max_bytes:
            self._drop(data)
            if not self._cut_off:
                self._cut_off = True
                words = f"It has printed {megabytes(self._max_bytes)}; what follows is dropped."
                self._log.write(words.encode() + b"\n")
                self._tell(words, rank, True)
            return
        self._log.write(data)
        now = time.monotonic()
        if not self._bytes.take(len(data), now):
            self._drop(data)
            return
        for line in data.splitlines():
            text = line[: 4 * MAX_LINE_CHARACTERS].decode("utf-8", "replace")[:MAX_LINE_CHARACTERS].rstrip()
            self.last_lines = [*self.last_lines[-19:], text]
            if self._lines.take(1, now):
                self._tell(text, rank, error)
            else:
                self._drop(line)
        self.say_dropped(now)

    def say_dropped(self, now: float, *, last: bool = False) -> None:
        """Say how much was left out of the events, now and then, and at the end."""
        if not self._dropped_bytes or not (last or now - self._said_at > SAY_DROPPED_SECONDS):
            return
        if not (last or self._lines.take(1, now)):
            return
        self._said_at = now
        where = "" if self._cut_off else "; the log on the node has them"
        words = f"{self._dropped_lines} lines ({megabytes(self._dropped_bytes)}) are left out here{where}."
        self._dropped_lines = self._dropped_bytes = 0
        self._tell(words, 0, True)

    def _drop(self, data: bytes) -> None:
        self._dropped_lines += max(1, data.count(b"\n"))
        self._dropped_bytes += len(data)

    def close(self) -> None:
        """Say what is still to be said, and close the log."""
        self.say_dropped(time.monotonic(), last=True)
        self._log.close()


class Pipe:
    """The reading end of one stream of one rank; never blocks.

    Args:
        output: Where it goes.
        rank: Whose.
        error: Whether it is the standard error.
    """

    def __init__(self, output: Output, rank: int, error: bool) -> None:
        self.fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self.write_fd, True)
        self._output = output
        self._rank = rank
        self._error = error
        self._rest = b""

    def read(self) -> bool:
        """Take what is there; false at its end."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            self._flush(self._rest)
            return False
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            self._flush(self._rest + head + newline)
            self._rest = tail
        else:
            self._rest += data
            if len(self._rest) > 4 * MAX_LINE_CHARACTERS:
                # A line without end: what belongs to it goes as it comes.
                self._flush(self._rest)
                self._rest = b""
        return True

    def _flush(self, data: bytes) -> None:
        if data:
            self._output.take(data, self._rank, self._error)
            self._rest = b""

    def close(self) -> None:
        """Close it, after what is still in it was taken."""
        os.close(self.fd)
