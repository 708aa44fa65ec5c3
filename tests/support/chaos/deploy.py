"""Puts the models of these tests on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import penstock
from support.chaos.faults import ready_replicas
from support.chaos.model import build_python_echo, save_echo
from support.mesh_process import Mesh


def deploy_echo(
    mesh: Mesh,
    folder: Path,
    name: str = "echo",
    *,
    replicas: int = 1,
    versions: int = 1,
    node_selector: Mapping[str, str] | None = None,
) -> None:
    """Deploy the ONNX echo, in as many versions as wanted; the last one serves."""
    with penstock.Client(mesh.address) as client:
        for version in range(1, versions + 1):
            path = save_echo(folder / f"{name}.onnx", version)
            client.push(path, model=name, options=penstock.PackageOptions(max_batch_size=64))
        client.deploy(name, replicas=replicas, node_selector=node_selector)
        client.wait_ready(name)
        wait_replicas(mesh, client, name, replicas)


def deploy_python_echo(
    mesh: Mesh,
    folder: Path,
    name: str,
    *,
    replicas: int = 1,
    seconds: float = 0.0,
    first_seconds: float = 0.0,
    max_batch_size: int = 64,
    max_queue_depth: int | None = None,
) -> None:
    """Deploy the echo in Python; see `build_python_echo`."""
    build_python_echo(
        folder / name, seconds=seconds, first_seconds=first_seconds, max_batch_size=max_batch_size
    )
    with penstock.Client(mesh.address) as client:
        client.push(folder / name, model=name)
        client.deploy(name, replicas=replicas, max_queue_depth=max_queue_depth)
        client.wait_ready(name)
        wait_replicas(mesh, client, name, replicas)


def wait_replicas(mesh: Mesh, client: penstock.Client, deployment: str, count: int) -> None:
    """Wait until so many replicas would answer, and no other one is left: one that drains still answers."""

    def there() -> bool:
        alive = [replica for replica in client.list_replicas(deployment=deployment) if replica.pid]
        return len(ready_replicas(client, deployment)) == len(alive) == count

    mesh.wait(there, f"{count} replicas of {deployment}")
