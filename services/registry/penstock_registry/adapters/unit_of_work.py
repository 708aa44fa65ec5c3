"""One transaction of the registry, and the gate before it."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from penstock_kit.db import UnitOfWork
from penstock_registry.adapters.alias_repository import AliasRepository
from penstock_registry.adapters.artifact_repository import ArtifactRepository
from penstock_registry.adapters.repositories import BlobRepository, ModelRepository, RequestRepository
from penstock_registry.adapters.version_repository import VersionRepository
from penstock_registry.usecases.ports import Aliases, Artifacts, BlobIndex, Models, Requests, Versions


class RegistryUnitOfWork(UnitOfWork):
    """See `usecases.ports.Work`."""

    models: Models
    versions: Versions
    aliases: Aliases
    artifacts: Artifacts
    requests: Requests
    blobs: BlobIndex

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)

    def _open(self, session: AsyncSession) -> None:
        self.models = ModelRepository(session)
        self.versions = VersionRepository(session)
        self.aliases = AliasRepository(session)
        self.artifacts = ArtifactRepository(session)
        self.requests = RequestRepository(session)
        self.blobs = BlobRepository(session)
