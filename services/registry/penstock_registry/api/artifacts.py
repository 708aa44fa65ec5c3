"""penstock.registry.v1.ArtifactService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import json_format, struct_pb2
from google.protobuf.empty_pb2 import Empty

from penstock.registry.v1 import artifact_pb2, artifact_service_pb2_grpc
from penstock.registry.v1 import artifact_service_pb2 as pb
from penstock_kit import names, rpc
from penstock_kit.errors import InvalidArgument
from penstock_registry.api import convert
from penstock_registry.api.streams import next_part
from penstock_registry.domain import query
from penstock_registry.domain.artifact import Artifact, ArtifactKind, plain
from penstock_registry.usecases import artifacts
from penstock_registry.usecases.ports import Ports

Context = grpc.aio.ServicerContext[Any, Any]

_KIND_PREFIX = "ARTIFACT_KIND_"


class ArtifactServicer(artifact_service_pb2_grpc.ArtifactServiceServicer):
    """Convert, call, convert. Errors of the tree become statuses in `penstock_kit.rpc`."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    async def CreateArtifact(
        self, request: pb.CreateArtifactRequest, context: Context
    ) -> artifact_pb2.Artifact:
        """Announce an artifact."""
        given = request.artifact
        kind = _kind_from_proto(given.kind)
        if kind is None:
            raise InvalidArgument(f"artifact.kind is not given; it is one of {', '.join(ArtifactKind)}.")
        announced = Artifact(
            artifact=names.parse_artifact(request.parent),
            number=0,
            kind=kind,
            files=tuple(convert.file_from_proto(file) for file in given.files),
            format=given.format,
            description=_json(given.description),
            labels=dict(given.labels),
            job=given.job,
        )
        made = await artifacts.create_artifact(
            self._ports, announced, request_id=request.request_id, actor=rpc.principal()
        )
        return _to_proto(made)

    async def GetArtifact(self, request: pb.GetArtifactRequest, context: Context) -> artifact_pb2.Artifact:
        """Get one artifact, or the newest READY one of a name."""
        if request.name.count("/") == 1:
            return _to_proto(
                await artifacts.get_artifact(self._ports, names.parse_artifact(request.name), None)
            )
        return _to_proto(
            await artifacts.get_artifact(self._ports, *names.parse_artifact_version(request.name))
        )

    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: Context
    ) -> pb.ListArtifactsResponse:
        """List artifacts, newest first."""
        artifact = names.parse_artifact(request.parent, wildcard=True)
        kind = _kind_from_proto(request.kind)
        page = await artifacts.list_artifacts(
            self._ports,
            None if artifact == names.ANY else artifact,
            kind,
            query.parse_query(
                page_size=request.page_size,
                page_token=request.page_token,
                filter_text="",
                order_by="",
                fields={},
                orders=("create_time",),
                default_order="create_time desc",
                scope=f"artifacts {artifact} {kind}",
            ),
        )
        return pb.ListArtifactsResponse(
            artifacts=[_to_proto(artifact) for artifact in page.artifacts],
            next_page_token=page.next_page_token,
        )

    async def UploadFile(
        self, request_iterator: AsyncIterator[pb.UploadFileRequest], context: Context
    ) -> pb.UploadFileResponse:
        """Receive the bytes of one file."""
        parts = aiter(request_iterator)
        first = await next_part(parts)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument("The first message of UploadFile must have the header.")
        header = first.header
        artifact, number = names.parse_artifact_version(header.artifact)
        file = await artifacts.upload(
            self._ports, artifact, number, header.path, header.offset, _chunks(parts)
        )
        return pb.UploadFileResponse(file=convert.file_to_proto(file))

    async def FinalizeArtifact(
        self, request: pb.FinalizeArtifactRequest, context: Context
    ) -> artifact_pb2.Artifact:
        """Make a complete artifact READY."""
        return _to_proto(
            await artifacts.finalize_artifact(self._ports, *names.parse_artifact_version(request.name))
        )

    async def DownloadFile(
        self, request: pb.DownloadFileRequest, context: Context
    ) -> AsyncIterator[pb.DownloadFileResponse]:
        """Send the bytes of one file."""
        artifact, number = names.parse_artifact_version(request.artifact)
        async for chunk in artifacts.download(self._ports, artifact, number, request.path, request.offset):
            yield pb.DownloadFileResponse(chunk=chunk)

    async def DeleteArtifact(self, request: pb.DeleteArtifactRequest, context: Context) -> Empty:
        """Any state → DELETED."""
        await artifacts.delete_artifact(self._ports, *names.parse_artifact_version(request.name))
        return Empty()


async def _chunks(parts: AsyncIterator[pb.UploadFileRequest]) -> AsyncIterator[bytes]:
    """Yield the chunks that follow the header."""
    while (part := await next_part(parts)) is not None:
        if part.WhichOneof("part") != "chunk":
            raise InvalidArgument("Every message of UploadFile after the first must have a chunk.")
        yield part.chunk


def _kind_from_proto(kind: artifact_pb2.ArtifactKind.ValueType) -> ArtifactKind | None:
    """Return the kind; None if it is not given.

    Raises:
        InvalidArgument: It is one of a newer contract.
    """
    value = artifact_pb2.ArtifactKind.DESCRIPTOR.values_by_number.get(kind)
    if value is None:
        raise InvalidArgument(f"kind {kind} is none that is known here: {', '.join(ArtifactKind)}.")
    return ArtifactKind(value.name.removeprefix(_KIND_PREFIX)) if kind else None


def _json(description: struct_pb2.Struct) -> dict[str, Any]:
    """Return a description with whole numbers as such.

    Raises:
        InvalidArgument: It has a number that is not finite, which JSON lacks.
    """
    try:
        fields: dict[str, Any] = plain(json_format.MessageToDict(description))
    except ValueError as error:
        raise InvalidArgument("description has a number that is not finite.") from error
    return fields


def _to_proto(artifact: Artifact) -> artifact_pb2.Artifact:
    message = artifact_pb2.Artifact(
        name=artifact.name,
        kind=artifact_pb2.ArtifactKind.Value(_KIND_PREFIX + artifact.kind),
        state=artifact_pb2.ArtifactState.Value(f"ARTIFACT_STATE_{artifact.state}"),
        files=[convert.file_to_proto(file) for file in artifact.files],
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        format=artifact.format,
        labels=artifact.labels,
        job=artifact.job,
        created_by=artifact.created_by,
        create_time=convert.time_to_proto(artifact.create_time),
    )
    message.description.update(dict(artifact.description))
    return message
