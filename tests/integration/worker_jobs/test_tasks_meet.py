"""Tasks meet again when one goes away while they do."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from penstock_worker.adapters.forkserver import wire
from penstock_worker.adapters.jobs.config import LauncherConfig
from penstock_worker.domain.task import End, EndKind

pytestmark = pytest.mark.training

FIRST = LauncherConfig(
    task="jobs/j/tasks/0",
    index=0,
    tasks=2,
    least_tasks=2,
    ranks=1,
    attempt=1,
    entry="",
    spec="",
    desk="",
    token="",
    directory="",
    log_path="",
    log_bytes=0,
    memory_bytes=0,
    threads=1,
    devices=("cpu",),
    host="127.0.0.1",
    rendezvous="",
    grace_seconds=1,
    max_regroups=3,
)


class Launcher:
    """A group of ranks in a thread, and its launcher's end of the line."""

    def __init__(self, config: LauncherConfig) -> None:
        from penstock_worker.adapters.jobs.group import run_group

        self.line, theirs = socket.socketpair()
        self.line.settimeout(20)
        self._unpacker = wire.Unpacker()
        self._messages: list[Any] = []

        def run() -> None:
            with theirs:
                run_group(config, theirs, 0)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def hear(self, op: str) -> Any:
        """Wait for a message; others before it are read over."""
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if message["op"] == "stop":
                    self.line.sendall(wire.pack({"op": "stopped"}))
                if message["op"] == op:
                    return message
            self._messages.extend(self._unpacker.feed(self.line.recv(65536)))

    def ended(self) -> None:
        """Say that the rank has done its work."""
        end = End(EndKind.SUCCEEDED).to_fields()
        message = {"op": "exited", "generation": 0, "local": 0, "end": end, "killed": 0}
        self.line.sendall(wire.pack(message))


@pytest.fixture
def launchers() -> Iterator[list[Launcher]]:
    found: list[Launcher] = []
    yield found
    for launcher in found:
        launcher.line.close()
        launcher.thread.join(20)


def test_tasks_meet_again_when_one_goes_away_before_it_has_said_who_it_is(
    launchers: list[Launcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import TCPStore

    from penstock_worker.adapters.jobs import group

    monkeypatch.setattr(group, "AGREE_SECONDS", 3.0)
    first = Launcher(FIRST)
    launchers.append(first)
    address = first.hear("rendezvous")["address"]
    second = dataclasses.replace(FIRST, index=1, rendezvous=address)
    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5))
    gone = group.rendezvous(second, store)
    assert gone.next_rendezvous().world_size == 2
    assert "went away while all met" in first.hear("say")["text"]
    gone._stop_heartbeats()  # It never says another word, as one that was killed.
    launchers.append(Launcher(second))
    rounds = [launcher.hear("start")["environments"][0] for launcher in launchers]
    assert [(each["RANK"], each["WORLD_SIZE"]) for each in rounds] == [("0", "2"), ("1", "2")]
    assert rounds[0]["PENSTOCK_ROUND"] == rounds[1]["PENSTOCK_ROUND"] != ""
    launchers[1].ended()
    first.ended()
    assert [End.from_fields(each.hear("end")["end"]).kind for each in launchers] == [EndKind.SUCCEEDED] * 2
