"""A server of the gateway's gRPC calls with its state in memory, for tests of clients.

It speaks the generated stubs over a real socket. `fail` makes the next calls of a method fail;
`cut_uploads_after` breaks an upload in the middle, once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import empty_pb2

from penstock.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NotFound,
    PenstockError,
    Reason,
    to_status,
)
from penstock.oip.v2 import inference_pb2 as oip
from penstock.registry.v1 import model_pb2, version_pb2
from penstock.registry.v1 import registry_service_pb2 as registry
from penstock.registry.v1.registry_service_pb2_grpc import (
    RegistryServiceServicer,
    add_RegistryServiceServicer_to_server,
)
from penstock.scheduler.v1 import deployment_pb2, node_pb2, replica_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as scheduler
from penstock.scheduler.v1.scheduler_service_pb2_grpc import (
    SchedulerServiceServicer,
    add_SchedulerServiceServicer_to_server,
)

READY = version_pb2.VERSION_STATE_READY


class FakeMesh(RegistryServiceServicer, SchedulerServiceServicer):
    """Models, versions, aliases, deployments, and models that answer with their input.

    Attributes:
        address: host:port, once started.
        calls: How often each method was called.
        requests: The last request of each method.
        cut_uploads_after: Bytes after which the next upload breaks; None for never.
        corrupt_downloads: Send zeros instead of what was uploaded.
        delay_seconds: How long a model takes to answer.
        final_state: What state a deployment ends in.
    """

    def __init__(self) -> None:
        self.models: dict[str, model_pb2.Model] = {}
        self.versions: dict[str, version_pb2.Version] = {}
        self.by_request: dict[str, Any] = {}
        self.blobs: set[str] = set()
        self.received: dict[tuple[str, str], bytes] = defaultdict(bytes)
        self.deployments: dict[str, deployment_pb2.Deployment] = {}
        self.revisions: list[deployment_pb2.DeploymentRevision] = []
        self.node = node_pb2.Node(name="nodes/worker-1", state=node_pb2.NODE_STATE_READY, cpu_millis=4000)
        self.calls: Counter[str] = Counter()
        self.requests: dict[str, Any] = {}
        self.cut_uploads_after: int | None = None
        self.corrupt_downloads = False
        self.delay_seconds = 0.0
        self.final_state = deployment_pb2.DEPLOYMENT_STATE_READY
        self._failures: dict[str, list[PenstockError | grpc.StatusCode]] = defaultdict(list)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            interceptors=[_Interceptor(self)],
            options=[("grpc.so_reuseport", 0)],
        )
        add_RegistryServiceServicer_to_server(self, self._server)
        add_SchedulerServiceServicer_to_server(self, self._server)
        self._server.add_generic_rpc_handlers([self._inference()])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> FakeMesh:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def fail(self, method: str, *errors: PenstockError | grpc.StatusCode) -> None:
        """Let the next calls of a method fail with these, one after the other."""
        self._failures[method].extend(errors)

    def next_failure(self, method: str) -> PenstockError | grpc.StatusCode | None:
        failures = self._failures[method]
        return failures.pop(0) if failures else None

    # Registry

    def GetModel(self, request: Any, context: Any) -> model_pb2.Model:
        return self._model(request.name)

    def ListModels(self, request: Any, context: Any) -> registry.ListModelsResponse:
        names = sorted(self.models)
        start = int(request.page_token or 0)
        end = start + min(request.page_size, 2)
        return registry.ListModelsResponse(
            models=[self.models[name] for name in names[start:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    def CreateModel(self, request: Any, context: Any) -> model_pb2.Model:
        return self.models.setdefault(request.model.name, request.model)

    def DeleteModel(self, request: Any, context: Any) -> empty_pb2.Empty:
        self._model(request.name)
        del self.models[request.name]
        return empty_pb2.Empty()

    def CreateVersion(self, request: Any, context: Any) -> version_pb2.Version:
        if request.request_id in self.by_request:
            return self.versions[self.by_request[request.request_id]]
        model = self.models.setdefault(request.parent, model_pb2.Model(name=request.parent))
        model.latest_version += 1
        version = version_pb2.Version(
            name=f"{request.parent}/versions/{model.latest_version}",
            number=model.latest_version,
            state=version_pb2.VERSION_STATE_UPLOADING,
            manifest=request.manifest,
            files=request.files,
            labels=request.labels,
            size_bytes=sum(file.size_bytes for file in request.files),
            digest="sha256:" + "0" * 64,
        )
        for file in version.files:
            file.received_bytes = file.size_bytes if file.sha256 in self.blobs else 0
        self.versions[version.name] = version
        self.by_request[request.request_id] = version.name
        return version

    def GetVersion(self, request: Any, context: Any) -> version_pb2.Version:
        return self._version(request.name)

    def ResolveVersion(self, request: Any, context: Any) -> version_pb2.Version:
        model = self._model(request.model)
        if not request.selector:
            return self._version(f"{request.model}/versions/{model.latest_version}")
        for alias in model.aliases:
            if alias.name.endswith("/" + request.selector):
                return self._version(f"{request.model}/versions/{alias.version}")
        short = request.model.removeprefix("models/")
        raise NotFound(
            f"{short} has no alias {request.selector}.",
            reason=Reason.ALIAS_NOT_FOUND,
            metadata={"model": short, "alias": request.selector},
        )

    def ListVersions(self, request: Any, context: Any) -> registry.ListVersionsResponse:
        if request.parent != "models/-":
            self._model(request.parent)
        wanted = "models/" if request.parent == "models/-" else request.parent + "/"
        found = [version for name, version in self.versions.items() if name.startswith(wanted)]
        return registry.ListVersionsResponse(versions=reversed(found))

    def UploadArtifact(self, requests: Iterator[Any], context: Any) -> registry.UploadArtifactResponse:
        header = next(requests).header
        version = self._version(header.version)
        file = next(each for each in version.files if each.path == header.path)
        key = (header.version, header.path)
        data = self.received[key][: header.offset]
        cut, self.cut_uploads_after = self.cut_uploads_after, None
        for request in requests:
            data += request.chunk
            self.received[key] = data
            file.received_bytes = len(data)
            if cut is not None and len(data) >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the line was cut")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise InvalidArgument(f"{file.path} has another SHA-256.", reason=Reason.BUNDLE_CORRUPT)
        self.blobs.add(file.sha256)
        return registry.UploadArtifactResponse(file=file)

    def FinalizeVersion(self, request: Any, context: Any) -> version_pb2.Version:
        version = self._version(request.name)
        if any(file.received_bytes != file.size_bytes for file in version.files):
            raise Internal("finalized before it was complete")
        version.state = READY
        return version

    def DownloadArtifact(self, request: Any, context: Any) -> Iterator[registry.DownloadArtifactResponse]:
        data = self.received[request.version, request.path][request.offset :]
        if self.corrupt_downloads:
            data = bytes(len(data))
        for start in range(0, len(data), 1000):
            yield registry.DownloadArtifactResponse(chunk=data[start : start + 1000])

    def SetAlias(self, request: Any, context: Any) -> model_pb2.Alias:
        model = self._model(request.name.split("/aliases/")[0])
        self._version(f"{model.name}/versions/{request.version}")
        kept = [alias for alias in model.aliases if alias.name != request.name]
        alias = model_pb2.Alias(name=request.name, version=request.version)
        del model.aliases[:]
        model.aliases.extend([*kept, alias])
        return alias

    # Scheduler

    def CreateDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        if request.deployment.name in self.deployments:
            raise AlreadyExists(f"There is a deployment {request.deployment.name}.")
        return self._put(request.deployment, 1, "create")

    def UpdateDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        current = self._deployment(request.deployment.name)
        changed = deployment_pb2.Deployment()
        changed.CopyFrom(current)
        request.update_mask.MergeMessage(request.deployment, changed, True, True)
        return self._put(changed, current.revision + 1, "update")

    def RollbackDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        current = self._deployment(request.name)
        wanted = request.revision or current.revision - 1
        earlier = next(
            each for each in self.revisions if each.revision == wanted and each.deployment == request.name
        )
        restored = deployment_pb2.Deployment(name=request.name, targets=earlier.targets)
        return self._put(restored, current.revision + 1, f"rollback to {wanted}")

    def GetDeployment(self, request: Any, context: Any) -> deployment_pb2.Deployment:
        return self._deployment(request.name)

    def ListDeployments(self, request: Any, context: Any) -> scheduler.ListDeploymentsResponse:
        return scheduler.ListDeploymentsResponse(deployments=self.deployments.values())

    def ListDeploymentRevisions(
        self, request: Any, context: Any
    ) -> scheduler.ListDeploymentRevisionsResponse:
        found = [each for each in reversed(self.revisions) if each.deployment == request.parent]
        return scheduler.ListDeploymentRevisionsResponse(revisions=found)

    def DeleteDeployment(self, request: Any, context: Any) -> empty_pb2.Empty:
        self._deployment(request.name)
        del self.deployments[request.name]
        return empty_pb2.Empty()

    def WatchDeployment(self, request: Any, context: Any) -> Iterator[deployment_pb2.Deployment]:
        deployment = self._deployment(request.name)
        for state in (deployment_pb2.DEPLOYMENT_STATE_PENDING, self.final_state):
            deployment.state = state
            deployment.ready_replicas = int(state == deployment_pb2.DEPLOYMENT_STATE_READY)
            deployment.message = "" if deployment.ready_replicas else "no node has room"
            yield deployment
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(10.0)

    def ListNodes(self, request: Any, context: Any) -> scheduler.ListNodesResponse:
        return scheduler.ListNodesResponse(nodes=[self.node])

    def GetNode(self, request: Any, context: Any) -> node_pb2.Node:
        if request.name != self.node.name:
            raise NotFound(f"There is no node {request.name}.")
        return self.node

    def UpdateNode(self, request: Any, context: Any) -> node_pb2.Node:
        self.GetNode(request.node, context)
        for path in request.update_mask.paths:
            self.node.ClearField(path)
        request.update_mask.MergeMessage(request.node, self.node)
        return self.node

    def ListReplicas(self, request: Any, context: Any) -> scheduler.ListReplicasResponse:
        replica = replica_pb2.Replica(
            name="replicas/r1",
            deployment="deployments/digits",
            version="models/digits/versions/1",
            state=replica_pb2.REPLICA_STATE_PENDING,
            message="no node has room",
        )
        here = not (self.node.draining and request.node)
        return scheduler.ListReplicasResponse(replicas=[replica] if here else [])

    def ListAllocations(self, request: Any, context: Any) -> scheduler.ListAllocationsResponse:
        held = node_pb2.Allocation(name="allocations/r1", holder="replicas/r1", node="nodes/worker-1")
        return scheduler.ListAllocationsResponse(allocations=[] if self.node.draining else [held])

    # Inference

    def ServerReady(self, request: Any, context: Any) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> oip.ModelReadyResponse:
        self._deployment(f"deployments/{request.name}")
        return oip.ModelReadyResponse(ready=True)

    def ModelMetadata(self, request: Any, context: Any) -> oip.ModelMetadataResponse:
        self._deployment(f"deployments/{request.name}")
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=request.name,
            inputs=[tensor(name="x", datatype="FP32", shape=[-1, 2])],
            outputs=[tensor(name="x", datatype="FP32", shape=[-1, 2])],
        )

    def ModelInfer(self, request: Any, context: Any) -> oip.ModelInferResponse:
        self._deployment(f"deployments/{request.model_name}")
        ended = threading.Event()
        if self.delay_seconds and context.add_callback(ended.set):
            ended.wait(self.delay_seconds)
        output = oip.ModelInferResponse.InferOutputTensor
        return oip.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version or "1",
            id=request.id,
            outputs=[
                output(name=each.name, datatype=each.datatype, shape=each.shape) for each in request.inputs
            ],
            raw_output_contents=request.raw_input_contents,
        )

    def _inference(self) -> grpc.GenericRpcHandler:
        handlers = {}
        for method, kind in (
            ("ServerReady", oip.ServerReadyRequest),
            ("ModelReady", oip.ModelReadyRequest),
            ("ModelMetadata", oip.ModelMetadataRequest),
            ("ModelInfer", oip.ModelInferRequest),
        ):
            handlers[method] = grpc.unary_unary_rpc_method_handler(
                getattr(self, method),
                request_deserializer=kind.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    def _model(self, name: str) -> model_pb2.Model:
        short = name.removeprefix("models/")
        if name not in self.models:
            raise NotFound(
                f"There is no model {short}.", reason=Reason.MODEL_NOT_FOUND, metadata={"model": short}
            )
        return self.models[name]

    def _version(self, name: str) -> version_pb2.Version:
        self._model(name.split("/versions/")[0])
        if name not in self.versions:
            raise NotFound(f"There is no version {name}.", reason=Reason.VERSION_NOT_FOUND)
        return self.versions[name]

    def _deployment(self, name: str) -> deployment_pb2.Deployment:
        short = name.removeprefix("deployments/")
        if name not in self.deployments:
            raise NotFound(
                f"There is no deployment {short}.",
                reason=Reason.DEPLOYMENT_NOT_FOUND,
                metadata={"deployment": short},
            )
        return self.deployments[name]

    def _put(self, deployment: Any, revision: int, cause: str) -> deployment_pb2.Deployment:
        made = deployment_pb2.Deployment()
        made.CopyFrom(deployment)
        made.revision = revision
        made.state = deployment_pb2.DEPLOYMENT_STATE_PENDING
        self.deployments[made.name] = made
        self.revisions.append(
            deployment_pb2.DeploymentRevision(
                deployment=made.name, revision=revision, targets=made.targets, cause=cause
            )
        )
        return made


class _Interceptor(grpc.ServerInterceptor):
    """Counts calls, injects failures, and sends errors of the tree as the services do."""

    def __init__(self, mesh: FakeMesh) -> None:
        self._mesh = mesh

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        method = details.method.rsplit("/", 1)[-1]
        mesh = self._mesh

        def begin(request: Any, context: Any) -> None:
            mesh.calls[method] += 1
            mesh.requests[method] = request
            failure = mesh.next_failure(method)
            if isinstance(failure, PenstockError):
                raise failure
            if failure is not None:
                context.abort(failure, "injected")

        def unary(request: Any, context: Any) -> Any:
            try:
                begin(request, context)
                return (handler.unary_unary or handler.stream_unary)(request, context)
            except PenstockError as error:
                _abort(context, error)

        def stream(request: Any, context: Any) -> Iterator[Any]:
            try:
                begin(request, context)
                yield from handler.unary_stream(request, context)
            except PenstockError as error:
                _abort(context, error)

        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, **codecs)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(unary, **codecs)
        return grpc.unary_unary_rpc_method_handler(unary, **codecs)


def _abort(context: Any, error: PenstockError) -> None:
    context.set_trailing_metadata([("grpc-status-details-bin", to_status(error).SerializeToString())])
    code = next(each for each in grpc.StatusCode if each.value[0] == int(error.code))
    context.abort(code, error.message)
