"""Several schedulers, one of which leads: it is killed, stopped, and restarted, with all else, under load."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import penstock
from penstock.rollouts import rollout_policy
from penstock.scheduler.v1 import rollout_pb2
from penstock_local.restart import restart
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import ready_replicas
from support.chaos.history import History, Strike
from support.chaos.leaders import books, leader, leaders, schedulers, seconds_until_another_leads
from support.chaos.model import save_echo
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, SdkCaller, StreamCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

TAKEOVER_SECONDS = 5.0
BURST = 40
STOPPED_SECONDS = 12.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data", schedulers=3, gateways=2, workers=2) as mesh:
        deploy_echo(mesh, folder, replicas=2)
        yield mesh


def callers(number: int = 16, *, retry: bool = False) -> list[Caller]:
    found: list[Caller] = [HttpCaller("echo"), HttpCaller("echo", binary=True)]
    found += [SdkCaller("echo") for _ in range(2)]
    if not retry:
        found += [StreamCaller("echo") for _ in range(2)]
    return found + [GrpcCaller("echo", rows=(1, 4), retry=retry) for _ in range(number - len(found))]


def wait_balanced(mesh: Mesh) -> None:
    mesh.wait(lambda: books(mesh).balanced, "each replica has one allocation and one process")


async def test_a_killed_leader_is_replaced_within_five_seconds_and_fails_no_call(
    mesh: Mesh, storm: Storm
) -> None:
    def pids() -> list[int]:
        with penstock.Client(mesh.address) as client:
            wait_replicas(mesh, client, "echo", 2)
            return sorted(ready_replicas(client, "echo"))

    def kill() -> float:
        old = leader(mesh)
        mesh.kill(old)
        return seconds_until_another_leads(mesh, old)

    async def ordeal(history: History) -> None:
        strike = Strike("SIGKILL to the leader", [], time.monotonic())
        strike.done = time.monotonic()
        took.append(await asyncio.to_thread(kill))
        strike.ended = time.monotonic()
        history.struck(strike)

    took: list[float] = []
    before = await asyncio.to_thread(pids)
    report = await storm.run(mesh.address, callers(), ordeal)
    print(f"  another scheduler led after {took[0]:.2f} s")
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert took[0] < TAKEOVER_SECONDS
    assert await asyncio.to_thread(pids) == before, "nothing was placed again"
    await asyncio.to_thread(wait_balanced, mesh)


async def test_a_leader_killed_in_a_burst_of_placements_loses_and_doubles_none(
    mesh: Mesh, storm: Storm, tmp_path: Path
) -> None:
    names = [f"burst-{number}" for number in range(BURST)]

    def push() -> None:
        with penstock.Client(mesh.address) as client:
            client.push(tmp_path / "burst.onnx", model="burst")

    def create(name: str) -> None:
        with penstock.Client(mesh.address, retry_seconds=30, timeout=30) as client:
            client.deploy(name, "burst:1")

    def burst() -> tuple[float, float]:
        old, epoch = leader(mesh), books(mesh).epoch
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            created = [pool.submit(create, name) for name in names]
            mesh.wait(lambda: len(books(mesh).placed) > BURST // 4, "a part of the burst is placed")
            mesh.kill(old)
            took = seconds_until_another_leads(mesh, old)
            for each in created:
                each.result()
        with penstock.Client(mesh.address) as client:
            for name in names:
                client.wait_ready(name)
        assert books(mesh).epoch > epoch
        return took, time.monotonic() - began

    async def ordeal(_: History) -> None:
        took.extend(await asyncio.to_thread(burst))

    def after() -> None:
        wait_balanced(mesh)
        ledger = books(mesh)
        assert len(ledger.placed) == BURST + 2, "one for each, and the two that served"
        with penstock.Client(mesh.address) as client:
            for name in names:
                assert len(client.list_replicas(deployment=name)) == 1
            for name in names:
                client.undeploy(name)
        mesh.wait(lambda: len(books(mesh).placed) == 2, "the burst is gone")
        wait_balanced(mesh)

    took: list[float] = []
    save_echo(tmp_path / "burst.onnx", 1)
    await asyncio.to_thread(push)
    report = await storm.run(mesh.address, callers(8), ordeal)
    print(f"  another scheduler led after {took[0]:.2f} s; {BURST} deployments READY after {took[1]:.1f} s")
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert took[0] < TAKEOVER_SECONDS
    await asyncio.to_thread(after)


async def test_a_leader_that_is_stopped_is_deposed_and_changes_nothing_when_it_goes_on(
    mesh: Mesh, storm: Storm
) -> None:
    def stop() -> float:
        old = leader(mesh)
        pid = mesh.kill(old, signal.SIGSTOP)
        began = time.monotonic()
        try:
            took = seconds_until_another_leads(mesh, old)
            deposed_for = STOPPED_SECONDS - (time.monotonic() - began)
            time.sleep(max(deposed_for, 0))  # agents and gateways notice, and go to the one that leads
        finally:
            os.kill(pid, signal.SIGCONT)
        mesh.wait(lambda: leaders(mesh, [old]) == [], "the one that was stopped follows")
        assert len(leaders(mesh)) == 1
        return took

    async def ordeal(_: History) -> None:
        took.append(await asyncio.to_thread(stop))

    def running() -> set[str]:
        wait_balanced(mesh)
        return set(books(mesh).running)

    took: list[float] = []
    before = await asyncio.to_thread(running)
    report = await storm.run(mesh.address, callers(), ordeal)
    print(f"  another scheduler led after {took[0]:.2f} s")
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert took[0] < 10.0
    assert await asyncio.to_thread(running) == before, "nothing was placed again"


async def test_a_rollout_whose_leader_is_killed_is_finished_by_the_next_one(
    mesh: Mesh, storm: Storm, tmp_path: Path
) -> None:
    name = "rolled"

    def prepare() -> None:
        deploy_echo(mesh, tmp_path, name)
        with penstock.Client(mesh.address) as client:
            client.push(
                save_echo(tmp_path / "second.onnx", 2),
                model=name,
                options=penstock.PackageOptions(max_batch_size=64),
            )

    def roll() -> tuple[float, float, rollout_pb2.Rollout]:
        with penstock.Client(mesh.address, retry_seconds=30, timeout=30) as client:
            policy = rollout_policy("canary", steps=[20, 50, 100], step_seconds=2, max_latency_ratio=10)
            asked = client.deploy(name, f"{name}:2", rollout_policy=policy)

            def runs() -> bool:
                found = {each.name: each for each in client.list_rollouts(name)}
                return any(each.state == rollout_pb2.ROLLOUT_STATE_RUNNING for each in found.values())

            mesh.wait(runs, "the rollout is under way")
            old = leader(mesh)
            mesh.kill(old)
            killed = time.monotonic()
            took = seconds_until_another_leads(mesh, old)
            ended = client.watch_rollout(name, asked.revision, timeout=60)
            return took, time.monotonic() - killed, ended

    async def ordeal(_: History) -> None:
        found.append(await asyncio.to_thread(roll))

    found: list[tuple[float, float, rollout_pb2.Rollout]] = []
    await asyncio.to_thread(prepare)
    asking: list[Caller] = [GrpcCaller(name, rows=(1, 4)) for _ in range(8)]
    report = await storm.run(mesh.address, asking, ordeal, versions={name: ["1", "2"]})
    took, finished, ended = found[0]
    print(f"  another scheduler led after {took:.2f} s; the rollout ended {finished:.1f} s after the kill")
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert took < TAKEOVER_SECONDS
    assert ended.state == rollout_pb2.ROLLOUT_STATE_SUCCEEDED, ended
    await asyncio.to_thread(wait_balanced, mesh)


@pytest.mark.parametrize("retry", [True, False], ids=["who_retry", "who_do_not"])
async def test_everything_is_restarted_in_turn_unseen_by_thirty_two_callers(
    mesh: Mesh, storm: Storm, retry: bool
) -> None:
    said: list[str] = []

    async def ordeal(_: History) -> None:
        await restart(mesh.data_dir, say=said.append)

    report = await storm.run(mesh.address, callers(32, retry=retry), ordeal)
    print("  " + ", ".join(said))
    report.must_be_good()
    assert len(said) == 1 + len(schedulers(mesh)) + 2 + 2
    assert report.verdict.failures() == 0
    await asyncio.to_thread(wait_balanced, mesh)
