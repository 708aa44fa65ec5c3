"""The whole mesh on one machine, as `penstock up` starts it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import penstock
from penstock_local.orphans import MARK
from performance.doors import Door, binary_http_door, wait_answer
from performance.processes import Tree
from performance.servers.base import CannotStart, Running, Server
from performance.workloads import Workload
from support.mesh_process import Mesh

_READY_SECONDS = 60.0


class Ours(Server):
    """Gateway, Redis, a worker with one replica, and the services behind.

    Args:
        gateways: Gateway processes on one port.
        replicas: Copies of the model.
    """

    name = "ours"
    title = "Penstock"
    doors = ("grpc", "http", "wrk")

    def __init__(self, gateways: int = 1, replicas: int = 1) -> None:
        self._gateways = gateways
        self._replicas = replicas

    @contextmanager
    def serve(self, workload: Workload, folder: Path) -> Iterator[Running]:
        """Start a mesh, push and deploy the model, and stop the mesh."""
        data = folder / "data"
        began = time.monotonic()
        environment = {"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"}
        try:
            mesh = Mesh(data, gateways=self._gateways, env=environment)
        except AssertionError as error:
            raise CannotStart(_line(error)) from error
        with mesh, penstock.Client(mesh.address) as client:
            try:
                workload.build(folder / "model")
                client.push(folder / "model", model=workload.model)
                client.deploy(workload.model, replicas=self._replicas)
                client.wait_ready(workload.model, timeout=_READY_SECONDS)
                doors = self._ways(mesh.address, workload)
                wait_answer(doors, workload, mesh.runs, _READY_SECONDS)
            except (penstock.PenstockError, TimeoutError) as error:
                raise CannotStart(f"{_line(error)}; {_last_error(mesh)}") from error
            yield Running(doors, Tree(MARK, str(data.absolute())), time.monotonic() - began)

    @staticmethod
    def _ways(address: str, workload: Workload) -> tuple[Door, ...]:
        return (Door("grpc", address), Door("http", address), binary_http_door(address, workload))


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _last_error(mesh: Mesh) -> str:
    errors = [line for line in mesh.log("gateway-1").splitlines() if '"ERROR"' in line]
    return errors[-1][-300:] if errors else "the gateway logged no error"
