"""Fetches the files of versions from the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from penstock.registry.v1 import (
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
)
from penstock_kit.errors import Reason, Unavailable

CHUNK_SECONDS = 30.0
"""How long the next chunk of at most 1 MiB may take."""


class RegistryClient:
    """Downloads from a registry.

    Args:
        channel: To the registry.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._models = registry_service_pb2_grpc.RegistryServiceStub(channel)
        self._artifacts = artifact_service_pb2_grpc.ArtifactServiceStub(channel)

    async def download(self, version: str, path: str, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file from an offset on.

        Args:
            version: models/{model}/versions/{version}, or artifacts/{artifact}/versions/{version}.
            path: A path of its files.
            offset: Where to begin.

        Raises:
            PenstockError: As the registry says.
            Unavailable: Nothing came for 30 seconds.
        """
        call = self._call(version, path, offset)
        chunks = aiter(call)
        try:
            while True:
                try:
                    async with asyncio.timeout(CHUNK_SECONDS):
                        message = await anext(chunks)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise Unavailable(
                        f"The registry sent nothing of {path} for {CHUNK_SECONDS:.0f} s.",
                        reason=Reason.DEPENDENCY_UNAVAILABLE,
                    ) from None
                yield message.chunk
        finally:
            call.cancel()

    def _call(self, name: str, path: str, offset: int) -> Any:
        if name.startswith("artifacts/"):
            return self._artifacts.DownloadFile(
                artifact_service_pb2.DownloadFileRequest(artifact=name, path=path, offset=offset)
            )
        return self._models.DownloadArtifact(
            registry_service_pb2.DownloadArtifactRequest(version=name, path=path, offset=offset)
        )
