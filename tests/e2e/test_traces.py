"""One trace goes through every process that has a part in a call, and the logs name it."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

import penstock
from penstock.registry.v1 import registry_service_pb2, registry_service_pb2_grpc
from penstock.scheduler.v1 import deployment_pb2, scheduler_service_pb2, scheduler_service_pb2_grpc
from support.mesh_process import Mesh
from support.onnx_models import save_adder


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._services: dict[str, dict[str, Any]] = defaultdict(dict)

    def Export(self, request: Any, context: Any) -> Any:
        with self._news:
            for batch in request.resource_spans:
                facts = {fact.key: fact.value.string_value for fact in batch.resource.attributes}
                for scope in batch.scope_spans:
                    for span in scope.spans:
                        self._services[span.trace_id.hex()].setdefault(facts["service.name"], []).append(span)
            self._news.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, trace: str, services: set[str], seconds: float = 30.0) -> dict[str, list[Any]]:
        """Return the spans of a trace by service, as soon as there are some of all these services."""
        with self._news:
            come = self._news.wait_for(lambda: services <= set(self._services[trace]), seconds)
            found = {service: list(spans) for service, spans in self._services[trace].items()}
        assert come, f"wanted spans of {sorted(services)}, got those of {sorted(found)}"
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    kept = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"127.0.0.1:{port}"
    server.stop(1).wait()


@pytest.fixture(scope="module")
def traced(
    collector: tuple[Collector, str],
    start_mesh: Callable[..., Mesh],  # after the collector, so that it is stopped before that
    tmp_path_factory: pytest.TempPathFactory,
) -> Mesh:
    """A mesh that sends its spans to the collector and serves the model `adder`."""
    # Spans are sent in batches, each second instead of each fifth.
    mesh = start_mesh(env={"PENSTOCK_OTLP_ENDPOINT": collector[1], "OTEL_BSP_SCHEDULE_DELAY": "500"})
    path = save_adder(tmp_path_factory.mktemp("model") / "adder.onnx", 1.0)
    with penstock.Client(mesh.address) as client:
        client.push(path, options=penstock.PackageOptions(max_batch_size=8))
        client.deploy("adder")
        client.wait_for_deployment("adder")
        client.wait_ready("adder")
        np.testing.assert_array_equal(client.predict("adder", {"input": np.ones((1, 1), "f4")}).only, [[2]])
    return mesh


def new_trace() -> tuple[str, str]:
    """Return a trace id and the traceparent of a caller's span in it."""
    trace = uuid.uuid4().hex
    return trace, f"00-{trace}-{os.urandom(8).hex()}-01"


def parents(spans: dict[str, list[Any]]) -> dict[str, str]:
    """Return for each service of a trace the services whose spans its own continue."""
    owner = {span.span_id: service for service, found in spans.items() for span in found}
    return {
        service: ", ".join(sorted({owner.get(span.parent_span_id, "caller") for span in found}))
        for service, found in spans.items()
    }


def test_an_inference_is_one_trace_from_the_caller_through_gateway_and_queue_to_the_replica(
    traced: Mesh, collector: tuple[Collector, str]
) -> None:
    trace, traceparent = new_trace()
    body = {"inputs": [{"name": "input", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}]}
    reply = httpx.post(
        f"{traced.url}/v2/models/adder/infer", json=body, headers={"traceparent": traceparent}, timeout=20
    )
    assert reply.status_code == 200, reply.text
    spans = collector[0].wait(trace, {"penstock-gateway", "penstock-replica"})
    assert parents(spans) == {"penstock-gateway": "caller", "penstock-replica": "penstock-gateway"}
    (replica,) = spans["penstock-replica"]
    assert replica.end_time_unix_nano > replica.start_time_unix_nano
    facts = {fact.key: fact.value.string_value for fact in replica.attributes}
    assert facts["penstock.model"].endswith("adder")


def test_a_refused_inference_is_an_error_in_its_trace(traced: Mesh, collector: tuple[Collector, str]) -> None:
    trace, traceparent = new_trace()
    body = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]}
    reply = httpx.post(
        f"{traced.url}/v2/models/adder/infer", json=body, headers={"traceparent": traceparent}, timeout=20
    )
    assert reply.status_code == 400, reply.text
    spans = collector[0].wait(trace, {"penstock-gateway", "penstock-replica"})
    failed = [span.status.code for found in spans.values() for span in found]
    assert failed == [2, 2], "STATUS_CODE_ERROR at both"


def test_a_deployment_is_one_trace_through_gateway_and_scheduler_to_the_registry(
    traced: Mesh, collector: tuple[Collector, str]
) -> None:
    trace, traceparent = new_trace()
    request = scheduler_service_pb2.CreateDeploymentRequest(
        deployment=deployment_pb2.Deployment(
            name="deployments/other",
            targets=[deployment_pb2.Target(model="models/adder", version=1, weight=100)],
            replicas=1,
        ),
    )
    with grpc.insecure_channel(traced.address) as channel:
        stub = scheduler_service_pb2_grpc.SchedulerServiceStub(channel)
        stub.CreateDeployment(request, metadata=[("traceparent", traceparent)], timeout=20)
    spans = collector[0].wait(trace, {"penstock-gateway", "penstock-scheduler", "penstock-registry"})
    assert parents(spans) == {
        "penstock-gateway": "caller",
        "penstock-scheduler": "penstock-gateway",
        "penstock-registry": "penstock-scheduler",
    }


def test_a_deletion_is_one_trace_through_gateway_and_registry_to_the_scheduler(
    traced: Mesh, collector: tuple[Collector, str]
) -> None:
    trace, traceparent = new_trace()
    with grpc.insecure_channel(traced.address) as channel:
        stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.DeleteModel(
                registry_service_pb2.DeleteModelRequest(name="models/adder"),
                metadata=[("traceparent", traceparent)],
                timeout=20,
            )
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    spans = collector[0].wait(trace, {"penstock-gateway", "penstock-scheduler", "penstock-registry"})
    assert parents(spans)["penstock-scheduler"] == "penstock-registry"
    traced.wait(lambda: trace in traced.log("registry"), "the registry's log names the trace")
    lines = [json.loads(line) for line in traced.log("registry").splitlines() if trace in line]
    assert {(line["service"], line["code"]) for line in lines} == {
        ("penstock-registry", "FAILED_PRECONDITION")
    }


def test_every_service_has_metrics_where_status_says(traced: Mesh) -> None:
    wanted = {
        "gateway-1": "penstock_gateway_inferences_total",
        "registry": "penstock_rpcs_total",
        "scheduler": "penstock_scheduler_replicas",
        "worker-1": "penstock_worker_replicas",
    }
    for name, metric in wanted.items():
        url = traced.unit(name).metrics
        assert metric in httpx.get(url, timeout=20).text, (name, url)


def test_log_lines_are_json_and_say_when_where_and_how_bad(traced: Mesh, tmp_path: Path) -> None:
    for name in ("gateway-1", "registry", "scheduler", "worker-1"):
        for line in traced.log(name).splitlines():
            assert {"time", "level", "service", "logger", "message"} <= set(json.loads(line)), (name, line)
