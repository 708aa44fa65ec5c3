"""Find and end processes of a mesh whose supervisor is gone.

Every process of a mesh has the mesh's data directory in its environment, and so has all that it starts:
replicas, jobs. That mark is how they are found, whatever their parent, session or group
is by now.
"""

import contextlib
import logging
import os
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

MARK = "PENSTOCK_LOCAL_MESH"
_WAIT_SECONDS = 5.0


def marked_processes(data_dir: Path) -> list[psutil.Process]:
    """The processes that carry the mark of `data_dir`, but this one and those above it."""
    mark = str(data_dir.absolute())
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid not in own:
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == mark:
                    found.append(process)
    return found


def end_orphans(data_dir: Path) -> int:
    """SIGKILL every marked process, and wait until they are gone; gives their number.

    Only for who holds the data directory and runs nothing in it: nobody waits for these processes.
    """
    orphans = marked_processes(data_dir)
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            log.warning("ending process %d of an earlier mesh", process.pid)
            process.kill()
    psutil.wait_procs(orphans, timeout=_WAIT_SECONDS)
    return len(orphans)
