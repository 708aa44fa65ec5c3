"""Faults under callers who ask for the same, of a deployment that keeps answers and shares computations.

At any moment all callers choose among four inputs, which change ten times a second: most answers are kept
ones or shared ones, and each must still be the caller's own, of the right version, once.

tests/chaos/README.md says how the parts of these tests hang together, and lists the bugs that they found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import penstock
from support.chaos.deploy import deploy_echo
from support.chaos.faults import KillReplica, KillUnit, Redeploy, strike
from support.chaos.history import Call, History
from support.chaos.model import Payload
from support.chaos.storm import Report, Storm
from support.chaos.traffic import Caller, CancellingCaller, GrpcCaller, SdkCaller, StreamCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]


class _Alike(Caller):
    """Asks for what others ask for at this moment."""

    def _call(self) -> tuple[Call, Payload]:
        call, made = super()._call()
        number = int(time.monotonic() * 10) * 4 + self._random.randrange(4)
        payload = Payload(number * 64 % (1 << 22), made.rows, made.width)
        call.first = payload.first
        return call, payload


class AlikeGrpc(_Alike, GrpcCaller):
    """Over unary gRPC."""


class AlikeStream(_Alike, StreamCaller):
    """Over streams."""


class AlikeSdk(_Alike, SdkCaller):
    """With our own client."""


class AlikeLeaver(_Alike, CancellingCaller):
    """And leaves early, often as the one who began."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder: Path = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data") as mesh:
        deploy_echo(mesh, folder, versions=2)
        with penstock.Client(mesh.address) as client:
            client.set_cache("echo", True, ttl=0.05, coalesce=True)
        yield mesh


def callers() -> list[Caller]:
    found: list[Caller] = [AlikeGrpc("echo") for _ in range(9)]
    found += [AlikeGrpc("echo", version="2"), AlikeStream("echo"), AlikeSdk("echo"), AlikeSdk("echo")]
    return [*found, *(AlikeLeaver("echo") for _ in range(3))]


def shared(mesh: Mesh) -> float:
    """Return how many requests were answered without a computation of their own."""
    lines = httpx.get(f"{mesh.url}/metrics").text.splitlines()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}
    return sum(
        found[f'penstock_gateway_cache_requests_total{{deployment="echo",result="{result}"}}']
        for result in ("hit", "joined")
    )


async def endure(mesh: Mesh, storm: Storm, report: Report, before: float) -> None:
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert shared(mesh) - before > report.verdict.answered / 4, "hardly anything was shared"


@pytest.mark.parametrize("victim", ["replica", "redis"])
async def test_what_is_killed_behind_those_who_wait_together_fails_none_of_them(
    mesh: Mesh, storm: Storm, victim: str
) -> None:
    before = shared(mesh)
    fault = KillReplica(mesh, "echo") if victim == "replica" else KillUnit(mesh, victim)
    report = await storm.run(
        mesh.address, callers(), lambda history: strike(fault, history), versions={"echo": ["2"]}
    )
    await endure(mesh, storm, report, before)


async def test_versions_that_change_part_those_who_wait_together(mesh: Mesh, storm: Storm) -> None:
    """Who asked for version 2 by number is told that it is gone, or is answered by it: never by version 1."""
    before = shared(mesh)

    async def there_and_back(history: History) -> None:
        for version in (1, 2, 1, 2):
            await strike(Redeploy(mesh, "echo", version), history)
            await asyncio.sleep(0.5)

    free = [caller for caller in callers() if not caller.version]
    report = await storm.run(mesh.address, free, there_and_back, versions={"echo": ["1", "2"]})
    await endure(mesh, storm, report, before)
    pinned: list[Caller] = [AlikeGrpc("echo"), *(AlikeGrpc("echo", version="2") for _ in range(8))]
    report = await storm.run(
        mesh.address,
        pinned,
        there_and_back,
        versions={"echo": ["1", "2"]},
        allowed={"small": ["NOT_FOUND"]},
    )
    report.must_be_good()
