"""What the harness knows of a server: how to get it, start it, and see all of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from penstock_local.spawn import spawn
from performance import environments
from performance.doors import Door, wait_answer
from performance.processes import Tree
from performance.workloads import Workload

_START_SECONDS = 90.0
_LOG_CHARACTERS = 300


class CannotStart(Exception):
    """A server does not come up; the message, of one line, has its last word."""


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        doors: The ways in, the preferred one first.
        tree: Its processes.
        start_seconds: From the start of its process to its first right answer.
    """

    doors: tuple[Door, ...]
    tree: Tree
    start_seconds: float

    def door(self, name: str) -> Door:
        """Return a way in.

        Raises:
            KeyError: It has none of that name.
        """
        for door in self.doors:
            if door.name == name:
                return door
        raise KeyError(name)


class Server(ABC):
    """Something that serves a model.

    Attributes:
        name: How it is chosen on the command line.
        title: For the table, with the version.
        doors: Names of its doors.
        workloads: What it can serve.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    doors: ClassVar[tuple[str, ...]]
    workloads: ClassVar[tuple[str, ...]] = ("w1", "w2", "sleep")

    def install(self) -> None:  # noqa: B027 - most need nothing
        """Get what it needs.

        Raises:
            CannotInstall: It is not to be had here.
        """

    @abstractmethod
    def serve(self, workload: Workload, folder: Path) -> AbstractContextManager[Running]:
        """Serve a model out of an empty folder while the body of a `with` runs.

        Raises:
            CannotStart: It does not come up.
        """


class Process(Server):
    """A server that is one command, with whatever it starts."""

    ports: ClassVar[int] = 1

    @abstractmethod
    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Write what it needs into the folder and say how it is started."""

    @abstractmethod
    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """Its doors."""

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """Variables it wants besides those of the workload."""
        return {}

    @contextmanager
    def serve(self, workload: Workload, folder: Path) -> Iterator[Running]:
        """Start the command, wait for right answers on all doors, and end the whole tree."""
        ports = free_ports(self.ports)
        tree = Tree("PENSTOCK_BENCH_TREE", uuid.uuid4().hex)
        command = self.command(workload, folder, ports)
        environment = {
            **os.environ,
            "BENCH_WORKLOAD": workload.key,
            "BENCH_MAX_BATCH": str(workload.max_batch),
            "BENCH_WAIT_SECONDS": str(workload.wait_seconds),
            # The harness's own modules are not the peer's.
            "PYTHONPATH": str(environments.REQUIREMENTS),
            **self.environment(workload, folder),
            **tree.environment,
        }
        log = folder / "server.log"
        began = time.monotonic()
        with log.open("wb") as output:
            # It ends with the harness, even if that is killed.
            process = spawn(command, output=output, env=environment, cwd=folder, death_signal=signal.SIGTERM)
        try:
            doors = self.ways(workload, ports)
            try:
                wait_answer(doors, workload, lambda: process.poll() is None, _START_SECONDS)
            except TimeoutError as error:
                said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                last = said[-1][:_LOG_CHARACTERS] if said else "it said nothing"
                raise CannotStart(f"{error}; its last word: {last}") from error
            yield Running(doors, tree, time.monotonic() - began)
        finally:
            tree.end()
            process.wait(10)


class Peer(Process):
    """Another server, in an environment of its own.

    Attributes:
        environment_name: Of its requirements and its virtual environment.
        interpreter: What that is made with.
    """

    environment_name: ClassVar[str]
    interpreter: ClassVar[str] = sys.executable

    def install(self) -> None:
        """Make its environment."""
        if not shutil.which(self.interpreter):
            raise environments.CannotInstall(f"{self.interpreter} is not there")
        environments.python_of(self.environment_name, self.interpreter)

    @property
    def home(self) -> Path:
        """Its virtual environment."""
        return environments.STORE / "venvs" / self.environment_name

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.home / "bin/python")


def free_ports(number: int) -> list[int]:
    """Ports of the loopback interface that nobody has at this moment."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
