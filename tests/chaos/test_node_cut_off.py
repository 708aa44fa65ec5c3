"""A node loses its network in the middle of its work, and gets it back when others have done the work."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock
from penstock.scheduler.v1 import node_pb2
from penstock_local.embedded import EmbeddedRedis
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import ready_replicas, strike
from support.chaos.history import History
from support.chaos.network import CutOff, Machine, why_not
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, StreamCaller
from support.chaos.wire import Wire
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

NODE = "far-away"
# Longer than replicas' leases (3 s) and than a silent node is believed in (9 s).
CUT_SECONDS = 12.0


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Machine() as machine:
        yield machine


@pytest.fixture(scope="module")
def mesh(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh with a second worker on a machine of its own, which reaches the mesh over its cable only."""
    folder = tmp_path_factory.mktemp("mesh")
    with (
        EmbeddedRedis(tmp_path_factory.mktemp("redis"), persist=False) as redis,
        Mesh(folder / "data", env={"PENSTOCK_REDIS_URL": redis.url}) as mesh,
        Wire(socket_of(mesh, "registry"), (machine.here, 0)) as registry,
        Wire(socket_of(mesh, "scheduler"), (machine.here, 0)) as scheduler,
        Wire(redis.socket_path, (machine.here, 0)) as queue,
    ):
        data = folder / "far-away"
        data.mkdir()
        env = {
            "PENSTOCK_REGISTRY_ADDRESS": registry.address,
            "PENSTOCK_SCHEDULER_ADDRESS": scheduler.address,
            "PENSTOCK_REDIS_URL": f"redis://{queue.address}",
            "PENSTOCK_DATA_DIR": str(data),
            "PENSTOCK_WORKER_NODE": NODE,
            "PENSTOCK_WORKER_LISTEN": f"unix:{data / 'worker.sock'}",
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        machine.run([sys.executable, "-m", "penstock_worker"], {**inherited, **env}, folder / "far-away.log")
        try:
            with penstock.Client(mesh.address) as client:
                mesh.wait(lambda: NODE in ready_nodes(client), "the far node is ready", 60)
            deploy_echo(mesh, folder, replicas=2)
            yield mesh
        finally:
            machine.stop()


def socket_of(mesh: Mesh, unit: str) -> Path:
    return Path(mesh.unit(unit).address.removeprefix("unix:"))


def ready_nodes(client: penstock.Client) -> set[str]:
    return {
        node.name.removeprefix("nodes/")
        for node in client.list_nodes()
        if node.state == node_pb2.NODE_STATE_READY
    }


def nodes_of(client: penstock.Client) -> set[str]:
    return {each.node.removeprefix("nodes/") for each in client.list_replicas(deployment="echo")}


async def test_a_node_that_is_cut_off_and_comes_back_loses_nothing_and_answers_nothing_twice(
    mesh: Mesh, machine: Machine, storm: Storm
) -> None:
    def both() -> None:
        with penstock.Client(mesh.address) as client:
            wait_replicas(mesh, client, "echo", 2)
            assert nodes_of(client) == {"worker-1", NODE}, "one replica on each node"

    def moved() -> None:
        with penstock.Client(mesh.address) as client:
            mesh.wait(lambda: NODE not in ready_nodes(client), "the node is given up")
            mesh.wait(lambda: ready_replicas(client, "echo"), "a replica answers")

    def back() -> None:
        with penstock.Client(mesh.address) as client:
            mesh.wait(lambda: NODE in ready_nodes(client), "the node is back")
            wait_replicas(mesh, client, "echo", 2)

    async def ordeal(history: History) -> None:
        async def look() -> None:
            await asyncio.sleep(CUT_SECONDS / 2)
            await asyncio.to_thread(moved)

        async with asyncio.TaskGroup() as group:
            group.create_task(strike(CutOff(machine), history, CUT_SECONDS))
            group.create_task(look())
        await asyncio.to_thread(back)

    callers: list[Caller] = [GrpcCaller("echo", rows=(1, 4)) for _ in range(12)]
    callers += [
        StreamCaller("echo"),
        StreamCaller("echo"),
        HttpCaller("echo"),
        HttpCaller("echo", binary=True),
    ]
    await asyncio.to_thread(both)
    report = await storm.run(mesh.address, callers, ordeal)
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert report.back_after(0.8) <= 6.0, "after the leases of its replicas"
