"""Three hosts, each a network namespace with an address of its own, whose workers joined by a token.

They share nothing with the mesh but a network: bundles come from the registry over gRPC. One is cut off, and
comes back when others have done its work.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import penstock
from penstock.scheduler.v1 import node_pb2
from penstock_local.embedded import EmbeddedRedis
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import ready_replicas
from support.chaos.history import History, Strike
from support.chaos.network import Machine, why_not
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, StreamCaller
from support.chaos.wire import Wire
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

HOSTS = ("host-1", "host-2", "host-3")
TOKEN = "a-token-of-these-three-hosts"
# Elsewhere within 10 s, and time to look at it.
CUT_SECONDS = 14.0
MOVED_SECONDS = 10.0


class Host:
    """A machine with a worker agent, and wires from its network to the services of the mesh.

    Args:
        name: Of the node.
        machine: The namespace.
        mesh: What it joins.
        redis: The socket of the queue.
        folder: For its data and logs.
        stack: Closes its wires.
    """

    def __init__(
        self, name: str, machine: Machine, mesh: Mesh, redis: Path, folder: Path, stack: ExitStack
    ) -> None:
        self.name = name
        self.machine = machine
        self._folder = folder / name
        self._folder.mkdir()
        sockets = {unit: Path(mesh.unit(unit).address.removeprefix("unix:")) for unit in _INNER}
        wires = {unit: stack.enter_context(Wire(path, (machine.here, 0))) for unit, path in sockets.items()}
        queue = stack.enter_context(Wire(redis, (machine.here, 0)))
        # A dead scheduler first: it is passed by.
        found = [f"{machine.here}:1", wires["scheduler-1"].address, wires["scheduler-2"].address]
        self._env = {
            "PENSTOCK_REGISTRY_ADDRESS": wires["registry"].address,
            "PENSTOCK_SCHEDULER_ADDRESS": ",".join(found),
            "PENSTOCK_REDIS_URL": f"redis://{queue.address}",
            "PENSTOCK_DATA_DIR": str(self._folder),
            "PENSTOCK_WORKER_NODE": name,
            "PENSTOCK_WORKER_LABELS": "place=far",
            "PENSTOCK_WORKER_LISTEN": f"unix:{self._folder / 'worker.sock'}",
            "PENSTOCK_WORKER_CPU_MILLIS": "1000",
        }

    @property
    def log(self) -> Path:
        """What its worker said."""
        return self._folder.with_suffix(".log")

    def join(self, token: str) -> None:
        """Start the worker."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        env = {**inherited, **self._env, **({"PENSTOCK_JOIN_TOKEN": token} if token else {})}
        self.machine.run([sys.executable, "-m", "penstock_worker"], env, self.log)

    def replicas(self) -> list[str]:
        """The processes of replicas on it."""
        return [name for name in self.machine.processes() if name.startswith("ps:")]


_INNER = ("registry", "scheduler-1", "scheduler-2")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, dict[str, Host]]]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mesh")
    with ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(tmp_path_factory.mktemp("redis"), persist=False))
        env = {"PENSTOCK_REDIS_URL": redis.url, "PENSTOCK_JOIN_TOKEN": TOKEN}
        mesh = stack.enter_context(Mesh(folder / "data", schedulers=2, env=env))
        hosts = {}
        for name in HOSTS:
            machine = stack.enter_context(Machine())
            hosts[name] = Host(name, machine, mesh, redis.socket_path, folder, stack)
            stack.callback(machine.stop)
        yield mesh, hosts


def ready_nodes(client: penstock.Client) -> set[str]:
    ready = [node for node in client.list_nodes() if node.state == node_pb2.NODE_STATE_READY]
    return {node.name.removeprefix("nodes/") for node in ready}


def where(client: penstock.Client) -> Counter[str]:
    """How many replicas that would answer are on each node."""
    pids = ready_replicas(client, "echo")
    found = client.list_replicas(deployment="echo")
    return Counter(each.node.removeprefix("nodes/") for each in found if each.pid in pids)


def test_a_host_with_no_token_or_another_one_does_not_join_and_is_told_why(
    mesh: tuple[Mesh, dict[str, Host]],
) -> None:
    services, hosts = mesh
    host = hosts["host-1"]
    for token, words in (
        ("", "with a join token only"),
        ("another-token-than-theirs", "none of the scheduler's"),
    ):
        host.join(token)
        services.wait(lambda words=words: words in host.log.read_text(), "the worker says why", 60)
        host.machine.stop()
    with penstock.Client(services.address) as client:
        assert ready_nodes(client) == {"worker-1"}


async def test_a_host_that_is_cut_off_is_replaced_within_ten_seconds_and_runs_nothing_twice(
    mesh: tuple[Mesh, dict[str, Host]], storm: Storm, tmp_path: Path
) -> None:
    services, hosts = mesh
    cut = hosts["host-2"]

    def arrange() -> None:
        for host in hosts.values():
            host.join(TOKEN)
        with penstock.Client(services.address) as client:
            services.wait(lambda: ready_nodes(client) >= set(HOSTS), "three hosts have joined", 90)
            deploy_echo(services, tmp_path, replicas=3, node_selector={"place": "far"})
            assert where(client) == Counter(HOSTS), "one replica on each host"

    def pull_out() -> float:
        began = time.monotonic()
        cut.machine.pull_out()
        with penstock.Client(services.address) as client:
            services.wait(lambda: where(client) in MOVED, "three replicas on the other two hosts")
        return time.monotonic() - began

    def come_back() -> None:
        cut.machine.plug_in()
        with penstock.Client(services.address) as client:
            services.wait(lambda: cut.name in ready_nodes(client), "the host is back")
            wait_replicas(services, client, "echo", 3)
            placed = where(client)
        services.wait(
            lambda: all(len(host.replicas()) == placed[name] for name, host in hosts.items()),
            "each host runs what is placed on it, and nothing else",
        )

    async def ordeal(history: History) -> None:
        strike = Strike("a host is cut off", [], time.monotonic())
        strike.done = began = time.monotonic()
        took.append(await asyncio.to_thread(pull_out))
        await asyncio.sleep(max(CUT_SECONDS - (time.monotonic() - began), 0))
        await asyncio.to_thread(come_back)
        strike.ended = time.monotonic()
        history.struck(strike)

    took: list[float] = []
    await asyncio.to_thread(arrange)
    callers: list[Caller] = [GrpcCaller("echo", rows=(1, 4)) for _ in range(12)]
    callers += [
        StreamCaller("echo"),
        StreamCaller("echo"),
        HttpCaller("echo"),
        HttpCaller("echo", binary=True),
    ]
    report = await storm.run(services.address, callers, ordeal)
    print(f"  its replica served elsewhere after {took[0]:.1f} s")
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert took[0] <= MOVED_SECONDS


MOVED = (Counter({"host-1": 2, "host-3": 1}), Counter({"host-1": 1, "host-3": 2}))
