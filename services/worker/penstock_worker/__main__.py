"""`penstock-worker`: run a worker agent."""

from __future__ import annotations

import argparse
import os
import sys

from penstock_kit import lifecycle
from penstock_worker import app
from penstock_worker.adapters.secrecy import hide_environment, refuse_inspection

LOCAL_MARK = "PENSTOCK_LOCAL_MESH"


def main() -> int:
    """Run until SIGTERM; return the exit status."""
    argparse.ArgumentParser(
        prog="penstock-worker",
        description="Runs replicas of models on this machine. Settings are environment variables PENSTOCK_….",
    ).parse_args()
    # `penstock up` finds by this variable what a mesh that was killed has left.
    if LOCAL_MARK not in os.environ:
        hide_environment()
        refuse_inspection()
    return lifecycle.run(app.serve)


if __name__ == "__main__":
    sys.exit(main())
