"""What happens in a task, in a file until the scheduler has stored it.

An event is numbered when it is written, so what the scheduler stores has no gaps, and whoever follows after
a restart of the agent goes on counting. While the scheduler is away the file grows, within bounds: lines of
logs are left out first, and how many is said by the next one that fits.
"""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

from google.protobuf.message import DecodeError

from penstock.scheduler.v1 import job_pb2

LOG_LIMIT_BYTES = 16 * 1024**2
LIMIT_BYTES = 64 * 1024**2
COMPACT_BYTES = 256 * 1024
_HEAD = struct.Struct("<QI")


class EventSpool:
    """The events of one task.

    Args:
        path: The file; its folder is there. What it holds already is sent again.
        task: jobs/{job}/tasks/{task}.
        stored: Number of the last event that the scheduler has stored.
    """

    def __init__(self, path: Path, task: str, stored: int = 0) -> None:
        self.task = task
        self.stored = stored
        self._path = path
        self._left_out = 0
        self._last = stored
        self._read_at = 0
        self._size = self._find_end()
        self._file = path.open("ab", buffering=0)

    @property
    def last(self) -> int:
        """Number of the last event."""
        return self._last

    @property
    def all_stored(self) -> bool:
        """Whether the scheduler has stored all there are."""
        return self.stored >= self._last

    def add(self, event: job_pb2.JobEvent) -> bool:
        """Number an event and keep it; false if there is no room, or no disk, for it, or it is closed."""
        if self._file.closed:
            return False  # A checkpoint may still be on its way when the task is forgotten.
        is_log = event.WhichOneof("event") == "log"
        if self._size > (LOG_LIMIT_BYTES if is_log else LIMIT_BYTES):
            self._left_out += is_log
            return False
        if is_log and self._left_out:
            words = f"{self._left_out} lines are left out, as nobody stored them for too long."
            self._left_out = 0
            self._write(job_pb2.JobEvent(log=job_pb2.LogLine(text=words, error=True)))
        return self._write(event)

    def _write(self, event: job_pb2.JobEvent) -> bool:
        event.task = self.task
        event.number = self._last + 1
        if not event.HasField("time"):
            event.time.FromNanoseconds(time.time_ns())
        data = event.SerializeToString()
        frame = _HEAD.pack(event.number, len(data)) + data
        try:
            written = self._file.write(frame)
        except OSError:
            written = 0
        if written != len(frame):
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            return False
        self._size += written
        self._last = event.number
        return True

    def unsent(self, most_bytes: int) -> list[bytes]:
        """Return serialized events that follow those returned before, so many bytes at most, one at least."""
        found: list[bytes] = []
        took = 0
        with self._path.open("rb") as file:
            file.seek(self._read_at)
            while self._read_at < self._size and took < most_bytes:
                number, length = _HEAD.unpack(file.read(_HEAD.size))
                data = file.read(length)
                self._read_at += _HEAD.size + length
                if number > self.stored:
                    found.append(data)
                    took += length
        return found

    def rewind(self) -> None:
        """Begin again after the last event that is stored."""
        self._read_at = 0

    def note_stored(self, number: int) -> None:
        """Take up how far the scheduler has stored; what is stored goes from the disk."""
        self.stored = max(self.stored, min(number, self._last))
        if self.all_stored and self._size > COMPACT_BYTES:
            self._file.truncate(0)
            self._size = self._read_at = 0

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and remove it if nothing of it is needed."""
        self._file.close()
        if remove:
            self._path.unlink(missing_ok=True)

    def _find_end(self) -> int:
        """Find the last whole event that an earlier agent has written; cut off what follows it."""
        if not self._path.exists():
            return 0
        data = self._path.read_bytes()
        at = 0
        while at + _HEAD.size <= len(data):
            number, length = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(body) < length or not _sound(body, number):
                break
            self._last = max(self._last, number)
            at += _HEAD.size + length
        with self._path.open("r+b") as file:
            file.truncate(at)
        return at


def _sound(body: bytes, number: int) -> bool:
    try:
        return job_pb2.JobEvent.FromString(body).number == number
    except DecodeError:
        return False
