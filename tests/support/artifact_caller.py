"""What a client of ArtifactService does, in one line each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import grpc

from penstock.registry.v1 import artifact_pb2, artifact_service_pb2_grpc, version_pb2
from penstock.registry.v1 import artifact_service_pb2 as pb
from support.registry_world import announced

DATASET = artifact_pb2.ARTIFACT_KIND_DATASET


class ArtifactCaller:
    """A client of the service behind a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = artifact_service_pb2_grpc.ArtifactServiceStub(channel)

    async def create(
        self,
        name: str = "iris",
        files: Mapping[str, bytes] | None = None,
        *,
        request_id: str = "",
        description: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> artifact_pb2.Artifact:
        """Announce an artifact: a dataset in npz unless `fields` say otherwise."""
        values: dict[str, Any] = {"kind": DATASET, "format": "npz", **fields}
        artifact = artifact_pb2.Artifact(files=announced(files or {"data.npz": b"data"}), **values)
        artifact.description.update(dict(description or {}))
        return await self.stub.CreateArtifact(
            pb.CreateArtifactRequest(parent=f"artifacts/{name}", artifact=artifact, request_id=request_id)
        )

    async def upload(
        self, name: str, path: str, data: bytes, *, offset: int = 0, chunk: int = 1 << 20
    ) -> version_pb2.BundleFile:
        """Send a file's bytes from `offset` on; `data` is the whole file."""
        parts = (data[at : at + chunk] for at in range(offset, len(data), chunk))
        return await self.upload_parts(name, path, parts, offset=offset)

    async def upload_parts(
        self, name: str, path: str, parts: Iterable[bytes], *, offset: int = 0
    ) -> version_pb2.BundleFile:
        """Send chunks."""

        async def messages() -> AsyncIterator[pb.UploadFileRequest]:
            yield pb.UploadFileRequest(
                header=pb.UploadFileRequest.Header(artifact=name, path=path, offset=offset)
            )
            for part in parts:
                yield pb.UploadFileRequest(chunk=part)

        return (await self.stub.UploadFile(messages(), timeout=60)).file

    async def finalize(self, name: str) -> artifact_pb2.Artifact:
        """Finalize."""
        return await self.stub.FinalizeArtifact(pb.FinalizeArtifactRequest(name=name))

    async def push(
        self, name: str = "iris", files: Mapping[str, bytes] | None = None, **fields: Any
    ) -> artifact_pb2.Artifact:
        """Announce, upload, finalize."""
        contents = files or {"data.npz": b"data"}
        artifact = await self.create(name, contents, **fields)
        for file in artifact.files:
            if file.received_bytes < file.size_bytes:
                await self.upload(artifact.name, file.path, contents[file.path], offset=file.received_bytes)
        return await self.finalize(artifact.name)

    async def get(self, name: str) -> artifact_pb2.Artifact:
        """GetArtifact."""
        return await self.stub.GetArtifact(pb.GetArtifactRequest(name=name))

    async def list(self, parent: str = "artifacts/-", **fields: Any) -> list[str]:
        """Names of a page of ListArtifacts."""
        page = await self.stub.ListArtifacts(pb.ListArtifactsRequest(parent=parent, **fields))
        return [artifact.name for artifact in page.artifacts]

    async def download(self, name: str, path: str, offset: int = 0) -> bytes:
        """All bytes of a file from an offset on."""
        request = pb.DownloadFileRequest(artifact=name, path=path, offset=offset)
        return b"".join([part.chunk async for part in self.stub.DownloadFile(request, timeout=60)])

    async def delete(self, name: str) -> None:
        """DeleteArtifact."""
        await self.stub.DeleteArtifact(pb.DeleteArtifactRequest(name=name))
