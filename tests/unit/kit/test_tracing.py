"""A collector of spans that is away does not hold up the end of a process."""

from __future__ import annotations

import subprocess
import sys

# A port that nobody listens on: the exporter tries again for 10 s, batch after batch.
ENDS_WITHOUT_COLLECTOR = """
import time
from penstock_kit.telemetry import tracing
tracing.FAREWELL_SECONDS = 0.1
tracing.configure_tracing("test", "127.0.0.1:9")
for _ in range(2000):
    with tracing.span("lost"):
        pass
began = time.monotonic()
tracing.shutdown_tracing()
print(time.monotonic() - began)
"""


def test_the_end_of_a_process_does_not_wait_for_a_collector_that_is_away() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WITHOUT_COLLECTOR], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) < 5
