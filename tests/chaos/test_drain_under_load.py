"""A node is drained by hand under load, and given back: no request fails."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator

import pytest

import penstock
from support.chaos.deploy import deploy_echo
from support.chaos.history import History, Strike
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

CONCURRENCY = 32
REPLICAS = 2


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data", workers=2) as mesh:
        deploy_echo(mesh, folder, replicas=REPLICAS)
        yield mesh


async def nodes_command(mesh: Mesh, *words: str) -> dict[str, object]:
    """Run `penstock nodes …` as an operator does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "penstock_cli", "nodes", *words, "--endpoint", mesh.address, "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    found: dict[str, object] = json.loads(output)
    return found


def homes(mesh: Mesh) -> list[str]:
    with penstock.Client(mesh.address) as client:
        return sorted(replica.node for replica in client.list_replicas(deployment="echo"))


async def test_draining_each_node_in_turn_at_concurrency_32_fails_no_request(
    mesh: Mesh, storm: Storm
) -> None:
    callers: list[Caller] = [GrpcCaller("echo") for _ in range(CONCURRENCY - 4)]
    callers += [HttpCaller("echo") for _ in range(4)]
    with penstock.Client(mesh.address) as client:
        names = sorted(node.name.removeprefix("nodes/") for node in client.list_nodes())
    assert len(names) == 2

    async def drain_in_turn(history: History) -> None:
        for name in names:
            began = time.monotonic()
            node = await nodes_command(mesh, "drain", name, "--wait", "--timeout", "50")
            history.struck(Strike(f"drain {name}", [], began, time.monotonic(), began))
            assert node["draining"]
            assert node["cordoned"]
            there = await asyncio.to_thread(homes, mesh)
            assert f"nodes/{name}" not in there
            await nodes_command(mesh, "uncordon", name)

    report = await storm.run(mesh.address, callers, drain_in_turn)
    report.must_be_good()
    assert report.verdict.failures() == 0
    with penstock.Client(mesh.address) as client:
        client.wait_ready("echo")
