"""Keeps what the worker was started with (addresses, passwords, tokens) out of /proc.

`/proc/<pid>/environ` shows the memory in which the kernel laid a process's environment out when it began,
whatever the process has done to its variables since; whoever runs as the same user may read it. Processes
that are forked have that memory, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

PR_SET_DUMPABLE = 4
# Of proc(5), counted from the state, which follows the name in parentheses.
_ENV_START, _ENV_END = 47, 48

_libc = ctypes.CDLL(None, use_errno=True)


def hide_environment() -> None:
    """Wipe the environment that this process, and what it will fork, shows to others; `os.environ` stays.

    To be called while there is one thread.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ENV_START]), int(fields[_ENV_END])
        if not 0 < start < end:
            return
        # The C library points into that memory until a variable is set anew.
        for name, value in list(os.environb.items()):
            os.environb[name] = value
        ctypes.memset(start, 0, end - start)


def refuse_inspection() -> None:
    """Let no process of the same user read this one's memory, or trace it; root may.

    What it starts is not touched: that begins anew with each program.
    """
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
