"""The registry as one process: the only place where adapters are made."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from penstock.registry.v1.artifact_service_pb2_grpc import add_ArtifactServiceServicer_to_server
from penstock.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from penstock_kit.artifacts.staging import Staging
from penstock_kit.artifacts.store import BlobStore
from penstock_kit.db import check_schema, migrate, open_engine, ping, wait_for_database
from penstock_kit.errors import Reason, Unavailable
from penstock_kit.lifecycle import TaskSet, running
from penstock_kit.rpc import RpcServer
from penstock_kit.telemetry import MetricsServer
from penstock_registry.adapters.scheduler import NoDeployments, SchedulerDeployments
from penstock_registry.adapters.unit_of_work import RegistryUnitOfWork
from penstock_registry.adapters.uploads import StagedUploads
from penstock_registry.api.artifacts import ArtifactServicer
from penstock_registry.api.servicer import RegistryServicer
from penstock_registry.settings import RegistrySettings
from penstock_registry.usecases.ports import Ports, Work

log = logging.getLogger(__name__)

SERVICE = "registry"
SERVICE_NAME = "penstock.registry.v1.RegistryService"
ARTIFACT_SERVICE_NAME = "penstock.registry.v1.ArtifactService"
DATABASE_CHECK_SECONDS = 1.0
DRAIN_SECONDS = 10.0
# An upload that nobody continued for a week is forgotten.
STALE_UPLOAD_SECONDS = 7 * 24 * 3600.0
STALE_CHECK_SECONDS = 3600.0


class RegistryApp:
    """The registry: listens at once, and is SERVING while its database answers.

    Args:
        settings: What it was told.

    `ended` ends when it shall stop, with an error if it can never serve: the schema is not for this code.
    """

    def __init__(self, settings: RegistrySettings) -> None:
        self._settings = settings
        self._engine = open_engine(
            settings.database_url,
            application="penstock-registry",
            pool_size=settings.registry_database_connections,
        )
        self._blobs = BlobStore(settings.artifacts_url or str(settings.data_dir / "artifacts"))
        self._staging = Staging(settings.data_dir.absolute() / "staging")
        self.deployments = (
            SchedulerDeployments(settings.scheduler_address)
            if settings.scheduler_address
            else NoDeployments()
        )
        self.server = RpcServer(settings.registry_listen, max_message_bytes=settings.max_message_bytes)
        ports = Ports(
            work=self._work,
            blobs=self._blobs,
            uploads=StagedUploads(self._staging, self._blobs),
            deployments=self.deployments,
            allow_python_runtime=settings.allow_python_runtime,
            allow_compiled_models=settings.allow_compiled_models,
        )
        self.server.add(add_RegistryServiceServicer_to_server, RegistryServicer(ports), SERVICE_NAME)
        self.server.add(add_ArtifactServiceServicer_to_server, ArtifactServicer(ports), ARTIFACT_SERVICE_NAME)
        self._tasks = TaskSet()
        self._schema_ready = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.server.address

    async def start(self) -> None:
        """Listen; serving begins when the database answers and its schema is right.

        Raises:
            Unavailable: The address cannot be bound.
        """
        await self.server.start()
        self._tasks.spawn("database", self._watch_database())
        self._tasks.run_forever("stale uploads", self._forget_stale_uploads)
        log.info("registry listens", extra={"address": self.address})

    async def stop(self) -> None:
        """Let open calls end, then close."""
        await self.server.stop(DRAIN_SECONDS)
        await self._tasks.stop()
        await self._engine.dispose()

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until told to stop.

        Raises:
            FailedPrecondition: The schema is not one that this code can work on.
        """
        metrics = MetricsServer(self._settings.metrics_listen, data_dir=self._settings.data_dir)
        async with running([metrics, self.deployments, self]):
            self._tasks.spawn("stopping", self._until(stopping))
            await self.ended

    async def _until(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        if not self.ended.done():
            self.ended.set_result(None)

    def _work(self) -> Work:
        if not self._schema_ready:
            raise Unavailable(
                "The registry is waiting for its database; retry once it is back.",
                reason=Reason.DEPENDENCY_UNAVAILABLE,
                metadata={"dependency": "database"},
                retry_after_seconds=1.0,
            )
        return RegistryUnitOfWork(self._engine)

    async def _watch_database(self) -> None:
        """Say in health whether the database answers, once a second, and prepare it when it comes."""
        try:
            while True:
                await wait_for_database(self._engine, on_unreachable=self._unreachable)
                with contextlib.suppress(Unavailable):
                    await self._prepare_schema()
                    await self._serve_while_it_answers()
                await self.server.set_serving(False)
        except Exception as error:  # noqa: BLE001 - whatever it is, a registry that cannot serve must end
            if not self.ended.done():
                self.ended.set_exception(error)

    async def _prepare_schema(self) -> None:
        """Migrate and check once; later a newer release may migrate while this one still serves."""
        if self._schema_ready:
            return
        if self._settings.migrate_on_start:
            revision = await asyncio.to_thread(migrate, self._settings.database_url, SERVICE)
            log.info("database schema is up to date", extra={"revision": revision})
        await check_schema(self._engine, SERVICE)
        self._schema_ready = True

    async def _serve_while_it_answers(self) -> None:
        await self.server.set_serving(True)
        log.info("registry is serving")
        while True:
            await asyncio.sleep(DATABASE_CHECK_SECONDS)
            try:
                await ping(self._engine)
            except Unavailable as error:
                self._unreachable(error)
                return

    def _unreachable(self, error: Unavailable) -> None:
        log.warning("not serving: %s", error)

    async def _forget_stale_uploads(self) -> None:
        count = await asyncio.to_thread(self._staging.discard_older_than, STALE_UPLOAD_SECONDS)
        if count:
            log.info("forgot uploads that nobody continued", extra={"count": count})
        await asyncio.sleep(STALE_CHECK_SECONDS)


def migrate_database(settings: RegistrySettings) -> str:
    """Bring the database's schema up to date; return its revision. Blocking.

    Raises:
        FailedPrecondition: The schema is newer than this code.
        Unavailable: The database cannot be reached.
    """
    return migrate(settings.database_url, SERVICE)
