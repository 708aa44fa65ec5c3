"""The registry over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from penstock.registry.v1 import (
    artifact_pb2,
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    registry_service_pb2_grpc,
    version_pb2,
)
from penstock.registry.v1 import registry_service_pb2 as pb
from penstock_kit.errors import DeadlineExceeded, FailedPrecondition, NotFound, Reason, Unavailable
from penstock_kit.jobs.checkpoints import checkpoint_artifact, made_of
from penstock_scheduler.adapters.documents import version_from_message
from penstock_scheduler.domain.job import Job
from penstock_scheduler.domain.version import Version
from penstock_scheduler.usecases.ports import AliasNow

RESOLVE_TIMEOUT_SECONDS = 3.0
POLL_TIMEOUT_SECONDS = 2.0
# The registry reads all files of a version before it calls it READY.
FINALIZE_TIMEOUT_SECONDS = 120.0
DELETE_TIMEOUT_SECONDS = 10.0


class GrpcRegistry:
    """Implements `Registry` and `ResultStore` on a channel of `penstock_kit.rpc.open_channel`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        self._artifacts = artifact_service_pb2_grpc.ArtifactServiceStub(channel)

    async def resolve(self, model: str, selector: str) -> Version:
        """See `Registry.resolve`."""
        request = pb.ResolveVersionRequest(model=f"models/{model}", selector=selector)
        try:
            found = await self._stub.ResolveVersion(request, timeout=RESOLVE_TIMEOUT_SECONDS)
        except DeadlineExceeded as error:
            raise _late(RESOLVE_TIMEOUT_SECONDS) from error
        if found.state != version_pb2.VERSION_STATE_READY:
            state = version_pb2.VersionState.Name(found.state).removeprefix("VERSION_STATE_")
            raise FailedPrecondition(
                f"{found.name} is {state}; only a READY version can be used.",
                reason=Reason.WRONG_STATE,
                metadata={"version": found.name, "state": state},
            )
        return version_from_message(found)

    async def aliases(self, model: str) -> Mapping[str, AliasNow]:
        """See `Registry.aliases`."""
        request = pb.GetModelRequest(name=f"models/{model}")
        found = await self._stub.GetModel(request, timeout=POLL_TIMEOUT_SECONDS)
        return {
            alias.name.rpartition("/")[2]: AliasNow(alias.version, alias.updated_by)
            for alias in found.aliases
        }

    async def artifact(self, name: str) -> str:
        """See `Registry.artifact`."""
        request = artifact_service_pb2.GetArtifactRequest(name=name)
        try:
            found = await self._artifacts.GetArtifact(request, timeout=RESOLVE_TIMEOUT_SECONDS)
        except DeadlineExceeded as error:
            raise _late(RESOLVE_TIMEOUT_SECONDS) from error
        if found.state != artifact_pb2.ARTIFACT_STATE_READY:
            state = artifact_pb2.ArtifactState.Name(found.state).removeprefix("ARTIFACT_STATE_")
            raise FailedPrecondition(
                f"{found.name} is {state}; only a READY artifact can be used.",
                reason=Reason.WRONG_STATE,
                metadata={"artifact": found.name, "state": state},
            )
        return str(found.name)

    async def check_answers(self, artifact: str) -> None:
        """See `Registry.check_answers`."""
        request = artifact_service_pb2.GetArtifactRequest(name=f"artifacts/{artifact}")
        try:
            found = await self._artifacts.GetArtifact(request, timeout=RESOLVE_TIMEOUT_SECONDS)
        except NotFound:
            return
        except DeadlineExceeded as error:
            raise _late(RESOLVE_TIMEOUT_SECONDS) from error
        if found.kind != artifact_pb2.ARTIFACT_KIND_PREDICTIONS:
            kind = artifact_pb2.ArtifactKind.Name(found.kind).removeprefix("ARTIFACT_KIND_")
            raise FailedPrecondition(
                f"artifacts/{artifact} is a {kind}; choose another name for the answers.",
                reason=Reason.WRONG_STATE,
                metadata={"artifact": f"artifacts/{artifact}", "kind": kind},
            )

    async def newest(self, model: str) -> str:
        """See `Registry.newest`."""
        request = pb.ResolveVersionRequest(model=f"models/{model}")
        try:
            found = await self._stub.ResolveVersion(request, timeout=RESOLVE_TIMEOUT_SECONDS)
        except DeadlineExceeded as error:
            raise _late(RESOLVE_TIMEOUT_SECONDS) from error
        return str(found.name)

    async def finalize(self, name: str, job_id: str) -> None:
        """See `ResultStore.finalize`."""
        await self._check_maker(name, job_id)
        try:
            if name.startswith("artifacts/"):
                request = artifact_service_pb2.FinalizeArtifactRequest(name=name)
                made = await self._artifacts.FinalizeArtifact(request, timeout=FINALIZE_TIMEOUT_SECONDS)
                ready = made.state == artifact_pb2.ARTIFACT_STATE_READY
            else:
                found = await self._stub.FinalizeVersion(
                    pb.FinalizeVersionRequest(name=name), timeout=FINALIZE_TIMEOUT_SECONDS
                )
                ready = found.state == version_pb2.VERSION_STATE_READY
        except DeadlineExceeded as error:
            raise _late(FINALIZE_TIMEOUT_SECONDS) from error
        if not ready:  # somebody deleted or archived it meanwhile
            raise FailedPrecondition(f"{name} is not READY.", reason=Reason.WRONG_STATE)

    async def delete(self, name: str, job_id: str) -> None:
        """See `ResultStore.delete`."""
        try:
            await self._check_maker(name, job_id)
            if name.startswith("artifacts/"):
                request = artifact_service_pb2.DeleteArtifactRequest(name=name)
                await self._artifacts.DeleteArtifact(request, timeout=DELETE_TIMEOUT_SECONDS)
            else:
                await self._stub.DeleteVersion(
                    pb.DeleteVersionRequest(name=name), timeout=DELETE_TIMEOUT_SECONDS
                )
        except NotFound:
            return
        except DeadlineExceeded as error:
            raise _late(DELETE_TIMEOUT_SECONDS) from error

    async def checkpoints(self, job: Job) -> Sequence[str]:
        """See `ResultStore.checkpoints`."""
        made = Timestamp()
        made.FromDatetime(job.create_time)
        found: list[str] = []
        for part in range(job.gang.tasks):
            # Whoever deletes it twice may meet those of the next job of its name.
            found += [
                one.name
                async for one in self._versions_of(checkpoint_artifact(job.id, part))
                if made_of(one.labels) <= made.ToNanoseconds()
            ]
        return found

    async def _versions_of(self, checkpoint: str) -> AsyncIterator[artifact_pb2.Artifact]:
        kind = artifact_pb2.ARTIFACT_KIND_CHECKPOINT
        request = artifact_service_pb2.ListArtifactsRequest(parent=checkpoint, kind=kind)
        while True:
            try:
                page = await self._artifacts.ListArtifacts(request, timeout=RESOLVE_TIMEOUT_SECONDS)
            except DeadlineExceeded as error:
                raise _late(RESOLVE_TIMEOUT_SECONDS) from error
            for one in page.artifacts:
                yield one
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def _check_maker(self, name: str, job_id: str) -> None:
        """Raises FailedPrecondition if the registry has it as made by another than the job."""
        try:
            if name.startswith("artifacts/"):
                request = artifact_service_pb2.GetArtifactRequest(name=name)
                made_by = (await self._artifacts.GetArtifact(request, timeout=RESOLVE_TIMEOUT_SECONDS)).job
            else:
                found = await self._stub.GetVersion(
                    pb.GetVersionRequest(name=name), timeout=RESOLVE_TIMEOUT_SECONDS
                )
                made_by = found.manifest.lineage.job
        except DeadlineExceeded as error:
            raise _late(RESOLVE_TIMEOUT_SECONDS) from error
        if made_by != f"jobs/{job_id}":
            raise FailedPrecondition(
                f"{name} was not made by the job {job_id}.",
                reason=Reason.WRONG_STATE,
                metadata={"name": name},
            )


def _late(seconds: float) -> Unavailable:
    """Our deadline, not the caller's, who may have time to try again."""
    return Unavailable(
        f"The registry did not answer within {seconds:g} s. Retry.",
        reason=Reason.DEPENDENCY_UNAVAILABLE,
        metadata={"dependency": "registry"},
    )
