"""Everything over gRPC beside inferences: OIP's other methods, pass-through, reflection, health."""

import asyncio
import subprocess
import sys
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from penstock.gateway.v1 import gateway_service_pb2
from penstock.oip.v2 import inference_pb2 as oip
from penstock.registry.v1 import registry_service_pb2 as registry
from penstock.scheduler.v1 import deployment_pb2, job_pb2, job_service_pb2, scheduler_service_pb2
from support.gateway_world import GatewayProcess, World

OIP = "/inference.GRPCInferenceService/"
REGISTRY = "/penstock.registry.v1.RegistryService/"
SCHEDULER = "/penstock.scheduler.v1.SchedulerService/"
JOBS = "/penstock.scheduler.v1.JobService/"


def call(channel: grpc.aio.Channel, path: str, answer: Any) -> Any:
    return channel.unary_unary(
        path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=answer.FromString
    )


async def test_the_server_describes_itself(channel: grpc.aio.Channel) -> None:
    assert (await call(channel, OIP + "ServerLive", oip.ServerLiveResponse)(oip.ServerLiveRequest())).live
    assert (await call(channel, OIP + "ServerReady", oip.ServerReadyResponse)(oip.ServerReadyRequest())).ready
    about = await call(channel, OIP + "ServerMetadata", oip.ServerMetadataResponse)(
        oip.ServerMetadataRequest()
    )
    assert about.name == "penstock"
    assert "binary_tensor_data" in about.extensions


async def test_a_model_is_described(channel: grpc.aio.Channel) -> None:
    ask = oip.ModelMetadataRequest(name="echo", version="champion")
    about = await call(channel, OIP + "ModelMetadata", oip.ModelMetadataResponse)(ask)
    assert (about.name, list(about.versions), about.platform) == ("echo", ["1"], "torch_pt2")
    first = about.inputs[0]
    assert (first.name, first.datatype, list(first.shape)) == ("x", "FP32", [-1, 4])
    ask_config = oip.ModelConfigRequest(name="echo")
    config = (await call(channel, OIP + "ModelConfig", oip.ModelConfigResponse)(ask_config)).config
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [4]
    assert config.HasField("dynamic_batching")


async def test_readiness_of_a_model_is_true_of_the_moment(channel: grpc.aio.Channel, world: World) -> None:
    ready = call(channel, OIP + "ModelReady", oip.ModelReadyResponse)
    assert (await ready(oip.ModelReadyRequest(name="echo"))).ready
    assert not (await ready(oip.ModelReadyRequest(name="nobody"))).ready
    assert not (await ready(oip.ModelReadyRequest(name="echo", version="9"))).ready
    world.offer("echo", ready=0, state=deployment_pb2.DEPLOYMENT_STATE_DEGRADED)
    async with asyncio.timeout(20):
        while (await ready(oip.ModelReadyRequest(name="echo"))).ready:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("field", ["model_name", "repository_name"])
async def test_load_and_unload_take_the_name_where_either_client_puts_it(
    channel: grpc.aio.Channel, field: str
) -> None:
    load = call(channel, OIP + "RepositoryModelLoad", oip.RepositoryModelLoadResponse)
    loaded = await load(oip.RepositoryModelLoadRequest(**{field: "digits"}), timeout=20)
    assert (loaded.model_name, loaded.is_loaded) == ("digits", True)
    index = await call(channel, OIP + "RepositoryIndex", oip.RepositoryIndexResponse)(
        oip.RepositoryIndexRequest(), timeout=20
    )
    assert ("digits", "2", "READY") in [(m.name, m.version, m.state) for m in index.models]
    unload = call(channel, OIP + "RepositoryModelUnload", oip.RepositoryModelUnloadResponse)
    unloaded = await unload(oip.RepositoryModelUnloadRequest(**{field: "digits"}), timeout=20)
    assert (unloaded.model_name, unloaded.is_unloaded) == ("digits", True)


async def test_statistics_of_all_and_of_one(channel: grpc.aio.Channel) -> None:
    ask = call(channel, OIP + "ModelStatistics", oip.ModelStatisticsResponse)
    for name in ("", "echo"):
        found = await ask(oip.ModelStatisticsRequest(name=name), timeout=20)
        assert [(m.name, m.version) for m in found.model_stats] == [("echo", "1")]


async def test_management_calls_reach_their_service_with_the_callers_metadata(
    channel: grpc.aio.Channel, world: World
) -> None:
    create = call(channel, SCHEDULER + "CreateDeployment", deployment_pb2.Deployment)
    made = deployment_pb2.Deployment(name="deployments/passed")
    made.targets.add(model="models/digits", version=1, weight=100)
    await create(scheduler_service_pb2.CreateDeploymentRequest(deployment=made), timeout=10)
    get = call(channel, SCHEDULER + "GetDeployment", deployment_pb2.Deployment)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("x-penstock-principal", "root"), ("traceparent", trace), ("x-mine", "yes"))
    ask = scheduler_service_pb2.GetDeploymentRequest(name="deployments/passed")
    got = await get(ask, timeout=10, metadata=metadata)
    assert got.targets[0].model == "models/digits"
    assert world.metadata["x-penstock-principal"] == "anonymous"
    assert world.metadata["traceparent"].split("-")[1] == trace.split("-")[1]
    assert world.metadata["x-mine"] == "yes"


async def test_errors_of_services_pass_with_their_details(channel: grpc.aio.Channel) -> None:
    get = call(channel, SCHEDULER + "GetDeployment", deployment_pb2.Deployment)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get(scheduler_service_pb2.GetDeploymentRequest(name="deployments/no"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "There is no deployments/no."
    details = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert (info.reason, dict(info.metadata)) == ("DEPLOYMENT_NOT_FOUND", {"name": "deployments/no"})


async def test_client_and_server_streams_pass(channel: grpc.aio.Channel) -> None:
    chunk = bytes(range(256)) * 2000
    upload = channel.stream_unary(
        REGISTRY + "UploadArtifact",
        request_serializer=registry.UploadArtifactRequest.SerializeToString,
        response_deserializer=registry.UploadArtifactResponse.FromString,
    )
    parts = (registry.UploadArtifactRequest(chunk=chunk) for _ in range(12))
    assert (await upload(parts, timeout=30)).file.received_bytes == 12 * len(chunk)
    download = channel.unary_stream(
        REGISTRY + "DownloadArtifact",
        request_serializer=registry.DownloadArtifactRequest.SerializeToString,
        response_deserializer=registry.DownloadArtifactResponse.FromString,
    )
    got = [part.chunk async for part in download(registry.DownloadArtifactRequest(), timeout=30)]
    assert b"".join(got) == 12 * chunk


async def test_events_of_jobs_pass_to_their_end(channel: grpc.aio.Channel) -> None:
    watch = channel.unary_stream(
        JOBS + "WatchJobEvents",
        request_serializer=job_service_pb2.WatchJobEventsRequest.SerializeToString,
        response_deserializer=job_pb2.JobEvent.FromString,
    )
    request = job_service_pb2.WatchJobEventsRequest(name="jobs/fit")
    assert [event.number async for event in watch(request, timeout=30)] == [1, 2, 3]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch(job_service_pb2.WatchJobEventsRequest(name="jobs/no"), timeout=30).read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watch_goes_on_until_its_caller_leaves(channel: grpc.aio.Channel, world: World) -> None:
    world.deployments["deployments/seen"] = deployment_pb2.Deployment(name="deployments/seen", revision=1)
    watch = channel.unary_stream(
        SCHEDULER + "WatchDeployment",
        request_serializer=scheduler_service_pb2.WatchDeploymentRequest.SerializeToString,
        response_deserializer=deployment_pb2.Deployment.FromString,
    )(scheduler_service_pb2.WatchDeploymentRequest(name="deployments/seen"))
    assert (await watch.read()).revision == 1
    world.deployments["deployments/seen"] = deployment_pb2.Deployment(name="deployments/seen", revision=2)
    world.publish()
    assert (await watch.read()).revision == 2
    watch.cancel()


async def test_reflection_gives_usable_descriptors(channel: grpc.aio.Channel) -> None:
    for version in ("v1", "v1alpha"):
        stream = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )()
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await stream.read()).list_services_response.service}
        assert {
            "inference.GRPCInferenceService",
            "penstock.registry.v1.RegistryService",
            "penstock.registry.v1.ArtifactService",
            "penstock.scheduler.v1.SchedulerService",
            "penstock.scheduler.v1.JobService",
            "penstock.scheduler.v1.ProjectService",
            "penstock.gateway.v1.GatewayService",
            "grpc.health.v1.Health",
        } <= names
        pool = descriptor_pool.DescriptorPool()
        known: set[str] = set()
        for name in sorted(names):
            await stream.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
            files = (await stream.read()).file_descriptor_response.file_descriptor_proto
            parsed = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in files]
            waiting = [file for file in parsed if file.name not in known]
            while waiting:
                file = next(f for f in waiting if known.issuperset(f.dependency))
                pool.Add(file)
                known.add(file.name)
                waiting.remove(file)
            assert pool.FindServiceByName(name).methods
        infer = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
        assert infer.input_type.full_name == "inference.ModelInferRequest"
        await stream.done_writing()


def test_reflection_leaves_the_default_pool_alone() -> None:
    code = (
        "import penstock_gateway.api.grpc.reflection as r; r.pool()\n"
        "from google.protobuf import descriptor_pool\n"
        "try: descriptor_pool.Default().FindMessageTypeByName('inference.ModelInferRequest')\n"
        "except KeyError: print('clean')"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "clean"


async def test_health_of_the_gateway_and_of_each_deployment(channel: grpc.aio.Channel) -> None:
    check = call(channel, "/grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse)
    for name in ("", "inference.GRPCInferenceService", "echo"):
        answer = await check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watching_health_follows_a_deployment(channel: grpc.aio.Channel, world: World) -> None:
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(service="coming"), timeout=30)
    states = health_pb2.HealthCheckResponse
    assert (await watch.read()).status == states.SERVICE_UNKNOWN
    world.offer("coming", ready=0, state=deployment_pb2.DEPLOYMENT_STATE_PENDING)
    assert (await watch.read()).status == states.NOT_SERVING
    world.offer("coming")
    assert (await watch.read()).status == states.SERVING
    world.withdraw("coming")
    assert (await watch.read()).status == states.SERVICE_UNKNOWN
    watch.cancel()


async def test_the_gateway_tells_its_state(channel: grpc.aio.Channel, gateway: GatewayProcess) -> None:
    get = call(channel, "/penstock.gateway.v1.GatewayService/GetGateway", gateway_service_pb2.Gateway)
    state = await get(gateway_service_pb2.GetGatewayRequest(), timeout=10)
    assert state.route_generation > 0
    assert {d.name: d.ready for d in state.dependencies} == {
        "redis": True,
        "scheduler": True,
        "registry": True,
    }
    assert [(r.deployment, r.ready) for r in state.routes] == [("echo", True)]


def test_the_log_has_no_traceback(gateway: GatewayProcess) -> None:
    """Last in this module: whatever the tests above did was expected."""
    assert "Traceback" not in gateway.text()
