# Made from _async/core.py by libs/make_sync.py; edit that and run it again.
"""The channel, the stubs and the one way to make a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from penstock._sync import io
from penstock.errors import NotFound
from penstock.oip.v2 import inference_pb2 as oip
from penstock.registry.v1 import artifact_service_pb2_grpc, registry_service_pb2_grpc
from penstock.scheduler.v1 import (
    job_service_pb2_grpc,
    project_service_pb2_grpc,
    scheduler_service_pb2_grpc,
)
from penstock.transport import (
    DEFAULT_ENDPOINT,
    DEFAULT_TIMEOUT_SECONDS,
    OIP_SERVICE,
    Attempts,
    check_endpoint,
    translate,
)

if TYPE_CHECKING:
    from penstock.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
    from penstock.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
    from penstock.scheduler.v1.job_service_pb2_grpc import JobServiceStub
    from penstock.scheduler.v1.project_service_pb2_grpc import ProjectServiceStub
    from penstock.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub

Request = TypeVar("Request")
Response = TypeVar("Response")
ListRequest = TypeVar("ListRequest", bound=Message)
Item = TypeVar("Item")

PAGE_SIZE = 500


class InferenceStub:
    """Calls of the Open Inference Protocol, under the name that every client and server uses for it."""

    def __init__(self, channel: io.Channel) -> None:
        def call(method: str, request: type[Message], response: type[Message]) -> Any:
            return channel.unary_unary(
                f"/{OIP_SERVICE}/{method}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )

        self.ServerReady: io.UnaryUnary[oip.ServerReadyRequest, oip.ServerReadyResponse] = call(
            "ServerReady", oip.ServerReadyRequest, oip.ServerReadyResponse
        )
        self.ServerMetadata: io.UnaryUnary[oip.ServerMetadataRequest, oip.ServerMetadataResponse] = call(
            "ServerMetadata", oip.ServerMetadataRequest, oip.ServerMetadataResponse
        )
        self.ModelReady: io.UnaryUnary[oip.ModelReadyRequest, oip.ModelReadyResponse] = call(
            "ModelReady", oip.ModelReadyRequest, oip.ModelReadyResponse
        )
        self.ModelMetadata: io.UnaryUnary[oip.ModelMetadataRequest, oip.ModelMetadataResponse] = call(
            "ModelMetadata", oip.ModelMetadataRequest, oip.ModelMetadataResponse
        )
        self.ModelInfer: io.UnaryUnary[oip.ModelInferRequest, oip.ModelInferResponse] = call(
            "ModelInfer", oip.ModelInferRequest, oip.ModelInferResponse
        )


class Core:
    """Holds the channel; the nouns build on it.

    Args:
        endpoint: HOST:PORT of a gateway.
        timeout: Seconds that a call may take where the caller gives no other.
        retry_seconds: Seconds in which a call goes on trying once the gateway, or what stands behind it,
            cannot be reached; never beyond the call's own timeout.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retry_seconds: float = 10.0,
    ) -> None:
        self.endpoint = check_endpoint(endpoint)
        self._timeout = timeout
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._channel: io.Channel | None = None

    def _open(self) -> io.Channel:
        """Return the channel, opened at the first call: an event loop may not exist before."""
        with self._lock:
            if self._channel is None:
                self._channel = io.open_channel(self.endpoint)
                self._registry_stub: RegistryServiceStub = registry_service_pb2_grpc.RegistryServiceStub(
                    self._channel
                )
                self._scheduler_stub: SchedulerServiceStub = scheduler_service_pb2_grpc.SchedulerServiceStub(
                    self._channel
                )
                self._artifact_stub: ArtifactServiceStub = artifact_service_pb2_grpc.ArtifactServiceStub(
                    self._channel
                )
                self._job_stub: JobServiceStub = job_service_pb2_grpc.JobServiceStub(self._channel)
                self._project_stub: ProjectServiceStub = project_service_pb2_grpc.ProjectServiceStub(
                    self._channel
                )
                self._inference_stub = InferenceStub(self._channel)
            return self._channel

    @property
    def _registry(self) -> RegistryServiceStub:
        self._open()
        return self._registry_stub

    @property
    def _scheduler(self) -> SchedulerServiceStub:
        self._open()
        return self._scheduler_stub

    @property
    def _artifacts(self) -> ArtifactServiceStub:
        self._open()
        return self._artifact_stub

    @property
    def _jobs(self) -> JobServiceStub:
        self._open()
        return self._job_stub

    @property
    def _projects(self) -> ProjectServiceStub:
        self._open()
        return self._project_stub

    @property
    def _inference(self) -> InferenceStub:
        self._open()
        return self._inference_stub

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(
        self,
        call: io.UnaryUnary[Request, Response],
        request: Request,
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Response:
        """Make one call; retry while UNAVAILABLE unless a second execution would do harm."""
        attempts = self._attempts(timeout, retry=retry)
        while True:
            try:
                return call(request, timeout=attempts.left())
            except grpc.RpcError as error:
                pause = attempts.pause_after(translate(error, self.endpoint))
            io.sleep(pause)

    def _delete(self, call: io.UnaryUnary[Request, Any], request: Request) -> None:
        """Make a Delete call; found gone at a retry, an earlier attempt had done it."""
        attempts = self._attempts(None, retry=True)
        while True:
            try:
                call(request, timeout=attempts.left())
            except grpc.RpcError as error:
                translated = translate(error, self.endpoint)
                if isinstance(translated, NotFound) and attempts.count > 1:
                    return
                pause = attempts.pause_after(translated)
            else:
                return
            io.sleep(pause)

    def _list(
        self,
        call: io.UnaryUnary[ListRequest, Response],
        request: ListRequest,
        items: Callable[[Response], Iterable[Item]],
        limit: int | None,
    ) -> list[Item]:
        """Go through the pages of a List method; return all items, or the first `limit`."""
        found: list[Item] = []
        after = ""
        while limit is None or len(found) < limit:
            page_request = type(request)()
            page_request.CopyFrom(request)
            size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            setattr(page_request, "page_size", size)  # noqa: B010  (no common type of requests has it)
            setattr(page_request, "page_token", after)  # noqa: B010
            page = self._unary(call, page_request)
            found.extend(items(page))
            after = getattr(page, "next_page_token", "")
            if not after:
                break
        return found[:limit]

    def _attempts(self, timeout: float | None, *, retry: bool) -> Attempts:
        return Attempts(self._timeout if timeout is None else timeout, self._retry_seconds if retry else 0.0)
