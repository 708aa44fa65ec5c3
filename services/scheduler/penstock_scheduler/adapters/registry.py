"""The registry over gRPC."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from penstock.registry.v1 import registry_service_pb2 as pb
from penstock.registry.v1 import registry_service_pb2_grpc, version_pb2
from penstock_kit.errors import DeadlineExceeded, FailedPrecondition, Reason, Unavailable
from penstock_scheduler.adapters.documents import version_from_message
from penstock_scheduler.domain.version import Version
from penstock_scheduler.usecases.ports import AliasNow

RESOLVE_TIMEOUT_SECONDS = 3.0
POLL_TIMEOUT_SECONDS = 2.0


class GrpcRegistry:
    """Implements `Registry` on a channel of `penstock_kit.rpc.open_channel`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = registry_service_pb2_grpc.RegistryServiceStub(channel)

    async def resolve(self, model: str, selector: str) -> Version:
        """See `Registry.resolve`."""
        request = pb.ResolveVersionRequest(model=f"models/{model}", selector=selector)
        try:
            found = await self._stub.ResolveVersion(request, timeout=RESOLVE_TIMEOUT_SECONDS)
        except DeadlineExceeded as error:
            # Our deadline, not the caller's, who may have time to try again.
            raise Unavailable(
                f"The registry did not answer within {RESOLVE_TIMEOUT_SECONDS:g} s. Retry.",
                reason=Reason.DEPENDENCY_UNAVAILABLE,
                metadata={"dependency": "registry"},
            ) from error
        if found.state != version_pb2.VERSION_STATE_READY:
            state = version_pb2.VersionState.Name(found.state).removeprefix("VERSION_STATE_")
            raise FailedPrecondition(
                f"{found.name} is {state}; only a READY version can be deployed.",
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
