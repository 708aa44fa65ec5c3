"""Faults under the callers of an ensemble: of its own replica, of its steps', and of what both stand on.

tests/chaos/README.md says how the parts of these tests hang together, and lists the bugs that they found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import penstock
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import Fault, KillReplica, KillUnit, pause_replica, strike
from support.chaos.history import History
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, SdkCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

# `first` feeds two that run side by side, whose answers are joined: as one echo they answer what one would.
DESCRIPTION = """\
inputs: [input]
outputs: [output, version]
steps:
- {model: first, inputs: {input: input}, outputs: {output: passed}}
- {model: second, inputs: {input: passed}, outputs: {output: output}}
- {model: third, inputs: {input: passed}, outputs: {version: version}}
"""
STEPS = ("first", "second", "third")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data") as mesh:
        for name in STEPS:
            deploy_echo(mesh, folder, name)
        (folder / "ensemble.yaml").write_text(DESCRIPTION)
        with penstock.Client(mesh.address) as client:
            client.push(folder / "ensemble.yaml", model="echo")
            client.deploy("echo")
            client.wait_ready("echo")
            wait_replicas(mesh, client, "echo", 1)
        yield mesh


def callers() -> list[Caller]:
    """Sixteen of them, in three shapes."""
    found: list[Caller] = [GrpcCaller("echo", rows=(1, 4)) for _ in range(11)]
    found += [HttpCaller("echo"), HttpCaller("echo", binary=True)]
    found += [SdkCaller("echo") for _ in range(3)]
    return found


@pytest.mark.parametrize("victim", ["echo", "first", "third"])
async def test_a_killed_replica_of_an_ensemble_or_a_step_fails_no_call(
    mesh: Mesh, storm: Storm, victim: str
) -> None:
    report = await storm.run(
        mesh.address, callers(), lambda history: strike(KillReplica(mesh, victim), history)
    )
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert report.back_after(0.8) <= 3.0


async def test_replicas_that_are_killed_one_after_the_other_fail_no_call(mesh: Mesh, storm: Storm) -> None:
    async def one_after_the_other(history: History) -> None:
        for victim in ("echo", "second", "echo", "first"):
            await strike(KillReplica(mesh, victim), history)

    report = await storm.run(mesh.address, callers(), one_after_the_other)
    report.must_be_good()
    assert report.verdict.failures() == 0


@pytest.mark.parametrize(
    "fault",
    [
        lambda mesh: KillUnit(mesh, "scheduler"),
        lambda mesh: KillUnit(mesh, "redis"),
        lambda mesh: KillUnit(mesh, "worker-1"),
        lambda mesh: pause_replica(mesh, "second"),
        lambda mesh: pause_replica(mesh, "echo"),
    ],
    ids=["scheduler killed", "redis killed", "worker killed", "step stopped", "ensemble stopped"],
)
async def test_what_an_ensemble_stands_on_may_go_and_come_back(
    mesh: Mesh, storm: Storm, fault: Callable[[Mesh], Fault]
) -> None:
    report = await storm.run(mesh.address, callers(), lambda history: strike(fault(mesh), history, 2.0))
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert report.back_after(0.7) <= 10.0
