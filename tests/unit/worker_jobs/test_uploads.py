"""Nodes of unequal speed send their parts of checkpoints so that the registry gets whole ones."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from penstock.registry.v1 import artifact_pb2
from penstock_kit.errors import FailedPrecondition, Unavailable
from penstock_kit.jobs.checkpoints import checkpoint_artifact
from penstock_worker.adapters.jobs import uploads
from penstock_worker.adapters.jobs.checkpoints import CheckpointStore
from penstock_worker.adapters.jobs.uploads import READY, UPLOADING, Part, Uploads
from penstock_worker.domain.checkpoint import Writing
from support.agent_world import until


class Registry:
    """Keeps artifacts of checkpoints; an upload ends when a test lets it."""

    def __init__(self) -> None:
        self.artifacts: dict[str, artifact_pb2.Artifact] = {}
        self.made = 0
        self.gates: dict[str, asyncio.Semaphore] = {}

    def slow(self, part: int) -> asyncio.Semaphore:
        return self.gates.setdefault(checkpoint_artifact("j", part), asyncio.Semaphore(0))

    async def upload_artifact(
        self, announced: artifact_pb2.Artifact, artifact: str, directory: Path, *, key: str
    ) -> artifact_pb2.Artifact:
        self.made += 1
        announced.name = f"{artifact}/versions/{self.made}"
        announced.state = UPLOADING
        self.artifacts[announced.name] = announced
        if artifact in self.gates:
            await self.gates[artifact].acquire()
        return announced

    async def finalize_artifact(self, name: str) -> None:
        self.artifacts[name].state = READY

    async def artifacts_of(self, artifact: str) -> list[artifact_pb2.Artifact]:
        return [one for name, one in self.artifacts.items() if name.startswith(f"{artifact}/")]

    async def delete_artifact(self, name: str) -> None:
        del self.artifacts[name]

    def steps(self, part: int, *states: int) -> list[int]:
        found = [
            int(one.labels["step"])
            for one in self.artifacts.values()
            if int(one.labels["part"]) == part and one.state in (states or (READY, UPLOADING))
        ]
        return sorted(found)


class Node:
    """One task's part of all this."""

    def __init__(self, number: int, registry: Registry, directory: Path) -> None:
        self.number = number
        self.sent: list[int] = []
        self.used = True
        self.tasks: list[asyncio.Task[None]] = []
        self.store = CheckpointStore(directory / str(number))
        self.uploads = Uploads("j", self.store, registry, self.spawn, lambda: self.used)  # type: ignore[arg-type]

    def spawn(self, _: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    def write(self, step: int, round_: str = "a", *, parts: int = 2, made: int = 0) -> None:
        (self.store.begin(step, round_) / "weights").write_text(str(step))
        self.store.commit(step, 0, 1, round_)
        self.uploads.send(
            Part(
                Writing(step, round_, parts),
                self.number,
                self.store.directory / str(step),
                1,
                lambda step, _: self.sent.append(step),
                made,
            )
        )


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def nodes(registry: Registry, tmp_path: Path) -> tuple[Node, Node]:
    return Node(0, registry, tmp_path), Node(1, registry, tmp_path)


async def test_the_first_sends_no_other_before_the_slowest_has_sent_its_part_of_the_last(
    registry: Registry, nodes: tuple[Node, Node]
) -> None:
    slow = registry.slow(1)
    for step in (1, 2, 3):
        for node in nodes:
            node.write(step)
        await until(lambda: registry.steps(1) == [1])
    assert registry.steps(0) == [1]
    slow.release()
    # What comes then is the newest of both; the one between is left out by both.
    await until(lambda: registry.steps(1, UPLOADING) == [3])
    assert registry.steps(0) == [1, 3]
    slow.release()
    await until(lambda: registry.steps(0) == [3])
    assert registry.steps(1, READY) == [1, 3]
    assert (nodes[0].sent, nodes[1].sent) == ([1, 3], [1, 3])
    await asyncio.gather(*nodes[0].tasks, *nodes[1].tasks)


async def test_a_node_that_is_quicker_sends_what_the_first_has_chosen(
    registry: Registry, nodes: tuple[Node, Node]
) -> None:
    slow = registry.slow(0)
    for node in nodes:
        node.write(1)
    await until(lambda: registry.steps(1, READY) == [1])
    for step in (2, 3, 4):
        for node in nodes:
            node.write(step)
    assert registry.steps(1) == [1]
    slow.release()
    await until(lambda: registry.steps(1, READY) == [1, 4])
    slow.release()
    await until(lambda: nodes[0].sent == [1, 4])
    await asyncio.gather(*nodes[0].tasks, *nodes[1].tasks)


async def test_the_first_does_not_wait_for_parts_of_ranks_that_went_back(
    registry: Registry, nodes: tuple[Node, Node]
) -> None:
    nodes[0].write(4)
    await until(lambda: registry.steps(0, READY) == [4])
    for node in nodes:
        node.write(3, round_="b")
    await until(lambda: registry.steps(1, READY) == [3])
    assert nodes[0].sent == [4, 3]
    await asyncio.gather(*nodes[0].tasks, *nodes[1].tasks)


async def test_what_nobody_leads_is_given_up_with_the_task(
    registry: Registry, nodes: tuple[Node, Node]
) -> None:
    nodes[1].write(1)
    assert nodes[1].uploads.sending
    nodes[1].used = False
    await asyncio.gather(*nodes[1].tasks)
    assert registry.artifacts == {}
    nodes[1].write(2)
    nodes[1].write(3)
    assert not (nodes[1].store.directory / "1").exists()
    nodes[1].used = False
    await asyncio.gather(*nodes[1].tasks)


async def test_a_part_that_the_first_waits_for_is_tried_again_though_newer_ones_wait(
    registry: Registry, nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "FIRST_PAUSE_SECONDS", 0.01)
    upload, tries = registry.upload_artifact, 0

    async def away_once(announced: artifact_pb2.Artifact, artifact: str, directory: Path, *, key: str) -> Any:
        nonlocal tries
        if artifact == checkpoint_artifact("j", 1):
            tries += 1
            if tries == 1:
                nodes[1].write(2)
                raise Unavailable("The registry is away.")
        return await upload(announced, artifact, directory, key=key)

    monkeypatch.setattr(registry, "upload_artifact", away_once)
    for node in nodes:
        node.write(1)
    await until(lambda: nodes[1].sent == [1])
    nodes[0].write(2)
    await asyncio.gather(*nodes[0].tasks, *nodes[1].tasks)
    assert (nodes[0].sent, nodes[1].sent) == ([1, 2], [1, 2])


async def test_what_deleted_jobs_of_the_name_have_left_goes_and_what_later_ones_have_stays(
    registry: Registry, tmp_path: Path
) -> None:
    first, second, third = (Node(0, registry, tmp_path / name) for name in ("first", "second", "third"))
    for node, made, step, left in (first, 1, 50, [50]), (third, 3, 5, [5]), (second, 2, 9, [5, 9]):
        node.write(step, parts=1, made=made)
        await asyncio.gather(*node.tasks)
        assert registry.steps(0) == left


async def test_a_task_sends_no_part_that_a_deleted_job_of_the_name_has_announced(
    registry: Registry, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    earlier = Node(0, registry, tmp_path / "earlier")
    earlier.used = False  # nobody waits for the other parts
    earlier.write(1, made=1)
    await asyncio.gather(*earlier.tasks)
    nodes[1].write(1, made=2)
    nodes[1].used = False
    await asyncio.gather(*nodes[1].tasks)
    assert registry.steps(1) == []


async def test_what_is_deleted_with_its_job_while_it_is_sent_is_not_sent_again(
    registry: Registry, nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def deleted(announced: artifact_pb2.Artifact, artifact: str, directory: Path, *, key: str) -> Any:
        nonlocal tries
        tries += 1
        nodes[0].used = False
        raise FailedPrecondition("It was deleted.")

    monkeypatch.setattr(uploads, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(registry, "upload_artifact", deleted)
    nodes[0].write(1, parts=1)
    async with asyncio.timeout(1.0):
        await asyncio.gather(*nodes[0].tasks)
    assert tries == 1
