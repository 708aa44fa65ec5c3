"""Which installation of a worker this is."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from penstock_kit.errors import FailedPrecondition, Reason

_ID = re.compile(r"[0-9a-f]{32}")


def installation(folder: Path, root: Path = Path("/")) -> str:
    """Return what tells this installation from others that bear the same name, also over restarts.

    It is kept in the data directory. The boot of the machine is part of it, as a copy of a virtual machine
    has a copy of its disk too.

    Args:
        folder: The data directory, which nobody else uses now.
        root: Where /proc is.

    Raises:
        FailedPrecondition: The directory cannot be written to.
    """
    path = folder / "worker.id"
    try:
        known = path.read_text().strip() if path.exists() else ""
        if not _ID.fullmatch(known):
            known = secrets.token_hex(16)
            fresh = path.with_suffix(".new")
            fresh.write_text(f"{known}\n")
            fresh.replace(path)
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be kept: {error.strerror}. Give PENSTOCK_DATA_DIR a directory to write to.",
            reason=Reason.WRONG_STATE,
        ) from error
    try:
        boot = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{known}-{boot[:8]}" if boot else known
