"""What agents under test run instead of the real replica: no model, no queue, told what to do by its bundle.

The bundle's file `behaviour.json` says: {"load_seconds": 0, "fail": "words", "crash_after": n, "print": "…",
"ignore_sigterm": true, "child": true}. `crash_after` counts starts of this replica with this bundle in the
file `starts` beside the bundle's directory, and lets those before the n-th exit with status 3.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from penstock_worker.domain.replica import ProcessState, ProcessStatus, ReplicaConfig

WARMED = []


def warm_up() -> None:
    """Show that the hook is called."""
    WARMED.append(os.getpid())


def run_replica(config: ReplicaConfig) -> int:
    behaviour = json.loads((Path(config.bundle_dir) / "behaviour.json").read_text())

    def tell(state: ProcessState, message: str = "") -> None:
        os.write(config.status_fd, ProcessStatus(state, message).to_line())

    draining: list[int] = []
    ignored = behaviour.get("ignore_sigterm", False)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None if ignored else draining.append(1))
    tell(ProcessState.LOADING)
    print(behaviour.get("print", config.consumer), flush=True)
    if behaviour.get("child"):
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}", flush=True)
    time.sleep(behaviour.get("load_seconds", 0))
    if behaviour.get("fail"):
        tell(ProcessState.FAILED, behaviour["fail"])
        return 1
    starts = Path(config.bundle_dir).with_name(f"{config.replica}.starts")
    if "crash_after" in behaviour:
        with starts.open("a") as file:
            file.write("x")
        if starts.stat().st_size < behaviour["crash_after"]:
            print("about to crash")
            return 3
    tell(ProcessState.READY)
    while not draining:
        signal.pause() if not draining else None
    time.sleep(behaviour.get("drain_seconds", 0))
    tell(ProcessState.STOPPED)
    return 0
