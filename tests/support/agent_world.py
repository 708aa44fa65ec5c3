"""What a worker agent sees of the world: a scheduler and a registry that do as a test says, over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from penstock.common.v1 import resources_pb2
from penstock.registry.v1 import manifest_pb2, registry_service_pb2, registry_service_pb2_grpc, version_pb2
from penstock.scheduler.v1 import job_pb2, node_service_pb2, node_service_pb2_grpc, replica_pb2
from penstock_kit.artifacts import canonical_manifest, tree_digest
from penstock_kit.errors import Aborted, NotFound, Reason, Unavailable
from penstock_kit.queue.keys import queue_name
from penstock_kit.rpc import RpcServer

CHUNK_BYTES = 256 * 1024
PATIENCE_SECONDS = 30.0


async def until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait for a condition; return what it gave."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not (result := condition()):
        assert loop.time() < deadline, f"waited {seconds} s for {what or 'a condition'}"
        await asyncio.sleep(0.01)
    return result


def alive(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class World(node_service_pb2_grpc.NodeServiceServicer, registry_service_pb2_grpc.RegistryServiceServicer):
    """A scheduler for one node, and a registry."""

    def __init__(self, listen: str) -> None:
        self.listen = listen
        self.address = listen
        self.statuses: list[node_service_pb2.AttachRequest] = []
        self.attaches = 0
        self.metadata: dict[str, Any] = {}
        self.refusing = False
        self.name_is_taken = False
        self.downloads: list[tuple[str, str, int]] = []
        self.broken_after: dict[str, list[int]] = {}
        self.altered: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self._generation = 0
        self._desired: dict[str, replica_pb2.ReplicaSpec] = {}
        self._tasks: dict[str, job_pb2.TaskSpec] = {}
        self._files: dict[tuple[str, str], bytes] = {}
        self._versions: dict[str, version_pb2.Version] = {}
        self._changed = asyncio.Event()
        self._server: RpcServer | None = None

    async def start(self) -> None:
        server = self._server = RpcServer(self.listen)
        server.add(
            node_service_pb2_grpc.add_NodeServiceServicer_to_server, self, "penstock.scheduler.v1.NodeService"
        )
        server.add(
            registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
            self,
            "penstock.registry.v1.RegistryService",
        )
        await server.start()
        self.address = self.listen = server.address

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=0)
            self._server = None

    def push(
        self,
        files: dict[str, bytes],
        number: int = 1,
        manifest: manifest_pb2.Manifest | None = None,
    ) -> version_pb2.Version:
        """Register a version."""
        name = f"models/m/versions/{number}"
        described = manifest or manifest_pb2.Manifest(
            runtime="torch", format="pt2", entrypoint=next(iter(files))
        )
        listed = [
            version_pb2.BundleFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in files.items()
        ]
        digest = tree_digest(
            canonical_manifest(described), [(f.path, f.size_bytes, f.sha256) for f in listed]
        )
        for path, data in files.items():
            self._files[name, path] = data
        version = version_pb2.Version(
            name=name, number=number, manifest=described, files=listed, digest=digest
        )
        self._versions[name] = version
        return version

    def push_toy(
        self, number: int = 1, more: dict[str, bytes] | None = None, **behaviour: Any
    ) -> version_pb2.Version:
        """Register a version for `support.toy_replica`."""
        return self.push({"behaviour.json": json.dumps(behaviour).encode(), **(more or {})}, number=number)

    def want(self, replica: str, version: version_pb2.Version, **fields: Any) -> replica_pb2.ReplicaSpec:
        """Want a replica on the node."""
        spec = replica_pb2.ReplicaSpec(
            name=f"replicas/{replica}",
            deployment="deployments/d",
            version=version.name,
            digest=version.digest,
            manifest=version.manifest,
            files=version.files,
            queue=queue_name("d", version.number, version.digest),
            resources=resources_pb2.Resources(cpu_millis=100),
        )
        for key, value in fields.items():
            if isinstance(value, resources_pb2.Resources | resources_pb2.Batching):
                getattr(spec, key).CopyFrom(value)
            elif isinstance(value, list):
                getattr(spec, key).extend(value)
            else:
                setattr(spec, key, value)
        self._desired[replica] = spec
        self.tell()
        return spec

    def drop(self, replica: str) -> None:
        """Want a replica no more."""
        del self._desired[replica]
        self.tell()

    def want_task(self, job: job_pb2.Job, number: int = 0, **fields: Any) -> job_pb2.TaskSpec:
        """Want a task of a job on the node."""
        spec = job_pb2.TaskSpec(
            name=f"{job.name}/tasks/{number}",
            attempt=fields.pop("attempt", 1),
            tasks=fields.pop("tasks", 1),
            job=job,
            resources=resources_pb2.Resources(
                cpu_millis=1000 * max(1, job.ranks_per_node),
                memory_bytes=fields.pop("memory_bytes", 2 * 1024**3),
            ),
            **fields,
        )
        self._tasks[spec.name] = spec
        self.tell()
        return spec

    def change_task(self, name: str, **fields: Any) -> None:
        """Change what is wanted of a task."""
        for key, value in fields.items():
            setattr(self._tasks[name], key, value)
        self.tell()

    def drop_task(self, name: str) -> None:
        """Want a task no more."""
        del self._tasks[name]
        self.tell()

    def observed_task(self, name: str) -> job_pb2.ObservedTask | None:
        """Return what the newest status says of a task."""
        if not self.statuses:
            return None
        return next((task for task in self.statuses[-1].tasks if task.name == name), None)

    async def task_state(
        self, name: str, state: str, seconds: float = PATIENCE_SECONDS
    ) -> job_pb2.ObservedTask:
        """Wait until a task is reported in a state; fail at once if it FAILED instead."""
        number = job_pb2.TaskState.Value(f"TASK_STATE_{state}")

        def reached() -> job_pb2.ObservedTask | None:
            seen = self.observed_task(name)
            if seen is not None and seen.state == job_pb2.TASK_STATE_FAILED != number:
                raise AssertionError(f"{name} FAILED: {seen.failure_reason}: {seen.message}")
            return seen if seen is not None and seen.state == number else None

        found: job_pb2.ObservedTask = await until(
            reached, f"{name} to be {state}; it is {self.observed_task(name)}", seconds
        )
        return found

    def tell(self) -> None:
        """Send the desired state down."""
        self._generation += 1
        self._changed.set()

    def observed(self, replica: str) -> replica_pb2.ObservedReplica | None:
        """Return what the newest status says of a replica."""
        if not self.statuses:
            return None
        return next((r for r in self.statuses[-1].replicas if r.name == f"replicas/{replica}"), None)

    async def state(
        self, replica: str, state: str, seconds: float = PATIENCE_SECONDS
    ) -> replica_pb2.ObservedReplica:
        """Wait until a replica is reported in a state."""
        number = replica_pb2.ReplicaState.Value(f"REPLICA_STATE_{state}")

        def reached() -> replica_pb2.ObservedReplica | None:
            seen = self.observed(replica)
            return seen if seen is not None and seen.state == number else None

        found: replica_pb2.ObservedReplica = await until(
            reached, f"{replica} to be {state}; it is {self.observed(replica)}", seconds
        )
        return found

    async def Attach(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[node_service_pb2.AttachResponse]:
        self.attaches += 1
        self.metadata = dict(context.invocation_metadata())
        if self.refusing:
            raise Unavailable("Another scheduler leads.")
        if self.name_is_taken:
            raise Aborted("Another machine is nodes/test-node.", reason=Reason.CONFLICT)
        self.statuses.clear()

        async def listen() -> None:
            async for status in request_iterator:
                self.statuses.append(status)

        listening = asyncio.ensure_future(listen())
        try:
            while not listening.done():
                self._changed.clear()
                yield node_service_pb2.AttachResponse(
                    generation=self._generation,
                    replicas=self._desired.values(),
                    tasks=self._tasks.values(),
                )
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({changed, listening}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await listening

    async def DownloadArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.downloads.append((request.version, request.path, request.offset))
        data = self._files.get((request.version, request.path))
        if data is None:
            raise NotFound(f"{request.version} has no file {request.path}.")
        if request.path in self.altered:
            data = bytes(byte ^ 1 for byte in data)
        breaks = self.broken_after.get(request.path, [])
        end = min(len(data), request.offset + breaks.pop(0)) if breaks else len(data)
        at = request.offset
        while at < end:
            await self.gate.wait()
            piece = data[at : min(end, at + CHUNK_BYTES)]
            at += len(piece)
            yield registry_service_pb2.DownloadArtifactResponse(chunk=piece)
        if end < len(data):
            raise Unavailable("The registry goes away in the middle.")


def command_name(pid: int) -> str:
    """Return the name of a process as process lists show it."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def kill(pid: int) -> None:
    """End a process that a test started, without warning."""
    os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Return the running processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


async def fork_server_of(pid: int) -> int:
    """Wait for the fork server of an agent; return its process id."""

    def found() -> int:
        for child in children_of(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        return 0

    return int(await until(found, f"a fork server of process {pid}"))
