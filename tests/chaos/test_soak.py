"""Mixed load for a long time: nothing grows, and nobody sees an error that the mix does not explain.

PENSTOCK_SOAK_SECONDS says how long: a minute by default, ten with `make test-soak`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from support.chaos.deploy import deploy_echo
from support.chaos.footprint import Footprint, growth, look
from support.chaos.history import History
from support.chaos.storm import Storm
from support.chaos.traffic import (
    BadCaller,
    BadHttpCaller,
    Caller,
    CancellingCaller,
    GrpcCaller,
    HttpCaller,
    SdkCaller,
    StreamCaller,
)
from support.mesh_process import Mesh

SECONDS = float(os.environ.get("PENSTOCK_SOAK_SECONDS", "60"))
PHASES = 6
# Open connections end, and what they held is let go of.
QUIET_SECONDS = 2.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2 * SECONDS + 240)]

LARGE = (2_097_152, 8_388_608)  # 8 to 32 MiB of FP32


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    # Blocks of bodies go back at once instead of staying with the allocator for the next ones, which would
    # hide what a process holds.
    with Mesh(tmp_path / "data", env={"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}) as mesh:
        deploy_echo(mesh, tmp_path, replicas=2)
        yield mesh


def mix() -> list[Caller]:
    """Everything that callers do, at a pace that leaves the machine some room."""
    calm = 0.005
    large = {"kind": "large", "width": LARGE, "timeout": 60.0}
    return [
        *(GrpcCaller("echo", rows=(1, 8), pause=calm) for _ in range(4)),
        *(SdkCaller("echo", pause=calm) for _ in range(2)),
        HttpCaller("echo", pause=calm),
        HttpCaller("echo", binary=True, pause=calm),
        StreamCaller("echo", pause=calm),
        StreamCaller("echo", length=64, pause=calm),
        # Callers who connect for a few calls only.
        GrpcCaller("echo", pause=calm, calls_per_connection=5),
        HttpCaller("echo", pause=calm, calls_per_connection=3),
        StreamCaller("echo", pause=calm, calls_per_connection=1),
        GrpcCaller("echo", pause=0.5, **large),
        HttpCaller("echo", binary=True, pause=0.5, **large),
        StreamCaller("echo", length=3, pause=1.0, **large),
        BadCaller("echo", pause=calm),
        BadHttpCaller("echo", pause=calm),
        CancellingCaller("echo", patience=0.004, pause=calm),
        CancellingCaller("echo", width=LARGE, patience=0.2, pause=0.5, timeout=60.0),
        GrpcCaller("echo", kind="hurried", timeout=0.003, pause=calm),
        HttpCaller("echo", kind="hurried", timeout=0.003, pause=calm),
    ]


async def test_mixed_load_for_a_long_time_makes_nothing_grow(mesh: Mesh, storm: Storm) -> None:
    (path,) = mesh.data_dir.glob("redis/**/redis.sock")
    looks: list[Footprint] = []
    answered = 0
    with redis.Redis(unix_socket_path=str(path)) as client:

        async def phase(_: History) -> None:
            await asyncio.sleep(SECONDS / PHASES)

        for number in range(PHASES):
            storm.name = f"phase {number + 1} of {PHASES}"
            report = await storm.run(mesh.address, mix(), phase, before=0, after=0)
            report.must_be_good()
            answered += report.verdict.answered
            await asyncio.sleep(QUIET_SECONDS)
            looks.append(await asyncio.to_thread(look, mesh, client))
            print(f"  {looks[-1]}")
    print(f"{answered} answered in {SECONDS:g} s")
    # The first phase warms up.
    grown = growth(looks[1:])
    assert not grown, "\n".join([*grown, *map(str, looks)])
    assert (looks[-1].in_flight, looks[-1].queued) == (0, 0)
