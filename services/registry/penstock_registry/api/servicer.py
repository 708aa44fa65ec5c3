"""penstock.registry.v1.RegistryService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from penstock.registry.v1 import (
    model_pb2,
    registry_service_pb2_grpc,
    version_pb2,
)
from penstock.registry.v1 import (
    registry_service_pb2 as pb,
)
from penstock_kit import names, rpc
from penstock_kit.errors import InvalidArgument
from penstock_registry.api import convert
from penstock_registry.api.streams import next_part
from penstock_registry.domain import query
from penstock_registry.domain.model import Model
from penstock_registry.domain.version import Version
from penstock_registry.usecases import aliases, bundles, models, versions
from penstock_registry.usecases.ports import Ports

Context = grpc.aio.ServicerContext[Any, Any]


class RegistryServicer(registry_service_pb2_grpc.RegistryServiceServicer):
    """Convert, call, convert. Errors of the tree become statuses in `penstock_kit.rpc`."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    async def CreateModel(self, request: pb.CreateModelRequest, context: Context) -> model_pb2.Model:
        """Make a model."""
        model = Model(
            names.parse_model(request.model.name), request.model.description, dict(request.model.labels)
        )
        made = await models.create_model(
            self._ports, model, request_id=request.request_id, actor=rpc.principal()
        )
        return convert.model_to_proto(made)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> model_pb2.Model:
        """Get one model."""
        return convert.model_to_proto(await models.get_model(self._ports, names.parse_model(request.name)))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List models, a page at a time."""
        page = await models.list_models(
            self._ports,
            query.parse_query(
                page_size=request.page_size,
                page_token=request.page_token,
                filter_text=request.filter,
                order_by=request.order_by,
                fields=query.MODEL_FIELDS,
                orders=query.MODEL_ORDERS,
                default_order="name",
                scope="models",
            ),
        )
        return pb.ListModelsResponse(
            models=[convert.model_to_proto(model) for model in page.models],
            next_page_token=page.next_page_token,
        )

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Context) -> model_pb2.Model:
        """Change description and labels."""
        given = Model(
            names.parse_model(request.model.name), request.model.description, dict(request.model.labels)
        )
        changed = await models.update_model(
            self._ports, given, mask=list(request.update_mask.paths), etag=request.model.etag
        )
        return convert.model_to_proto(changed)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> Empty:
        """Hide a model and its versions."""
        await models.delete_model(self._ports, names.parse_model(request.name))
        return Empty()

    async def CreateVersion(self, request: pb.CreateVersionRequest, context: Context) -> version_pb2.Version:
        """Announce a version."""
        announced = Version(
            model=names.parse_model(request.parent),
            number=0,
            manifest=convert.manifest_from_proto(request.manifest),
            files=tuple(convert.file_from_proto(file) for file in request.files),
            labels=dict(request.labels),
        )
        made = await versions.create_version(
            self._ports,
            announced,
            allow_create_model=request.allow_create_model,
            request_id=request.request_id,
            actor=rpc.principal(),
        )
        return convert.version_to_proto(made)

    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> version_pb2.Version:
        """Get one version."""
        return convert.version_to_proto(
            await versions.get_version(self._ports, *names.parse_version(request.name))
        )

    async def ResolveVersion(
        self, request: pb.ResolveVersionRequest, context: Context
    ) -> version_pb2.Version:
        """Find the version that a number, an alias or nothing means."""
        found = await versions.resolve_version(
            self._ports, names.parse_model(request.model), request.selector
        )
        return convert.version_to_proto(found)

    async def ListVersions(
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        """List versions of a model or of all."""
        model = names.parse_model(request.parent, wildcard=True)
        page = await versions.list_versions(
            self._ports,
            None if model == names.ANY else model,
            query.parse_query(
                page_size=request.page_size,
                page_token=request.page_token,
                filter_text=request.filter,
                order_by=request.order_by,
                fields=query.VERSION_FIELDS,
                orders=query.VERSION_ORDERS,
                default_order="number desc",
                scope=f"versions of {model}",
            ),
        )
        return pb.ListVersionsResponse(
            versions=[convert.version_to_proto(version) for version in page.versions],
            next_page_token=page.next_page_token,
        )

    async def UpdateVersion(self, request: pb.UpdateVersionRequest, context: Context) -> version_pb2.Version:
        """Change labels, metrics and profiles."""
        model, number = names.parse_version(request.version.name)
        given = Version(
            model=model,
            number=number,
            manifest=convert.manifest_from_proto(request.version.manifest),
            files=(),
            labels=dict(request.version.labels),
            profiles=tuple(convert.profile_from_proto(profile) for profile in request.version.profiles),
        )
        changed = await versions.update_version(
            self._ports, given, mask=list(request.update_mask.paths), etag=request.version.etag
        )
        return convert.version_to_proto(changed)

    async def UploadArtifact(
        self, request_iterator: AsyncIterator[pb.UploadArtifactRequest], context: Context
    ) -> pb.UploadArtifactResponse:
        """Receive the bytes of one file."""
        parts = aiter(request_iterator)
        first = await next_part(parts)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument("The first message of UploadArtifact must have the header.")
        header = first.header
        model, number = names.parse_version(header.version)
        file = await bundles.upload(self._ports, model, number, header.path, header.offset, _chunks(parts))
        return pb.UploadArtifactResponse(file=convert.file_to_proto(file))

    async def FinalizeVersion(
        self, request: pb.FinalizeVersionRequest, context: Context
    ) -> version_pb2.Version:
        """Check the bundle and make the version READY."""
        return convert.version_to_proto(
            await bundles.finalize(self._ports, *names.parse_version(request.name))
        )

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """Send the bytes of one file."""
        model, number = names.parse_version(request.version)
        async for chunk in bundles.download(self._ports, model, number, request.path, request.offset):
            yield pb.DownloadArtifactResponse(chunk=chunk)

    async def ArchiveVersion(
        self, request: pb.ArchiveVersionRequest, context: Context
    ) -> version_pb2.Version:
        """READY → ARCHIVED."""
        return convert.version_to_proto(
            await versions.archive_version(self._ports, *names.parse_version(request.name))
        )

    async def RestoreVersion(
        self, request: pb.RestoreVersionRequest, context: Context
    ) -> version_pb2.Version:
        """ARCHIVED → READY."""
        return convert.version_to_proto(
            await versions.restore_version(self._ports, *names.parse_version(request.name))
        )

    async def DeleteVersion(self, request: pb.DeleteVersionRequest, context: Context) -> Empty:
        """Any state → DELETED."""
        await versions.delete_version(self._ports, *names.parse_version(request.name))
        return Empty()

    async def GetLineage(self, request: pb.GetLineageRequest, context: Context) -> pb.GetLineageResponse:
        """List all generations before and after a version."""
        found = await versions.get_lineage(self._ports, *names.parse_version(request.name))
        return pb.GetLineageResponse(
            ancestors=[convert.version_to_proto(version) for version in found.ancestors],
            descendants=[convert.version_to_proto(version) for version in found.descendants],
        )

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> model_pb2.Alias:
        """Point an alias at a version."""
        model, alias = names.parse_alias(request.name)
        if request.version < 1:
            raise InvalidArgument(f"version is {request.version}; versions are numbered from 1.")
        moved = await aliases.set_alias(
            self._ports,
            model,
            alias,
            request.version,
            expected=request.expected_version if request.HasField("expected_version") else None,
            actor=rpc.principal(),
            comment=request.comment,
            force=request.force,
        )
        return convert.alias_to_proto(moved)

    async def GetAlias(self, request: pb.GetAliasRequest, context: Context) -> model_pb2.Alias:
        """Get one alias."""
        return convert.alias_to_proto(await aliases.get_alias(self._ports, *names.parse_alias(request.name)))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> Empty:
        """Remove an alias."""
        model, alias = names.parse_alias(request.name)
        await aliases.delete_alias(self._ports, model, alias, actor=rpc.principal())
        return Empty()

    async def RollbackAlias(self, request: pb.RollbackAliasRequest, context: Context) -> model_pb2.Alias:
        """Move an alias back."""
        model, alias = names.parse_alias(request.name)
        moved = await aliases.rollback_alias(
            self._ports, model, alias, actor=rpc.principal(), comment=request.comment
        )
        return convert.alias_to_proto(moved)

    async def ListAliasMoves(
        self, request: pb.ListAliasMovesRequest, context: Context
    ) -> pb.ListAliasMovesResponse:
        """List moves, newest first."""
        model = names.parse_model(request.parent)
        alias = _alias_of(request.alias, model)
        until = convert.time_from_proto(request.until, "until") if request.HasField("until") else None
        page = await aliases.list_moves(
            self._ports,
            model,
            alias=alias,
            until=until,
            query=query.parse_query(
                page_size=request.page_size,
                page_token=request.page_token,
                filter_text="",
                order_by="",
                fields={},
                orders=("create_time",),
                default_order="create_time desc",
                scope=f"moves of {model} {alias} {until}",
            ),
        )
        return pb.ListAliasMovesResponse(
            moves=[convert.move_to_proto(move) for move in page.moves], next_page_token=page.next_page_token
        )


def _alias_of(text: str, model: str) -> str:
    """Return the alias of a request that may give it alone, or as a resource name of the same model."""
    if "/" not in text:
        return names.check_alias(text) if text else ""
    owner, alias = names.parse_alias(text)
    if owner != model:
        raise InvalidArgument(f"alias {text!r} is not one of models/{model}.")
    return alias


async def _chunks(parts: AsyncIterator[pb.UploadArtifactRequest]) -> AsyncIterator[bytes]:
    """Yield the chunks that follow the header."""
    while (part := await next_part(parts)) is not None:
        if part.WhichOneof("part") != "chunk":
            raise InvalidArgument("Every message of UploadArtifact after the first must have a chunk.")
        yield part.chunk
