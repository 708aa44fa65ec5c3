"""What keeps jobs from harming what runs beside them: priority, limits, knowing what they have started."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import resource
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from penstock_worker.adapters.node_probe import memory_of

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}.get(os.uname().machine, -1)
IOPRIO_WHO_PROCESS = 1
IOPRIO_LOWEST = (2 << 13) | 7
"""Class best effort, the last of its eight levels: idle would starve beside a busy disk."""
OOM_SCORE_ADJ = 800
"""The kernel takes ranks of jobs before replicas (500), and those before the agent."""
MARK_VARIABLE = "PENSTOCK_MARK"
"""In the environment of all that a task executes; what it only forks keeps its name in process lists. By
these two the agent knows what is left of a task whose launcher was killed."""
SWEEPS = 20
SWEEP_PAUSE_SECONDS = 0.05
MAX_FILE_BYTES = 64 * 1024**3
MAX_OPEN_FILES = 4096

_KEPT = re.compile(rb"^(Private_Clean|Private_Dirty|Anonymous): +(\d+) kB", re.MULTILINE)

_libc = ctypes.CDLL(None, use_errno=True)


def step_back(nice: int) -> None:
    """Give this process, and what it will start, a lower priority for processor and disk than replicas."""
    with contextlib.suppress(OSError):
        os.nice(nice)
    if IOPRIO_SET >= 0:
        _libc.syscall(IOPRIO_SET, IOPRIO_WHO_PROCESS, 0, IOPRIO_LOWEST)


def adopt_orphans() -> None:
    """Become the parent of whatever below this process loses its own."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when its parent dies; false if that has happened already."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def set_title(title: str) -> None:
    """Set the name in process lists, 15 bytes of it."""
    _libc.prctl(PR_SET_NAME, title.encode()[:15], 0, 0, 0)


def offer_to_killer() -> None:
    """Make this process one of the first that the kernel ends for lack of memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))


def confine_user_code() -> None:
    """Set the limits of a program of the user's: no core dumps, no endless file, so many open files.

    Nothing that it starts gets rights that it has not (sudo and the like), and nobody else reads its files.

    The number of processes is watched, not limited: RLIMIT_NPROC counts all processes of the user account,
    the agent's own included.
    """
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.umask(0o077)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (most, most))


def descendants(pid: int) -> list[int]:
    """Return the running processes below a process, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - many small reads, twice a second
        if entry.isdigit():
            parent, state = _parent_of(entry)
            if state != "Z":
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.append(child)
            waiting.append(child)
    return found


def memory_of_all(pids: Iterable[int], files: Path | None = None) -> int:
    """Return the bytes that processes have for themselves, together.

    Args:
        pids: The processes.
        files: Files below it that are mapped, such as rows of datasets, are not counted: the kernel gives
            their pages up where memory is short.
    """
    return sum(max(0, memory_of(pid) - (mapped_of(pid, files) if files else 0)) for pid in pids)


def mapped_of(pid: int, files: Path) -> int:
    """Return the bytes that only this process has in memory of files below a folder; 0 if it is gone."""
    folder = f"/{files.absolute().as_posix().strip('/')}/".encode()
    total = 0
    with contextlib.suppress(OSError):
        # The short list first: most processes map none.
        if folder not in Path(f"/proc/{pid}/maps").read_bytes():
            return 0
        text = Path(f"/proc/{pid}/smaps").read_bytes()
        at = text.find(folder)
        while at >= 0:
            end = text.find(b"VmFlags:", at)
            # What was written to a private mapping is no page of the file any more.
            kept = {name: int(size) * 1024 for name, size in _KEPT.findall(text, at, end)}
            total += kept.get(b"Private_Clean", 0) + kept.get(b"Private_Dirty", 0) - kept.get(b"Anonymous", 0)
            at = text.find(folder, end) if end >= 0 else -1
    return max(0, total)


def tasks_of_all(pids: Iterable[int]) -> int:
    """Return how many processes and threads there are, together."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 - as above
    return count


def kill_below(pid: int, *, but: frozenset[int] = frozenset()) -> int:
    """Kill everything below a process that adopts orphans, again until nothing is left; return what is.

    A child can have children between a look and a kill; each of them comes to `pid` when its parent dies.
    """
    known: set[int] = set()
    for _ in range(SWEEPS):
        # What is stopped starts nothing more: without this a fork bomb could be faster.
        found = {child for child in descendants(pid) if child not in but}
        if found <= known:
            break
        for child in found - known:
            _send(child, signal.SIGSTOP)
        known |= found
    for _ in range(SWEEPS):
        left = [child for child in descendants(pid) if child not in but]
        if not left:
            return 0
        for child in left:
            _send(child, signal.SIGKILL)
        _reap(but)
        time.sleep(SWEEP_PAUSE_SECONDS)
    return len([child for child in descendants(pid) if child not in but])


def mark_of(token: str) -> str:
    """Return the mark of one start of a task: also the name of its processes, so at most 15 bytes."""
    return f"pj:{hashlib.sha256(token.encode()).hexdigest()[:12]}"


def kill_marked(mark: str) -> int:
    """Kill all processes that bear a mark; return how many there were. For when their launcher is dead."""
    variable = f"{MARK_VARIABLE}={mark}".encode()
    killed = 0
    for entry in os.listdir("/proc"):  # noqa: PTH208 - as above
        if entry.isdigit():
            folder = Path("/proc", entry)
            if _parent_of(entry)[1] == "Z":
                continue
            with contextlib.suppress(OSError):
                if (folder / "comm").read_text().strip() == mark or variable in (
                    folder / "environ"
                ).read_bytes().split(b"\0"):
                    _send(int(entry), signal.SIGKILL)
                    killed += 1
    return killed


def killed_for_memory(root: Path = Path("/")) -> int:
    """Return how often the kernel has killed for lack of memory, in this control group or machine."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            group = line.rpartition(":")[2].lstrip("/")
            for folder in (root / "sys/fs/cgroup" / group, root / "sys/fs/cgroup"):
                events = folder / "memory.events"
                if events.exists():
                    total += _count(events, "oom_kill")
                    break
    with contextlib.suppress(OSError, ValueError):
        total += _count(root / "proc/vmstat", "oom_kill")
    return total


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _count(path: Path, name: str) -> int:
    return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)


def _parent_of(pid: str) -> tuple[int, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, "Z"
    return int(fields[1]), fields[0]


def _reap(but: frozenset[int]) -> None:
    """Take leave of dead children that are nobody else's to wait for."""
    with contextlib.suppress(ChildProcessError):
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in but:
                return
            os.waitpid(ended.si_pid, 0)
