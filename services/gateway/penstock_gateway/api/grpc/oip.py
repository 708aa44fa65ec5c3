"""The Open Inference Protocol over gRPC, in Triton's superset, but for ModelInfer (see hotpath.infer)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC
from penstock_gateway.api.about import EXTENSIONS, RELEASE, SERVER_NAME
from penstock_gateway.api.grpc import views
from penstock_gateway.api.grpc.methods import method, unsupported
from penstock_gateway.hotpath.bounds import bounds, header_priority
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.grpc_framing import Call, Handler
from penstock_gateway.hotpath.scan import encode_varint, read_parameters, scan
from penstock_gateway.usecases.catalog import Catalog, is_ready
from penstock_gateway.usecases.repository import Repository
from penstock_kit.errors import Cancelled, InvalidArgument, PenstockError
from penstock_kit.queue.messages import Reply

SERVICE = "inference.GRPCInferenceService"
STREAM_FORMAT = b"x-oip-stream-format"
# Requests of one stream that are unanswered at once; more wait here, and then in the connection.
STREAM_WINDOW = 256
STREAM_AHEAD_BYTES = 4 << 20

_Submitted = tuple[str, asyncio.Future[Reply] | PenstockError]

_NO_SHARED_MEMORY = "Shared memory is not offered: requests pass through a queue. Send the tensors inline."
_NO_SETTINGS = "It is set on the server, not by clients: see PENSTOCK_LOG_LEVEL and PENSTOCK_OTLP_ENDPOINT."
_UNSUPPORTED = {
    **{
        f"{kind}SharedMemory{verb}": _NO_SHARED_MEMORY
        for kind in ("System", "Cuda", "Tpu")
        for verb in ("Status", "Register", "Unregister")
    },
    "TraceSetting": _NO_SETTINGS,
    "LogSettings": _NO_SETTINGS,
}


class OipService:
    """All methods but ModelInfer.

    Args:
        catalog: What is offered.
        repository: Loads and unloads.
        dispatcher: Queues the inferences of streams.
    """

    def __init__(self, catalog: Catalog, repository: Repository, dispatcher: Dispatcher) -> None:
        self._catalog = catalog
        self._repository = repository
        self._dispatcher = dispatcher

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by path."""
        offered: dict[str, Handler] = {
            "ServerLive": method(oip.ServerLiveRequest, self._live),
            "ServerReady": method(oip.ServerReadyRequest, self._ready),
            "ModelReady": method(oip.ModelReadyRequest, self._model_ready),
            "ServerMetadata": method(oip.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": method(oip.ModelMetadataRequest, self._model_metadata),
            "ModelStreamInfer": self.stream_infer,
            "ModelConfig": method(oip.ModelConfigRequest, self._config),
            "ModelStatistics": method(oip.ModelStatisticsRequest, self._statistics),
            "RepositoryIndex": method(oip.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": method(oip.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": method(oip.RepositoryModelUnloadRequest, self._unload),
        }
        refused = {name: unsupported(f"{name}: {why}") for name, why in _UNSUPPORTED.items()}
        return {f"/{SERVICE}/{name}": handler for name, handler in {**offered, **refused}.items()}

    async def _live(self, request: oip.ServerLiveRequest, call: Call) -> oip.ServerLiveResponse:
        return oip.ServerLiveResponse(live=True)

    async def _ready(self, request: oip.ServerReadyRequest, call: Call) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=not self._dispatcher.problem)

    async def _model_ready(self, request: oip.ModelReadyRequest, call: Call) -> oip.ModelReadyResponse:
        ready = is_ready(self._catalog, request.name, request.version)
        return oip.ModelReadyResponse(ready=ready and not self._dispatcher.problem)

    async def _server_metadata(
        self, request: oip.ServerMetadataRequest, call: Call
    ) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name=SERVER_NAME, version=RELEASE, extensions=EXTENSIONS)

    async def _model_metadata(
        self, request: oip.ModelMetadataRequest, call: Call
    ) -> oip.ModelMetadataResponse:
        return views.metadata(self._catalog.offer(request.name, request.version))

    async def _config(self, request: oip.ModelConfigRequest, call: Call) -> oip.ModelConfigResponse:
        return oip.ModelConfigResponse(
            config=views.config(self._catalog.offer(request.name, request.version))
        )

    async def _statistics(
        self, request: oip.ModelStatisticsRequest, call: Call
    ) -> oip.ModelStatisticsResponse:
        found = await self._catalog.statistics(request.name, request.version)
        return oip.ModelStatisticsResponse(model_stats=[views.statistics(one) for one in found])

    async def _index(self, request: oip.RepositoryIndexRequest, call: Call) -> oip.RepositoryIndexResponse:
        entries = await self._catalog.index(ready_only=request.ready)
        return oip.RepositoryIndexResponse(
            models=[
                oip.RepositoryIndexResponse.ModelIndex(
                    name=e.name, version=e.version, state=e.state, reason=e.reason
                )
                for e in entries
            ]
        )

    async def _load(
        self, request: oip.RepositoryModelLoadRequest, call: Call
    ) -> oip.RepositoryModelLoadResponse:
        # KServe's client puts the model's name where the others put the repository's.
        name = request.model_name or request.repository_name
        if request.parameters:
            raise InvalidArgument(
                "Configuration and files cannot be given with a load: push a version, then load it."
            )
        await self._repository.load(name, call.deadline - time.time())
        return oip.RepositoryModelLoadResponse(model_name=name, is_loaded=True)

    async def _unload(
        self, request: oip.RepositoryModelUnloadRequest, call: Call
    ) -> oip.RepositoryModelUnloadResponse:
        name = request.model_name or request.repository_name
        await self._repository.unload(name, call.deadline - time.time())
        return oip.RepositoryModelUnloadResponse(model_name=name, is_unloaded=True)

    async def stream_infer(self, call: Call) -> None:
        """Serve ModelStreamInfer: many inferences at once over one stream.

        Answers come in the order of the requests, as Triton's do for models that answer once. An error of
        one request is an answer too, and the stream goes on; in the bare format, which has no place for
        errors, it ends the stream.
        """
        bare = call.headers.get(STREAM_FORMAT, b"").strip().lower() == b"infer-response"
        window = _Window(lambda message: self._submit(message, call))

        async def read() -> None:
            message: bytes | None = b""
            while message is not None:
                message = await call.read()
                window.put(message)
                await window.room()
            await call.wait_disconnect()
            raise Cancelled

        async def write() -> None:
            await call.open()
            while (submitted := await window.get()) is not None:
                request_id, answer = submitted
                try:
                    if isinstance(answer, PenstockError):
                        raise answer
                    payload = (await answer).payload
                    data = payload if bare else _WRAPPED + encode_varint(len(payload)) + payload
                except PenstockError as error:
                    if bare:
                        raise
                    data = _error_message(error, request_id)
                window.answered()
                await call.write(data)
            reading.cancel()

        reading = asyncio.ensure_future(read())
        writing = asyncio.ensure_future(write())
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            for task in (writing, reading):
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
            for _, left in window.left():
                if not isinstance(left, PenstockError):
                    left.cancel()

    def _submit(self, message: bytes, call: Call) -> _Submitted:
        request_id = ""
        try:
            name, version, request_id, parameters = scan(message)
            deadline, priority = call.deadline, header_priority(call.headers)
            if parameters:
                deadline, priority = bounds(read_parameters(parameters), deadline, priority)
            return request_id, self._dispatcher.submit(
                name,
                version,
                message,
                deadline=min(deadline, time.time() + self._dispatcher.default_timeout),
                format=PAYLOAD_FORMAT_OIP_GRPC,
                traceparent=call.traceparent,
                priority=priority,
            )
        except PenstockError as error:
            return request_id, error


class _Window:
    """The requests of one stream, in order: at most so many in their queues, some more read ahead.

    Reading ahead is what notices that the caller leaves while the window is full: servers say so only
    to those who read.

    Args:
        submit: Puts a message into its queue.
    """

    def __init__(self, submit: Callable[[bytes], _Submitted]) -> None:
        self._submit = submit
        self._open = 0
        self._submitted: asyncio.Queue[_Submitted | None] = asyncio.Queue()
        self._ahead: deque[bytes | None] = deque()
        self._bytes = 0
        self._room = asyncio.Event()

    def put(self, message: bytes | None) -> None:
        """Take what was read; None is the end."""
        self._ahead.append(message)
        self._bytes += len(message or b"")
        self._fill()

    async def room(self) -> None:
        """Return when more may be read."""
        while self._bytes > STREAM_AHEAD_BYTES:
            self._room.clear()
            await self._room.wait()

    async def get(self) -> _Submitted | None:
        """Return the next request that was put into its queue; None after the last."""
        return await self._submitted.get()

    def answered(self) -> None:
        """Make room for another request."""
        self._open -= 1
        self._fill()

    def left(self) -> Iterator[_Submitted]:
        """Give what nobody has got."""
        while not self._submitted.empty():
            submitted = self._submitted.get_nowait()
            if submitted is not None:
                yield submitted

    def _fill(self) -> None:
        while self._ahead and self._open < STREAM_WINDOW:
            message = self._ahead.popleft()
            self._bytes -= len(message or b"")
            self._open += 1
            self._submitted.put_nowait(None if message is None else self._submit(message))
        self._room.set()


# Field 2 (infer_response) of ModelStreamInferResponse; its bytes are the replica's, untouched.
_WRAPPED = b"\x12"


def _error_message(error: PenstockError, request_id: str) -> bytes:
    """Return an error as an answer of the stream; the id says whose it is."""
    return oip.ModelStreamInferResponse(
        error_message=error.message, infer_response=oip.ModelInferResponse(id=request_id)
    ).SerializeToString()
