"""What jobs want of the registry: what to fetch, and uploads that go on where they stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.json_format import ParseDict

from penstock.registry.v1 import (
    artifact_pb2,
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    manifest_pb2,
    registry_service_pb2,
    registry_service_pb2_grpc,
    version_pb2,
)
from penstock_kit.artifacts.digest import sha256_of_file
from penstock_kit.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    Unavailable,
)
from penstock_kit.threads import in_thread
from penstock_worker.adapters import bundle_files

CHUNK_BYTES = 1 << 20
PARALLEL_FILES = 4
PATIENCE_SECONDS = 300.0
"""How long the registry may be away before a job fails for it (and starts again, as that may pass)."""
FIRST_PAUSE_SECONDS = 0.2
LAST_PAUSE_SECONDS = 5.0
FILE_SECONDS = 3600.0
CHANGE_TRIES = 5
"""Of a change of a version that others change at the same time."""
MADE_ANEW = 100
"""Times at most that one thing is made, when what was made before is deleted."""
_NAMESPACE = uuid.UUID("a7b2b7c4-3f0e-5d0e-9d4c-1f6f2a4b9c11")

T = TypeVar("T")


class _Uploaded(Protocol):
    """What has files that are being received."""

    @property
    def name(self) -> str:
        """Its resource name."""

    @property
    def files(self) -> Any:
        """Its files, `penstock.registry.v1.BundleFile`."""


Found = TypeVar("Found", bound=_Uploaded)


def request_id(*parts: str) -> str:
    """Return the key that makes a repetition safe: the same for the same parts, on every node."""
    return str(uuid.uuid5(_NAMESPACE, "\n".join(parts)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Way(Generic[Found]):
    """How one kind of thing is uploaded."""

    send: Callable[[str, str, int, Path], Awaitable[Any]]
    look: Callable[[str], Awaitable[Found]]


class JobRegistry:
    """See the module.

    Args:
        channel: To the registry.
        patience_seconds: How long it may be away.
    """

    def __init__(self, channel: grpc.aio.Channel, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._models = registry_service_pb2_grpc.RegistryServiceStub(channel)
        self._artifacts = artifact_service_pb2_grpc.ArtifactServiceStub(channel)
        self._patience_seconds = patience_seconds

    async def version(self, name: str) -> version_pb2.Version:
        """Return a version.

        Raises:
            PenstockError: As the registry says.
        """
        request = registry_service_pb2.GetVersionRequest(name=name)
        return await self._patiently(lambda: self._models.GetVersion(request))

    async def record_profile(self, name: str, profile: version_pb2.DeviceProfile) -> None:
        """Put a profile on a version, in place of the one of the same device.

        Raises:
            PenstockError: As the registry says.
        """

        def change(version: version_pb2.Version) -> None:
            others = [each for each in version.profiles if each.device != profile.device]
            del version.profiles[:]
            version.profiles.extend([*others, profile])

        await self._change(name, change, "profiles")

    async def record_metrics(self, name: str, metrics: Mapping[str, float]) -> None:
        """Put metrics into a version's manifest, beside those of other names.

        Raises:
            PenstockError: As the registry says.
        """
        await self._change(name, lambda version: version.manifest.metrics.update(metrics), "manifest.metrics")

    async def _change(self, name: str, change: Callable[[version_pb2.Version], None], field: str) -> None:
        """Change one field of a version; begun anew if somebody else was quicker."""
        for _ in range(CHANGE_TRIES):
            version = await self.version(name)
            change(version)
            request = registry_service_pb2.UpdateVersionRequest(version=version)
            request.update_mask.paths.append(field)
            try:
                await self._patiently(functools.partial(self._models.UpdateVersion, request))
            except Aborted as error:
                conflict = error
            else:
                return
        raise conflict

    async def artifact(self, name: str) -> artifact_pb2.Artifact:
        """Return an artifact.

        Raises:
            PenstockError: As the registry says.
        """
        request = artifact_service_pb2.GetArtifactRequest(name=name)
        return await self._patiently(lambda: self._artifacts.GetArtifact(request))

    async def upload_version(
        self,
        model: str,
        directory: Path,
        manifest: manifest_pb2.Manifest,
        labels: Mapping[str, str],
        *,
        job: str,
    ) -> version_pb2.Version:
        """Upload a bundle as a new version, in UPLOADING; the same one for the same job and contents.

        Args:
            model: models/{model}.
            directory: The files of the bundle.
            manifest: Its manifest.
            labels: Of the version.
            job: Tells the job that made it from all others, those of the same name included.

        Raises:
            PenstockError: As the registry says.
        """
        files = await in_thread(listed, directory)
        key = request_id(
            job, model, _fingerprint(files), manifest.SerializeToString(deterministic=True).hex()
        )
        request = registry_service_pb2.CreateVersionRequest(
            parent=model,
            manifest=manifest,
            files=files,
            labels=labels,
            allow_create_model=True,
        )
        usable = (version_pb2.VERSION_STATE_UPLOADING, version_pb2.VERSION_STATE_READY)
        made: version_pb2.Version = await self._make(self._models.CreateVersion, request, key, usable)
        if made.state == version_pb2.VERSION_STATE_UPLOADING:
            await self._upload(made, directory, _Way(self._send_version_file, self.version))
        return made

    async def upload_artifact(
        self, announced: artifact_pb2.Artifact, artifact: str, directory: Path, *, key: str
    ) -> artifact_pb2.Artifact:
        """Upload a directory as an artifact, in UPLOADING; the same one for the same key and contents.

        Args:
            announced: Its kind, format, description, labels and job.
            artifact: artifacts/{artifact}.
            directory: Its files.
            key: Tells this artifact from others.

        Raises:
            PenstockError: As the registry says.
        """
        files = await in_thread(listed, directory)
        announced.files.extend(files)
        request = artifact_service_pb2.CreateArtifactRequest(
            parent=artifact,
            artifact=announced,
        )
        usable = (artifact_pb2.ARTIFACT_STATE_UPLOADING, artifact_pb2.ARTIFACT_STATE_READY)
        first = request_id(key, artifact, _fingerprint(files))
        made: artifact_pb2.Artifact = await self._make(self._artifacts.CreateArtifact, request, first, usable)
        if made.state == artifact_pb2.ARTIFACT_STATE_UPLOADING:
            await self._upload(made, directory, _Way(self._send_artifact_file, self.artifact))
        return made

    async def _make(
        self, create: Callable[[Any], Awaitable[Any]], request: Any, key: str, usable: Collection[int]
    ) -> Any:
        """Make what a key stands for, or get what was made for it; anew where that was deleted since.

        Which key follows is known from what was deleted: who repeats the call comes to the same end.
        """
        for _ in range(MADE_ANEW):
            request.request_id = key
            made = await self._patiently(lambda: create(request))
            if made.state in usable:
                return made
            key = request_id(key, made.name)
        raise FailedPrecondition(
            f"{made.name} was deleted, and so were {MADE_ANEW - 1} with the same contents before it. Choose "
            "another name for the job.",
            reason=Reason.WRONG_STATE,
            metadata={"name": made.name},
        )

    async def finalize_artifact(self, name: str) -> artifact_pb2.Artifact:
        """Make an artifact READY."""
        request = artifact_service_pb2.FinalizeArtifactRequest(name=name)
        return await self._patiently(lambda: self._artifacts.FinalizeArtifact(request, timeout=FILE_SECONDS))

    async def artifacts_of(self, artifact: str) -> list[artifact_pb2.Artifact]:
        """Return the versions of an artifact, newest first; at most a hundred, none if there is no such."""
        request = artifact_service_pb2.ListArtifactsRequest(
            parent=artifact, kind=artifact_pb2.ARTIFACT_KIND_CHECKPOINT
        )
        try:
            found = await self._patiently(lambda: self._artifacts.ListArtifacts(request))
        except NotFound:
            return []
        return list(found.artifacts)

    async def delete_artifact(self, name: str) -> None:
        """Delete an artifact; fine if somebody has."""
        request = artifact_service_pb2.DeleteArtifactRequest(name=name)
        try:
            await self._artifacts.DeleteArtifact(request)
        except (NotFound, FailedPrecondition):
            return

    async def _upload(self, made: Found, directory: Path, way: _Way[Found]) -> None:
        slots = asyncio.Semaphore(PARALLEL_FILES)

        async def send(file: version_pb2.BundleFile) -> None:
            async with slots:
                await self._send(made.name, file, directory / file.path, way)

        try:
            async with asyncio.TaskGroup() as group:
                for file in made.files:
                    if file.received_bytes < file.size_bytes:
                        group.create_task(send(file))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _send(self, name: str, file: version_pb2.BundleFile, path: Path, way: _Way[Found]) -> None:
        """Send what the registry lacks of one file; go on where it stopped when the way is cut."""
        offset = file.received_bytes
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._patience_seconds, FIRST_PAUSE_SECONDS
        while offset < file.size_bytes:
            try:
                answer = await way.send(name, file.path, offset, path)
                offset = answer.file.received_bytes
                continue
            except (Unavailable, DeadlineExceeded, Aborted):
                if loop.time() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_SECONDS)
            before = offset
            current = await way.look(name)
            offset = next(one.received_bytes for one in current.files if one.path == file.path)
            if offset > before:
                deadline, pause = loop.time() + self._patience_seconds, FIRST_PAUSE_SECONDS

    async def _send_version_file(self, name: str, path: str, offset: int, source: Path) -> Any:
        kind = registry_service_pb2.UploadArtifactRequest
        header = kind.Header(version=name, path=path, offset=offset)

        async def messages() -> AsyncIterator[registry_service_pb2.UploadArtifactRequest]:
            yield kind(header=header)
            async for chunk in _chunks(source, offset):
                yield kind(chunk=chunk)

        return await self._models.UploadArtifact(messages(), timeout=FILE_SECONDS)

    async def _send_artifact_file(self, name: str, path: str, offset: int, source: Path) -> Any:
        kind = artifact_service_pb2.UploadFileRequest
        header = kind.Header(artifact=name, path=path, offset=offset)

        async def messages() -> AsyncIterator[artifact_service_pb2.UploadFileRequest]:
            yield kind(header=header)
            async for chunk in _chunks(source, offset):
                yield kind(chunk=chunk)

        return await self._artifacts.UploadFile(messages(), timeout=FILE_SECONDS)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call again while the registry is away, within bounds."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._patience_seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                return await call()
            except (Unavailable, DeadlineExceeded):
                if loop.time() > deadline:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
            pause = min(2 * pause, LAST_PAUSE_SECONDS)


def listed(directory: Path) -> list[version_pb2.BundleFile]:
    """Return the files of a directory as they are announced. Blocking.

    Raises:
        InvalidArgument: There is something else than files and folders.
    """
    found = []
    for path, facts in sorted(bundle_files.walk(directory)):
        full = directory / path
        if full.is_symlink() or not full.is_file():
            raise InvalidArgument(f"{path} is no ordinary file; only such can be published.")
        found.append(version_pb2.BundleFile(path=path, size_bytes=facts.st_size, sha256=sha256_of_file(full)))
    return found


def described(fields: Mapping[str, Any]) -> artifact_pb2.Artifact:
    """Return an artifact with its description set."""
    made = artifact_pb2.Artifact()
    if fields:
        ParseDict(json.loads(json.dumps(fields)), made.description)
    return made


def _fingerprint(files: list[version_pb2.BundleFile]) -> str:
    return "\n".join(f"{file.sha256} {file.size_bytes} {file.path}" for file in files)


async def _chunks(source: Path, offset: int) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(source.open, "rb")
    try:
        file.seek(offset)
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
    finally:
        file.close()
